"""How far rebuilding is from the truth, by depth and precision, here and in the peers.

Under autocast the peers' errors are of another kind: their backward passes evaluate ``f`` without
it (seen with RevTorch 0.2.4 anywhere, and MemCNN 1.5.2 on the CPU), and so differentiate another
function than the one that ran forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from comparing.meters import Step, total_error, worst_error
from comparing.setting import Setting
from comparing.sides import Network, bottleneck, layers, memcnn, plain, revtorch
from comparing.stacks import reason
from torch import Tensor, nn

from invertible import (
    AdditiveCoupling,
    InvertibleSequential,
    Merge,
    Quantize,
    Rebuild,
    Split,
    Swap,
)

QUANTUM = 2**-16


class Precision(NamedTuple):
    """What runs in which dtype."""

    state: torch.dtype = torch.float32
    f: torch.dtype = torch.float32  # its parameters too
    autocast: torch.dtype | None = None


HALF = torch.bfloat16
PRECISIONS = {
    "float32": Precision(),
    "f under bfloat16 autocast": Precision(autocast=HALF),
    "state bfloat16, f float32": Precision(state=HALF),
    "all bfloat16": Precision(state=HALF, f=HALF),
}


class Method(NamedTuple):
    """A network that rebuilds, its inverse, and the same network with stored activations.

    The stored one has its states in the same memory format, so that outputs agree in every bit.
    """

    network: Callable[[Sequence[nn.Module]], Any]
    invert: Callable[[Any, Tensor], Tensor]
    stored: Callable[[Sequence[nn.Module]], Network]


def exact(fs: Sequence[nn.Module], *, checkpoint: bool = True) -> InvertibleSequential:
    """The stack with each residual rounded to the grid."""
    blocks = [layer for f in fs for layer in (AdditiveCoupling(f, quantum=QUANTUM), Swap())]
    return InvertibleSequential(Quantize(QUANTUM), Split(), *blocks, Merge(), checkpoint=checkpoint)


def exact_stored(fs: Sequence[nn.Module]) -> Network:
    """The same network with its activations stored."""
    return exact(fs, checkpoint=False)


def floating(fs: Sequence[nn.Module]) -> InvertibleSequential:
    """The stack with nothing rounded but by the arithmetic."""
    # What comes back too far off is what is measured here.
    return InvertibleSequential(*layers(fs), checkpoint=Rebuild(tolerance=math.inf))


def _invert_ours(network: InvertibleSequential, y: Tensor) -> Tensor:
    return network.inverse(y)


def _invert_memcnn(network: nn.Sequential, y: Tensor) -> Tensor:
    for wrapped in reversed(network):
        y = wrapped.inverse(y)
    return y


def _store_memcnn(fs: Sequence[nn.Module]) -> Network:
    network = memcnn(fs)
    for wrapped in network:
        wrapped.disable = True
    return network


def _invert_revtorch(network: Any, y: Tensor) -> Tensor:
    # It has no inverse: what its backward pass rebuilds stands for it, and that pass runs without
    # the autocast of the forward.
    with torch.autocast(y.device.type, enabled=False):
        for block in reversed(network.reversible_blocks):
            y = block.backward_pass(y.detach(), torch.zeros_like(y), False)[0]
    return y


def _store_revtorch(fs: Sequence[nn.Module]) -> Network:
    def run(x: Tensor) -> Tensor:
        for f, g in zip(fs[::2], fs[1::2], strict=True):
            x1, x2 = x.chunk(2, dim=1)
            y1 = x1 + f(x2)
            x = torch.cat((y1, x2 + g(y1)), dim=1)
        return x

    return run


EXACT = "invertible, exact"
METHODS = {
    "invertible": Method(floating, _invert_ours, plain),
    "MemCNN": Method(memcnn, _invert_memcnn, _store_memcnn),
    "RevTorch": Method(revtorch, _invert_revtorch, _store_revtorch),
    EXACT: Method(exact, _invert_ours, exact_stored),
}


class _Cast(nn.Module):
    """Runs a function in its own precision on a state of another."""

    def __init__(self, f: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.f = f
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x.to(self.dtype)).to(x.dtype)


@dataclass(frozen=True)
class Blocks:
    """Bottleneck blocks in train mode, and the images that they run on."""

    depth: int
    batch: int
    width: int  # channels of one stream
    side: int  # height and width of the images
    device: str = "cpu"

    def functions(self, precision: Precision, seed: int) -> nn.ModuleList:
        """The residual functions, the same at each call."""
        torch.manual_seed(seed)
        fs = nn.ModuleList(bottleneck(self.width) for _ in range(self.depth))
        fs = fs.to(self.device, precision.f)
        if precision.f == precision.state:
            return fs
        return nn.ModuleList(_Cast(f, precision.f) for f in fs)

    def step(self, precision: Precision, parameters: Sequence[Tensor]) -> Step:
        """A training step on random numbers."""
        torch.manual_seed(1)
        shape = self.batch, 2 * self.width, self.side, self.side
        x, grad = (torch.randn(shape).to(self.device, precision.state) for _ in range(2))
        setting = Setting(self.device, precision.autocast)
        return Step(x.requires_grad_(), grad, parameters, setting)


class Error(NamedTuple):
    """Relative L2 errors."""

    reconstruction: float  # of the input, in train mode
    gradient: float  # of the worst parameter, against the same network with stored activations
    same_output: bool  # as that network, in every bit


def errors(blocks: Blocks, method: Method, precision: Precision, seed: int) -> Error:
    """Runs one network there and back, and one training step with and without rebuilding."""
    fs = blocks.functions(precision, seed)
    step = blocks.step(precision, list(fs.parameters()))
    found = _train(step, method.network(list(fs)))
    expected = _train(step, method.stored(list(fs)))

    network = method.network(list(fs))
    with torch.no_grad():
        y = step.forward(network)
        with torch.autocast(blocks.device, precision.autocast, enabled=bool(precision.autocast)):
            rebuilt = method.invert(network, y)
        # The exact network reads its input on the grid.
        read = network[0](step.x) if method is METHODS[EXACT] else step.x
    return Error(
        total_error([rebuilt], [read]),
        worst_error(found.gradients, expected.gradients),
        torch.equal(found.output, expected.output),
    )


class _Trained(NamedTuple):
    output: Tensor
    gradients: list[Tensor]


def _train(step: Step, network: Network) -> _Trained:
    step.clear()
    y = step.forward(network)
    output = y.detach().clone()  # MemCNN frees what it returned
    step.backward(y)
    return _Trained(output, [p.grad.clone() for p in step.parameters if p.grad is not None])


class Row(NamedTuple):
    """One method in one precision at one depth: an error for each seed, or why there is none."""

    method: str
    precision: str
    depth: int
    errors: list[Error]
    failed: str | None = None


def measure(blocks: Blocks, skipped: Container[str], seeds: int) -> Iterator[Row]:
    """All methods in all precisions, but for the peers to skip."""
    for precision_name, precision in PRECISIONS.items():
        for name, method in METHODS.items():
            if name in skipped or (name == EXACT and precision.state == HALF):
                continue
            try:
                found = [errors(blocks, method, precision, seed) for seed in range(seeds)]
            except Exception as error:
                yield Row(name, precision_name, blocks.depth, [], reason(error))
            else:
                yield Row(name, precision_name, blocks.depth, found)
