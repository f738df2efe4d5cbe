r"""A training step of normalizing flows, beside FrEIA, nflows, normflows and zuko where installed.

    python benchmarks/flows.py --clock cpu

Two architectures at several depths: ``glow``, steps of ActNorm, a 1x1 convolution and an affine
coupling on images of 12x16x16, and ``spline``, couplings on vectors of 16. All sides get
sub-networks of the same layers, and run in turn in one process, so that what slows the machine
slows all of them. A step is the negative log-likelihood and its backward pass.

FrEIA has its all-in-one block, whose 1x1 convolution is fixed, and no spline. zuko has no
couplings of images, and masks a network of all 16 numbers.

It prints a table, and writes it and a JSON file with every number.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from comparing.meters import (
    Spread,
    Step,
    Times,
    interleave,
    measure_memory,
    time_step,
    total_error,
)
from comparing.setting import Setting, keep_heap
from exact_report import Report
from torch import Tensor, nn

from invertible import (
    ActNorm,
    AffineCoupling,
    InvertibleLinear,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    SplineCoupling,
    Split,
    Swap,
)

SHAPES = {"glow": (12, 16, 16), "spline": (16,)}
BINS = 8

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Config:
    """One measurement; every field is also a flag."""

    depths: tuple[int, ...] = (4, 8, 16, 32)
    image_batch: int = 16
    vector_batch: int = 256
    width: int = 64  # of the sub-networks
    seconds: float = 20  # of timing, for each architecture and depth
    clock: Literal["wall", "cpu"] = "wall"  # "cpu" leaves out what other processes take
    threads: int = 1
    device: Literal["cpu"] = "cpu"
    out: Path = Path(__file__).parent / "results" / "flows"  # of .json and .txt


class Counting(nn.Sequential):
    """A sub-network that counts how often it is evaluated; peers hand over a context, None."""

    evaluations = 0

    def forward(self, x: Tensor, context: None = None) -> Tensor:  # noqa: ARG002
        self.evaluations += 1
        return super().forward(x)


def convolutions(channels: int, out: int, width: int) -> nn.Module:
    """The sub-network of images."""
    return Counting(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.ReLU(),
        small(nn.Conv2d(width, out, 3, padding=1)),
    )


def linear(channels: int, out: int, width: int) -> nn.Module:
    """The sub-network of vectors."""
    return Counting(
        nn.Linear(channels, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        small(nn.Linear(width, out)),
    )


def small(last: nn.Module) -> nn.Module:
    """A last layer as training begins with, but not of zeros, whose gradients hide mistakes."""
    for parameter in last.parameters():
        nn.init.normal_(parameter, std=0.02)
    return last


class Density(nn.Module):
    """The negative log-likelihood of examples, ``(N,)``, under a flow to a standard normal.

    Args:
        flow: What has the parameters.
        run: Maps examples, and returns the log-determinants too.
        undo: Maps latents back.
    """

    def __init__(
        self,
        flow: nn.Module,
        run: Callable[[Any, Tensor], tuple[Tensor, Tensor]],
        undo: Callable[[Any, Tensor], Tensor],
    ):
        super().__init__()
        self.flow = flow
        self.run = run
        self.undo = undo

    def forward(self, x: Tensor) -> Tensor:
        z, log_det = self.run(self.flow, x)
        return z.flatten(1).square().sum(1) / 2 - log_det


# --- the sides


def ours(kind: str, depth: int, width: int, shape: Shape) -> Density:
    """This library, storing everything."""
    size, half = shape[0], shape[0] // 2

    def glow() -> list[InvertibleModule]:
        f = convolutions(half, 2 * half, width)
        norm = ActNorm(size, initialised=True)
        return [norm, InvertibleLinear(size), Split(), AffineCoupling(f), Merge()]

    def spline() -> list[InvertibleModule]:
        f = linear(half, half * (3 * BINS - 1), width)
        return [SplineCoupling(f, BINS), Swap()]

    steps = [layer for _ in range(depth) for layer in (glow() if kind == "glow" else spline())]
    if kind == "spline":
        steps = [Split(), *steps, Merge()]
    flow = InvertibleSequential(*steps)
    return Density(
        flow, lambda flow, x: flow.forward_and_log_det(x), lambda flow, z: flow.inverse(z)
    )


def freia(kind: str, depth: int, width: int, shape: Shape) -> Density | None:
    """FrEIA's all-in-one blocks."""
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

    if kind != "glow":
        return None
    flow = SequenceINN(*shape)
    for _ in range(depth):
        make = partial(convolutions, width=width)
        flow.append(AllInOneBlock, subnet_constructor=make, permute_soft=True)
    return Density(flow, lambda flow, x: flow(x), lambda flow, z: flow(z, rev=True)[0])


