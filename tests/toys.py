"""Small layers, sub-networks, compositions, states and training steps that several tests share."""

import copy
import gc
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invertible import (
    AdditiveCoupling,
    Composite,
    InvertibleModule,
    InvertibleSequential,
    Member,
    Merge,
    PixelUnshuffle,
    Split,
    Swap,
    no_trace,
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


class AffineCoupling(InvertibleModule):
    """Scales and shifts a stream by a function of the other; see docs/howto/own_layer_once.rst."""

    def __init__(self, f: nn.Module):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.forward_and_log_det(x)[0]

    def inverse(self, y):
        return self.inverse_and_log_det(y)[0]

    def forward_and_log_det(self, x):
        x1, x2 = x
        y1, log_det = self.map(x1, *self.parameters_from(x2), inverted=False)
        return (y1, x2), log_det

    def inverse_and_log_det(self, y):
        y1, x2 = y
        with no_trace(self.f, y):
            s, t = self.parameters_from(x2)
        x1, log_det = self.map(y1, s, t, inverted=True)
        return (x1, x2), log_det

    def rebuild(self, y, replay):
        y1, x2 = y
        x2 = replay.restore(x2, 1)
        s, t = self.parameters_from(x2)
        with torch.no_grad():
            x1, _ = self.map(y1, s, t, inverted=not replay.inverted)
        x1 = replay.restore(x1, 0)
        self.map(x1, s, t, replay.inverted)
        return x1, x2

    def parameters_from(self, x2):
        s, t = self.f(x2).chunk(2, dim=1)
        return s.tanh(), t

    @staticmethod
    def map(x1, s, t, inverted):
        if inverted:
            return (x1 - t) * (-s).exp(), -s.flatten(1).sum(1)
        return x1 * s.exp() + t, s.flatten(1).sum(1)


class TwiceEvaluated(AffineCoupling):
    """The same, rebuilt by the default: inverted, and then run again."""

    rebuild = InvertibleModule.rebuild


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


class Counting(nn.Module):
    """A sub-network that counts how often it is evaluated."""

    def __init__(self, f: nn.Module):
        super().__init__()
        self.f = f
        self.evaluations = 0

    def forward(self, *inputs: Any) -> Any:
        self.evaluations += 1
        return self.f(*inputs)


def evaluations(module: nn.Module) -> list[int]:
    """What all :class:`Counting` sub-networks counted."""
    return [part.evaluations for part in module.modules() if isinstance(part, Counting)]


class Probe(nn.Module):
    """A sub-network that records something whenever it is evaluated."""

    def __init__(self, f: nn.Module, record: Callable[[nn.Module, Tensor], Any]):
        super().__init__()
        self.f = f
        self.record = record
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.record(self, x))
        return self.f(x)


def probes(module: nn.Module) -> list[Probe]:
    return [part for part in module.modules() if isinstance(part, Probe)]


def linear(channels: int = 2, out: int | None = None) -> nn.Sequential:
    """A sub-network for states without space."""
    return nn.Sequential(nn.Linear(channels, out or channels), nn.Tanh())


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


class Chained(Composite):
    """Somebody's own container."""

    def __init__(self, *layers: InvertibleModule):
        super().__init__()
        self.parts = nn.ModuleList(layers)

    def members(self):
        return [Member(f"parts.{i}", part) for i, part in enumerate(self.parts)]


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


# --- the same network with stored and with rebuilt activations


def both(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """The same network twice: storing activations, and rebuilding them."""
    torch.manual_seed(0)
    stored = make()
    rebuilt = copy.deepcopy(stored)
    for part in rebuilt.modules():
        if isinstance(part, Composite):
            part.checkpoint = True
    return stored, rebuilt


def assert_same_gradients(
    networks: Sequence[nn.Module], loss: Callable[[Any], Tensor], tolerance: float = 1e-9
) -> None:
    """All networks get the same gradients from a loss, and none for the same parameters."""
    results = []
    for network in networks:
        network.zero_grad()
        torch.manual_seed(1)
        loss(network).backward()
        results.append([p.grad for p in network.parameters()])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=tolerance, atol=tolerance)


def assert_as_without(
    make: Callable[[], InvertibleModule | nn.Module],
    train: Callable[[Any, Tensor], Tensor],
    tolerance: float = 1e-9,
) -> None:
    """Couplings of some sub-networks train with checkpoint as they do without.

    ``train`` returns the loss of a network and an input. Compared are gradients of the parameters
    that there were before, of the input, all that is in the state dict, and the next random number.
    """
    results = []
    for network in both(lambda: InvertibleSequential(Split(), *couplings(3, make), Merge())):
        network.double()
        torch.manual_seed(1)
        x = images(5, 8).requires_grad_()
        parameters = [*network.parameters(), x]
        train(network, x).backward()
        results.append(([p.grad for p in parameters], network.state_dict(), torch.rand(3)))
    found, expected = results[1], results[0]
    assert found[0][-1] is not None
    torch.testing.assert_close(found[:2], expected[:2], rtol=tolerance, atol=tolerance)
    assert torch.equal(found[2], expected[2])


# --- memory


class Memory(NamedTuple):
    """Bytes that a call leaves allocated, the most that it had, and what it returned."""

    held: int
    peak: int
    result: Any


def memory_of(function: Callable[[], Any]) -> Memory:
    """What a call allocates on the CPU, as the profiler counts it."""
    gc.disable()  # else garbage of others might be freed meanwhile
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            result = function()
    finally:
        gc.enable()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return Memory(now, peak, result)


def memory_of_step(network: Callable[..., Tensor], x: Tensor) -> tuple[int, int]:
    """Bytes that a training step holds between its passes, and the most that it ever has."""
    forward = memory_of(lambda: network(x))
    backward = memory_of(lambda: forward.result.sum().backward())
    return forward.held, max(forward.peak, forward.held + backward.peak)
