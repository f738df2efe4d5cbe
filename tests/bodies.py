"""Networks and training steps that the tests of reversible checkpointing share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from invertible import AdditiveCoupling, InvertibleSequential, Merge, PixelUnshuffle, Split, Swap


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


def body(depth: int = 4, make: Callable[[], nn.Module] = lambda: bottleneck(4), **options: Any):
    """Images with 2 channels through couplings on two streams of 4, in float64."""
    blocks = [layer for _ in range(depth) for layer in (AdditiveCoupling(make()), Swap())]
    layers = (PixelUnshuffle(2), Split(), *blocks, Merge())
    return InvertibleSequential(*layers, **options).double()


def images(batch: int = 3, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 8, 8, dtype=torch.float64, generator=generator)


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