def nflows(kind: str, depth: int, width: int, shape: Shape) -> Density:
    """The transforms of nflows."""
    from nflows import transforms

    def step(i: int) -> list[nn.Module]:
        size = shape[0]
        mask = torch.arange(size) < size // 2
        if kind == "glow":
            make = partial(convolutions, width=width)
            coupling = transforms.AffineCouplingTransform(mask, make)
            return [transforms.ActNorm(size), transforms.OneByOneConvolution(size), coupling]
        return [
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                mask if i % 2 else ~mask,
                partial(linear, width=width),
                num_bins=BINS,
                tails="linear",
                tail_bound=3.0,
            )
        ]

    flow = transforms.CompositeTransform([part for i in range(depth) for part in step(i)])
    return Density(flow, lambda flow, x: flow(x), lambda flow, z: flow.inverse(z)[0])


def normflows(kind: str, depth: int, width: int, shape: Shape) -> Density:
    """The flows of normflows, forward."""
    import normflows as nf
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    size = shape[0]

    def step(i: int) -> list[nn.Module]:
        if kind == "glow":
            f = convolutions(size // 2, size, width)
            return [
                nf.flows.ActNorm((size, 1, 1)),
                nf.flows.Invertible1x1Conv(size, use_lu=True),
                nf.flows.AffineCouplingBlock(f, scale_map="sigmoid"),
            ]
        mask = torch.arange(size) < size // 2
        return [
            PiecewiseRationalQuadraticCoupling(
                mask if i % 2 else ~mask,
                partial(linear, width=width),
                num_bins=BINS,
                tails="linear",
                tail_bound=3.0,
            )
        ]

    flows = nn.ModuleList([part for i in range(depth) for part in step(i)])

    def run(flows: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for flow in flows:
            x, log_det = flow(x)
            total = total + log_det
        return x, total

    def undo(flows: nn.ModuleList, z: Tensor) -> Tensor:
        for flow in reversed(flows):
            z, _ = flow.inverse(z)
        return z

    return Density(flows, run, undo)


def zuko(kind: str, depth: int, width: int, shape: Shape) -> Density | None:
    """Zuko's neural spline flow, as couplings."""
    from zuko.flows import NSF

    if kind != "spline":
        return None
    flow = NSF(shape[0], bins=BINS, transforms=depth, passes=2, hidden_features=(width, width))
    return Density(
        flow,
        lambda flow, x: flow().transform.call_and_ladj(x),
        lambda flow, z: flow().transform.inv(z),
    )


PEERS = {"FrEIA": freia, "nflows": nflows, "normflows": normflows, "zuko": zuko}


def sides(kind: str, depth: int, width: int, shape: Shape) -> Iterator[tuple[str, Density]]:
    """All that there are, each from the same seed."""
    stored = ours(kind, depth, width, shape)
    yield "stored", stored
    rebuilt = copy.deepcopy(stored)
    rebuilt.flow.checkpoint = True
    yield "rebuilt", rebuilt
    for name, make in PEERS.items():
        if find_spec(name) is not None and (density := make(kind, depth, width, shape)) is not None:
            yield name, density


# --- what is measured


@dataclass(frozen=True)
class Row:
    """One side at one depth."""

    held: int  # bytes between forward and backward
    peak: int
    step: Spread  # seconds
    over_fastest_peer: Spread | None  # by the round
    over_stored: Spread
    evaluations: float | None  # of a sub-network in a step
    gradient_error: float  # of all parameters together, against float64
    log_likelihood_error: float  # largest, against float64
    times: list[Times]


def measure(kind: str, depth: int, config: Config) -> dict[str, Row]:
    """All sides in turn."""
    torch.manual_seed(0)
    batch, shape = config.image_batch if kind == "glow" else config.vector_batch, SHAPES[kind]
    x = torch.randn(batch, *shape)
    setting = Setting(clock=config.clock)
    grad = torch.full((batch,), 1 / batch)
    densities = dict(sides(kind, depth, config.width, shape))
    steps = {
        name: Step(x.clone().requires_grad_(), grad, list(density.parameters()), setting)
        for name, density in densities.items()
    }
    with torch.no_grad():
        for density in densities.values():
            density(x)  # some begin from a batch
    accuracy = {name: errors(density, x, grad) for name, density in densities.items()}
    memory = {name: measure_memory(steps[name], density) for name, density in densities.items()}
    counts = {name: evaluations(steps[name], density) for name, density in densities.items()}
    times = interleave(
        {name: partial(time_step, steps[name], density) for name, density in densities.items()},
        config.seconds,
    )
    peers = [name for name in times if name in PEERS]
    medians = {name: Spread.of([t.step for t in own]) for name, own in times.items()}
    fastest = min(peers, key=lambda name: medians[name].median, default=None)
    return {
        name: Row(
            memory[name].held,
            memory[name].peak,
            medians[name],
            ratio(own, times[fastest]) if fastest else None,
            ratio(own, times["stored"]),
            counts[name],
            *accuracy[name],
            own,
        )
        for name, own in times.items()
    }


def ratio(times: list[Times], others: list[Times]) -> Spread:
    """Of steps in the same round."""
    return Spread.of([a.step / b.step for a, b in zip(times, others, strict=True)])


def errors(density: Density, x: Tensor, grad: Tensor) -> tuple[float, float]:
    """Of gradients and of log-likelihoods, against the same side in float64, storing everything."""
    found, gradients = run(density, x, grad)
    exact = copy.deepcopy(density).double()
    if isinstance(exact.flow, InvertibleSequential):
        exact.flow.checkpoint = False
    expected, expected_gradients = run(exact, x.double(), grad.double())
    error = (found.double() - expected).abs().max().item()
    return total_error(gradients, expected_gradients), error


def run(density: Density, x: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What a step returns, and its gradients."""
    parameters = [p for p in density.parameters() if p.requires_grad]
    y = density(x)
    gradients = torch.autograd.grad(y, parameters, grad, materialize_grads=True)
    return y.detach(), list(gradients)


def evaluations(step: Step, density: Density) -> float | None:
    """How often a sub-network is evaluated in a step; None for a side that brings its own."""
    counters = [part for part in density.modules() if isinstance(part, Counting)]
    if not counters:
        return None
    before = sum(part.evaluations for part in counters)
    step.backward(step.forward(density))
    return (sum(part.evaluations for part in counters) - before) / len(counters)


# --- what is said of it


def tables(report: Report, found: dict[str, dict[int, dict[str, Row]]]) -> None:
    """A table for each architecture."""
    for kind, depths in found.items():
        report.table(
            f"A training step of {kind} flows, and errors against float64",
            ("steps", "", *COLUMNS),
            [
                (str(depth), name, *cells(row))
                for depth, rows in depths.items()
                for name, row in rows.items()
            ],
        )


COLUMNS = (
    *("held, MiB", "peak, MiB", "step, ms", "over stored", "over fastest peer", "evaluations of f"),
    *("gradients", "log-likelihoods"),
)


def cells(row: Row) -> Iterator[str]:
    """What stands in a row of a table."""
    yield from (f"{size / 2**20:.1f}" for size in (row.held, row.peak))
    yield f"{1e3 * row.step.median:.1f}"
    yield f"{row.over_stored.median:.2f}"
    yield f"{row.over_fastest_peer.median:.2f}" if row.over_fastest_peer else ""
    yield "" if row.evaluations is None else f"{row.evaluations:g}"
    yield from (f"{error:.0e}" for error in (row.gradient_error, row.log_likelihood_error))


@contextmanager
def quiet() -> Iterator[None]:
    """Without what peers warn of when they are imported or made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(config: Config) -> None:
    """Measures, prints and writes."""
    keep_heap()
    torch.set_num_threads(config.threads)
    report = Report(config)
    found: dict[str, dict[int, dict[str, Row]]] = {}
    for kind in ("glow", "spline"):
        found[kind] = {}
        for depth in config.depths:
            with quiet():
                found[kind][depth] = measure(kind, depth, config)
            report.write(found)
    tables(report, found)
    report.write(found)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
