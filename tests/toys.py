"""Small layers, sub-networks, compositions, states and training steps that several tests share."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invertible import (
    AdditiveCoupling,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    PixelUnshuffle,
    Split,
    Swap,
)

# --- layers


class Keep(InvertibleModule):
    """Returns its state as it is."""

    volume_preserving = True

    def forward(self, x):
        return x

    def inverse(self, y):
        return y


class Affine(InvertibleModule):
    """Scales and shifts all numbers: a constant log-determinant other than zero."""

    def __init__(self, log_scale: float = 0.5, shift: float = 1.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x):
        return x * self.log_scale.exp() + self.shift

    def inverse(self, y):
        return (y - self.shift) / self.log_scale.exp()

    def forward_and_log_det(self, x):
        return self(x), self.log_det(x)

    def inverse_and_log_det(self, y):
        return self.inverse(y), -self.log_det(y)

    def log_det(self, x):
        return (self.log_scale * x[0].numel()).expand(x.shape[0])


class Logistic(InvertibleModule):
    """Maps numbers to those between 0 and 1: a log-determinant that depends on the input."""

    def forward(self, x):
        return x.sigmoid()

    def inverse(self, y):
        return y.logit()

    def forward_and_log_det(self, x):
        return self(x), self.log_det(x)

    def inverse_and_log_det(self, y):
        x = self.inverse(y)
        return x, -self.log_det(x)

    def log_det(self, x):
        return (F.logsigmoid(x) + F.logsigmoid(-x)).flatten(1).sum(1)


class Double(InvertibleModule):
    """A layer that defines no log-determinant."""

    def forward(self, x):
        return 2 * x

    def inverse(self, y):
        return y / 2


# --- sub-networks


class Function(nn.Module):
    """A module of a function."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.forward = function


class AddsContext(nn.Module):
    """A sub-network that takes a context of one number an example."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.conv(x) * context.view(-1, 1, 1, 1)


def batch_norm_net(channels: int = 2) -> nn.Sequential:
    """A sub-network with running statistics."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Tanh(), nn.Conv2d(channels, channels, 1))


def bottleneck(c: int, dropout: float = 0.0, activation: Callable[[], nn.Module] = nn.Tanh):
    """The residual function of an i-RevNet, small; smooth, so that tolerances can be tight."""
    return nn.Sequential(
        nn.BatchNorm2d(c),
        activation(),
        nn.Conv2d(c, c // 2, 1, bias=False),
        nn.BatchNorm2d(c // 2),
        activation(),
        nn.Dropout(dropout),
        nn.Conv2d(c // 2, c, 3, padding=1, bias=False),
    )


# --- compositions


def couplings(depth: int, make: Callable[[], nn.Module]) -> list[InvertibleModule]:
    """Shifts of the one stream and the other by turns."""
    return [layer for _ in range(depth) for layer in (AdditiveCoupling(make()), Swap())]


def block(make: Callable[[], nn.Module] = batch_norm_net) -> InvertibleSequential:
    """Shifts each of two streams once."""
    return InvertibleSequential(*couplings(2, make))


def body(depth: int = 4, make: Callable[[], nn.Module] = lambda: bottleneck(4), **options: Any):
    """Images with 2 channels through couplings on two streams of 4, in float64."""
    layers = (PixelUnshuffle(2), Split(), *couplings(depth, make), Merge())
    return InvertibleSequential(*layers, **options).double()


# --- states


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers in a shape, by default two small images; the same in each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape or (2, 4, 2, 2), generator=generator, dtype=torch.float64).to(dtype)


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The halves of :func:`images`."""
    x1, x2 = images(*shape, dtype=dtype).chunk(2, dim=1)
    return x1, x2


def body_images(batch: int = 3, seed: int = 7) -> Tensor:
    """What :func:`body` takes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 8, 8, dtype=torch.float64, generator=generator)


# --- copies and training steps

# A test with this mark runs once with each way to copy a module.
copied_in_both_ways = pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)


def step(network: Callable[..., Tensor], x: Tensor, *inputs: Any) -> dict[str, Any]:
    """A forward and backward pass, and all that it changes or returns."""
    module = network if isinstance(network, nn.Module) else network.__self__
    module.zero_grad()
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = network(x, *inputs)
    # Not a sum of squares of the state, whose gradient would hide mistakes in the mean.
    (y.sin() * y).sum().backward()
    return {
        "output": y.detach(),
        "input gradient": x.grad,
        "gradients": [p.grad for p in module.parameters()],
        "buffers": [b.clone() for b in module.buffers()],
        "random": torch.rand(3),
    }


def assert_same_step(found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-9) -> None:
    """Gradients agree up to rounding, all else bit for bit."""
    torch.testing.assert_close(found["output"], expected["output"], rtol=0, atol=0)
    torch.testing.assert_close(found["buffers"], expected["buffers"], rtol=0, atol=0)
    torch.testing.assert_close(found["random"], expected["random"], rtol=0, atol=0)
    for name in ("input gradient", "gradients"):
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=rtol)
