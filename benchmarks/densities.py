r"""Densities learned beside FrEIA, nflows, normflows and zuko where installed, and their errors.

    python benchmarks/densities.py --clock cpu
    python benchmarks/densities.py --parts memory --device cuda --size 256 --depths 4 8 16 32 48 64

Three parts:

``learning``
    The architectures of ``flows.py``, with the same data, batches and number of steps for all
    sides, from the same seeds: affine couplings on handwritten digits, whose pixels are brought
    from 8x8 to 4 channels of 4x4, dequantised and between 0 and 1; and spline couplings on two
    moons. The log-likelihood of test examples, in nats a number, and the time of a step and of
    samples.
``errors``
    How far ``inverse(forward(x))`` is from ``x``, and log-determinants from those of float64, by
    depth and by the factor that all weights of sub-networks are multiplied with; in float32, and
    with sub-networks under bfloat16 autocast. NaN stands for values that are not finite.
``memory``
    Glow with three levels, as in the table that InvertibleNetworks.jl published of normflows and of
    itself (images of 256x256, batch 8, hidden 256): what is held between forward and backward, and
    the most of a step, by steps a level.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from comparing.meters import Memory, Spread
from comparing.setting import keep_heap
from densities_errors import Error, errors
from densities_learning import Learned, learning
from densities_memory import memory
from exact_report import Report
from flows import quiet

Part = Literal["learning", "errors", "memory"]


@dataclass(frozen=True)
class Config:
    """One measurement; every field is also a flag."""

    parts: tuple[Part, ...] = ("learning", "errors", "memory")
    seeds: int = 5  # of learning
    digit_steps: int = 500
    moon_steps: int = 1000
    depth: int = 4  # of what learns
    width: int = 32  # of its sub-networks
    batch: int = 128
    lr: float = 1e-3
    error_depths: tuple[int, ...] = (8, 16, 32, 64)
    factors: tuple[float, ...] = (1, 2, 3)  # of the weights
    depths: tuple[int, ...] = (4, 8, 16)  # steps a level, of the memory
    size: int = 64  # of its images
    images: int = 2
    hidden: int = 64
    clock: Literal["wall", "cpu"] = "wall"  # "cpu" leaves out what other processes take
    threads: int = 1
    device: str = "cpu"  # of the memory
    out: Path = Path(__file__).parent / "results" / "densities"  # of .json and .txt


# --- what is said of it


def spread(values: list[float]) -> str:
    """The mean, and the least and the most."""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def milliseconds(times: Spread) -> str:
    """The median and the quartiles."""
    return f"{1e3 * times.median:.1f} ({1e3 * times.low:.1f} to {1e3 * times.high:.1f})"


def say_learning(report: Report, found: dict[str, dict[str, Learned]]) -> None:
    """A row for each task and side."""
    rows = []
    for task, learned in found.items():
        for name, x in learned.items():
            times = milliseconds(x.step), milliseconds(x.sample)
            rows.append((task, name, spread(x.log_likelihood), *times))
    columns = ("", "", "log-likelihood", "step, ms", "1000 samples, ms")
    report.table("Log-likelihood of test examples, nats a number, over the seeds", columns, rows)


def say_errors(report: Report, found: list[Error]) -> None:
    """A row for each setting."""
    rows = [
        (*map(str, error[:3]), f"x{error.factor:g}", error.dtype, *(f"{e:.0e}" for e in error[5:]))
        for error in found
    ]
    columns = ("", "", "depth", "weights", "", "round trip", "log-determinant")
    report.table("Errors of a round trip, and of log-determinants against float64", columns, rows)


def say_memory(report: Report, found: dict[int, dict[str, Memory | str]], config: Config) -> None:
    """A row for each depth, stored and rebuilt."""
    rows = []
    for depth, ways in found.items():
        for name, x in ways.items():
            sizes = (x, "") if isinstance(x, str) else (f"{y / 2**20:.1f}" for y in x[:2])
            rows.append((str(depth), name, *sizes))
    title = f"Memory of Glow, {config.images} images of {config.size}x{config.size}, MiB"
    report.table(title, ("steps a level", "", "held", "peak"), rows)


def main(config: Config) -> None:
    """Measures, prints and writes."""
    keep_heap()
    torch.set_num_threads(config.threads)
    report = Report(config)
    found: dict[str, Any] = {}
    with quiet():
        if "learning" in config.parts:
            found["learning"] = learning(config)
            say_learning(report, found["learning"])
            report.write(found)
        if "errors" in config.parts:
            found["errors"] = list(errors(config))
            say_errors(report, found["errors"])
            report.write(found)
        if "memory" in config.parts:
            found["memory"] = memory(config)
            say_memory(report, found["memory"], config)
            report.write(found)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
