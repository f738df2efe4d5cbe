"""What rounding costs in time: a training step with it over the same step without."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from comparing.meters import Spread, Times, interleave, time_step
from comparing.stacks import Stack

from invertible import AdditiveCoupling, InvertibleSequential, Merge, Quantize, Split, Swap

QUANTUM = 2**-16
KINDS = {  # name: (quantum, checkpoint)
    "stored": (None, False),
    "stored, rounded": (QUANTUM, False),
    "rebuilt": (None, True),
    "rebuilt, rounded": (QUANTUM, True),
}


class Cost(NamedTuple):
    """One block size."""

    steps: dict[str, Spread]  # seconds
    stored: Spread  # rounded over not rounded, by the round
    rebuilt: Spread
    times: dict[str, list[Times]]


def measure(stack: Stack, seconds: float) -> Cost:
    """All four kinds in turn."""
    fs = stack.functions()
    step = stack.step(fs)
    networks = {}
    for name, (quantum, checkpoint) in KINDS.items():
        blocks = [layer for f in fs for layer in (AdditiveCoupling(f, quantum=quantum), Swap())]
        entrance = [] if quantum is None else [Quantize(quantum)]
        networks[name] = InvertibleSequential(
            *entrance, Split(), *blocks, Merge(), checkpoint=checkpoint
        )
    tasks = {name: partial(time_step, step, network) for name, network in networks.items()}
    times = interleave(tasks, seconds)
    return Cost(
        {name: Spread.of([t.step for t in own]) for name, own in times.items()},
        _ratio(times["stored, rounded"], times["stored"]),
        _ratio(times["rebuilt, rounded"], times["rebuilt"]),
        times,
    )


def _ratio(times: list[Times], others: list[Times]) -> Spread:
    return Spread.of([a.step / b.step for a, b in zip(times, others, strict=True)])
