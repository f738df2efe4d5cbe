r"""Whole networks under ``torch.compile``: reversible blocks, stored and rebuilt.

    python benchmarks/compiled.py --clock cpu
    python benchmarks/compiled.py --device cuda --mode reduce-overhead

Times a training step of each side, in turn in one process, and the first step, which compiles, at
several depths. Peers take part where they are installed:

    pip install --no-deps revtorch revlib

It prints tables, and writes them and a JSON file with every number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from comparing.meters import Memory, measure_memory
from comparing.setting import Setting, keep_heap
from comparing.sides import FAST_PEERS, PLAIN, SIDES, Network, Side, importable_sides
from comparing.stacks import Comparison, Stack, compare, reason
from exact_report import Report

OURS = "invertible, compiled"


@dataclass(frozen=True)
class Config:
    """One measurement; every field is also a flag."""

    blocks: int = 8
    batch: int = 8
    width: int = 32  # channels of one stream; bottlenecks have a quarter
    sides: tuple[int, ...] = (4, 16, 32)  # of the images
    depths: tuple[int, ...] = (4, 8, 16, 32)  # at which the first step is timed
    seconds: float = 20  # of timing, for each size
    backend: str = "inductor"
    mode: str | None = None  # of torch.compile
    clock: Literal["wall", "cpu"] = "wall"  # "cpu" leaves out what other processes take
    threads: int = 1
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = Path(__file__).parent / "results" / "compiled"  # of .json and .txt


class First(NamedTuple):
    """The first step of a network, which compiles it."""

    seconds: float
    memory: Memory  # of the next step


def compiled(side: Side, config: Config, fullgraph: bool) -> Side:
    """A side whose network is compiled as a whole."""

    def make(fs: Sequence[torch.nn.Module]) -> Network:
        network: Any = side(fs)
        run: Callable[..., Any] = torch.compile(
            lambda x: network(x), backend=config.backend, mode=config.mode, fullgraph=fullgraph
        )
        return run

    return make


def sides(config: Config) -> dict[str, Side]:
    """Compiled and not; what all others are compared with is the compiled network that stores."""
    found, _ = importable_sides()
    chosen = {
        PLAIN: compiled(found[PLAIN], config, fullgraph=True),
        "stored, not compiled": found[PLAIN],
    }
    for name in ("checkpoint, blocks", "invertible", *FAST_PEERS):
        if name in found:
            # Peers may break the graph.
            chosen[f"{name}, compiled"] = compiled(found[name], config, name in SIDES)
            chosen[f"{name}, not compiled"] = found[name]
    return chosen


def stack(config: Config, depth: int, side: int) -> Stack:
    """Blocks of one size."""
    setting = Setting(config.device, clock=config.clock)
    return Stack(depth, config.batch, config.width, side, setting)


def measure(config: Config, side: int) -> Comparison:
    """All sides at one size."""
    torch._dynamo.reset()
    blocks = stack(config, config.blocks, side)
    fs = blocks.functions()
    networks = {name: make(list(fs)) for name, make in sides(config).items()}
    return compare(blocks.step(fs), networks, blocks=config.blocks, seconds=config.seconds)


def first_steps(config: Config, depth: int) -> dict[str, First | str]:
    """How long the first step takes, with nothing in the compiler's caches."""
    found: dict[str, First | str] = {}
    for name in (PLAIN, OURS):
        torch._dynamo.reset()
        blocks = stack(config, depth, config.sides[0])
        fs = blocks.functions()
        step, network = blocks.step(fs), sides(config)[name](list(fs))
        try:
            start = time.perf_counter()
            with torch._inductor.config.patch(force_disable_caches=True):
                step.backward(step.forward(network))
            seconds = time.perf_counter() - start
            found[name] = First(seconds, measure_memory(step, network))
        except Exception as error:
            found[name] = reason(error)
    return found


def tables(
    report: Report, found: Mapping[int, Comparison], first: Mapping[int, dict[str, First | str]]
) -> None:
    """A line for each size and side, and one for each depth."""
    report.table(
        f"A training step of {report.about['config']['blocks']} blocks over storing, compiled",
        ("images", "", "ms a block", "time", "held, MiB"),
        [
            (
                f"{side}x{side}",
                "stored, compiled" if name == PLAIN else name,
                f"{1e3 * row.step.median / comparison.blocks:.3f}",
                "{:.2f} ({:.2f} to {:.2f})".format(*row.over_plain),
                f"{row.memory.held / 2**20:.2f}",
            )
            for side, comparison in found.items()
            for name, row in comparison.rows.items()
        ],
    )
    report.table(
        "The first step, which compiles",
        ("blocks", "", "seconds", "held, MiB", "peak, MiB"),
        [
            (str(depth), "stored" if name == PLAIN else name, *_cells(one))
            for depth, both in first.items()
            for name, one in both.items()
        ],
    )


def _cells(one: First | str) -> tuple[str, str, str]:
    if isinstance(one, str):
        return one, "", ""
    held, peak, _ = one.memory
    return f"{one.seconds:.0f}", f"{held / 2**20:.2f}", f"{peak / 2**20:.2f}"


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes."""
    keep_heap()
    torch.set_num_threads(config.threads)
    report = Report(config)
    found: dict[int, Comparison] = {}
    first: dict[int, dict[str, First | str]] = {}
    for side in config.sides:
        found[side] = measure(config, side)
        report.write({"sizes": found, "first steps": first})
    for depth in config.depths:
        first[depth] = first_steps(config, depth)
        report.write({"sizes": found, "first steps": first})
    tables(report, found, first)
    report.write({"sizes": found, "first steps": first})
    return {"sizes": found, "first steps": first}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
