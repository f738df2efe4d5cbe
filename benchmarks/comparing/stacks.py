"""The sides against each other, on stacks of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from invertible import InvertibleSequential

from .meters import (
    Memory,
    Spread,
    Step,
    Times,
    interleave,
    measure_memory,
    old_objects_frozen,
    outcome,
    time_forward,
    time_step,
    worst_error,
)
from .setting import Setting
from .sides import FAST_PEERS, OURS, PLAIN, Network, Side, bottleneck, layers


class Row(NamedTuple):
    """One side in a comparison."""

    step: Spread  # seconds
    over_plain: Spread  # the step's time over that of plain's step in the same round
    over_limit: Spread  # and over that of plain's step with another forward
    memory: Memory
    times: list[Times]


@dataclass
class Comparison:
    """Rows by side; a side that could not run is named with the reason."""

    blocks: int
    rows: dict[str, Row] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def limit(self) -> Spread:
        """What one more evaluation must cost: (step + forward) / step of the plain side."""
        return Spread.of([1 + t.forward / t.step for t in self.rows[PLAIN].times])

    @property
    def over_peers(self) -> dict[str, Spread]:
        """The time of our step over that of each fast peer in the same round, and the better's."""
        peers = {name: self.rows[name].times for name in FAST_PEERS if name in self.rows}
        if not peers or OURS not in self.rows:
            return {}
        own = self.rows[OURS].times
        ratios = {
            name: _ratios(own, times, lambda peer: peer.step) for name, times in peers.items()
        }
        better = [
            min(round_, key=lambda peer: peer.step) for round_ in zip(*peers.values(), strict=True)
        ]
        return ratios | {"the better": _ratios(own, better, lambda peer: peer.step)}

    @property
    def block_seconds(self) -> float:
        """What a block takes in a plain step."""
        return self.rows[PLAIN].step.median / self.blocks


def compare(
    step: Step, networks: Mapping[str, Network], *, blocks: int, seconds: float
) -> Comparison:
    """Measures the memory of each side, then times the sides in turn."""
    comparison = Comparison(blocks)
    memory = {}
    with old_objects_frozen():
        for name, network in networks.items():
            try:
                memory[name] = measure_memory(step, network)
            except Exception as error:
                if name == PLAIN:
                    raise
                comparison.failed[name] = reason(error)
    times = interleave({name: partial(time_step, step, networks[name]) for name in memory}, seconds)
    for name, own in times.items():
        comparison.rows[name] = Row(
            Spread.of([t.step for t in own]),
            _ratios(own, times[PLAIN], lambda plain: plain.step),
            _ratios(own, times[PLAIN], lambda plain: plain.step + plain.forward),
            memory[name],
            own,
        )
    return comparison


def _ratios(
    times: Iterable[Times], others: Iterable[Times], unit: Callable[[Times], float]
) -> Spread:
    return Spread.of([t.step / unit(other) for t, other in zip(times, others, strict=True)])


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@dataclass(frozen=True)
class Stack:
    """Blocks of one size, and the data that they are trained on."""

    depth: int
    batch: int
    width: int  # channels of one stream
    side: int  # height and width of the images
    setting: Setting = field(default_factory=Setting)

    def functions(self) -> nn.ModuleList:
        """The residual functions, the same at each call."""
        torch.manual_seed(0)
        fs = nn.ModuleList(bottleneck(self.width) for _ in range(self.depth))
        self.setting.compile(fs)
        return self.setting.module(fs)

    def step(self, fs: nn.ModuleList) -> Step:
        """A training step on random numbers."""
        torch.manual_seed(1)
        shape = self.batch, 2 * self.width, self.side, self.side
        x, grad = (self.setting.images(*shape) for _ in range(2))
        return Step(x.requires_grad_(), grad, list(fs.parameters()), self.setting)


def compare_stack(stack: Stack, sides: Mapping[str, Side], seconds: float) -> Comparison:
    """All sides on one stack; they share its residual functions."""
    fs = stack.functions()
    networks = {name: side(list(fs)) for name, side in sides.items()}
    return compare(stack.step(fs), networks, blocks=stack.depth, seconds=seconds)


class Growth(NamedTuple):
    """How the memory of a side grows with depth, from the smallest to the largest measured."""

    held_per_block: float  # bytes per added block between forward and backward
    share_of_plain: float
    held_ratio: float  # the largest depth over the smallest
    peak_ratio: float


def growth(by_depth: Mapping[int, Comparison]) -> dict[str, Growth]:
    """Compares the smallest and the largest depth."""
    small, large = min(by_depth), max(by_depth)
    grown = {}
    for name, row in by_depth[small].rows.items():
        if name not in by_depth[large].rows:
            continue
        a, b = row.memory, by_depth[large].rows[name].memory
        grown[name] = Growth(
            (b.held - a.held) / (large - small), 1, b.held / a.held, b.peak / a.peak
        )
    plain = grown[PLAIN].held_per_block
    return {
        name: row._replace(share_of_plain=row.held_per_block / plain) for name, row in grown.items()
    }


class Check(NamedTuple):
    """Whether a side computes what plain training computes.

    The errors are the worst relative L2 error of a gradient tensor.
    """

    float32: float  # against plain in float32
    float32_exact: float  # against plain in float64: plain itself has this much
    float64: float  # both in float64
    statistics: bool  # BatchNorm's running means and variances are equal in every bit
    batches: int  # that BatchNorm counts in one step
    evaluations: float  # of a residual function in one step, on average


def check(stack: Stack, sides: Mapping[str, Side]) -> dict[str, Check | str]:
    """Compares what one step leaves behind with plain's; why not, where a side fails."""
    # Not compiled, so that evaluations can be counted.
    stack = replace(stack, setting=replace(stack.setting, compiled=False))
    fs, exact_fs = stack.functions(), stack.functions().double()
    step = stack.step(fs)
    exact_step = replace(step, setting=replace(stack.setting, autocast=None))
    plain = outcome(sides[PLAIN], fs, step)
    exact = outcome(sides[PLAIN], exact_fs, exact_step)
    checks: dict[str, Check | str] = {}
    for name, side in sides.items():
        try:
            found = outcome(side, fs, step)
            found_exact = outcome(side, exact_fs, exact_step)
        except Exception as error:
            checks[name] = reason(error)
            continue
        checks[name] = Check(
            worst_error(found.gradients, plain.gradients),
            worst_error(found.gradients, exact.gradients),
            worst_error(found_exact.gradients, exact.gradients),
            all(map(torch.equal, found.statistics, plain.statistics)),
            found.batches,
            found.evaluations,
        )
    return checks


def gradients_held(stack: Stack, sides: Mapping[str, Side]) -> dict[str, float]:
    """The peak of a step, in units of the parameters of one block.

    For a stack whose parameters weigh far more than its activations: that many blocks' gradients
    exist at once besides those already accumulated.
    """
    fs = stack.functions()
    step = stack.step(fs)
    unit = sum(p.nbytes for p in fs[0].parameters())
    held = {}
    with old_objects_frozen():
        for name, side in sides.items():
            with suppress(Exception):  # what fails here has failed before, and was reported
                held[name] = measure_memory(step, side(list(fs))).peak / unit
    return held


class NoGrad(NamedTuple):
    """Passes without grad."""

    loop: Spread  # seconds, in a loop by hand over the same layers
    sequential: Spread  # seconds
    ratio: Spread


def without_grad(stack: Stack, seconds: float) -> NoGrad:
    """``InvertibleSequential`` against a loop by hand over the same layers."""
    fs = stack.functions()
    sequential = InvertibleSequential(*layers(list(fs)), checkpoint=True)
    by_hand = list(sequential)

    def loop(x: Any) -> Any:
        for layer in by_hand:
            x = layer(x)
        return x

    tasks = {"loop": loop, "sequential": sequential}
    step = stack.step(fs)
    times = interleave({k: partial(time_forward, step, f) for k, f in tasks.items()}, seconds)
    ratios = [a / b for a, b in zip(times["sequential"], times["loop"], strict=True)]
    return NoGrad(Spread.of(times["loop"]), Spread.of(times["sequential"]), Spread.of(ratios))
