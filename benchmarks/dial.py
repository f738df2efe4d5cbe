r"""Time against memory: what a training step takes if more or less of it is stored.

    python benchmarks/dial.py --clock cpu

Reversible blocks of i-RevNet's bottlenecks and of transformers, at several sizes: everything
stored, everything rebuilt, and between them ``Rebuild(context_fn=keep_matmuls(...))``, which
stores the results of all products, or of those that took most computing for each number. Sides run
in turn in one process.

It prints a table, and writes it, a JSON file with every number, and a plot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from comparing.meters import Step
from comparing.setting import Setting, keep_heap
from comparing.sides import PLAIN
from comparing.stacks import Comparison, compare
from exact_report import Report
from torch import Tensor, nn
from torch.nn import functional as F

from invertible import (
    InvertibleSequential,
    Merge,
    Rebuild,
    ReversibleBlock,
    Split,
    keep_matmuls,
)

HEADS = 4


@dataclass(frozen=True)
class Config:
    """One measurement; every field is also a flag."""

    blocks: int = 6
    batch: int = 8
    channels: int = 64  # of one stream of images; bottlenecks have a quarter
    sides: tuple[int, ...] = (16, 32, 64)  # of the images
    width: int = 128  # of one stream of tokens
    tokens: tuple[int, ...] = (128, 512, 2048)  # a sequence
    seconds: float = 20  # of timing, for each size
    clock: Literal["wall", "cpu"] = "wall"  # "cpu" leaves out what other processes take
    threads: int = 1
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = Path(__file__).parent / "results" / "dial"  # of .json, .txt and .png


def bottleneck(channels: int) -> nn.Module:
    """i-RevNet's residual function, without its first norm."""
    inner = channels // 4
    return nn.Sequential(
        nn.Conv2d(channels, inner, 1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, channels, 1),
    )


class Attention(nn.Module):
    """Causal self-attention behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.project(self.norm(x)).view(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, t, d))


def feed_forward(width: int) -> nn.Module:
    """The other half of a transformer's block."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


@dataclass(frozen=True)
class Kind:
    """A kind of block, and how its states are cut into streams."""

    block: Callable[[int], ReversibleBlock]
    dearest: Callable[[int], int]  # flops per value of the products that compute most
    dim: int


KINDS = {
    "bottlenecks": Kind(
        lambda channels: ReversibleBlock(bottleneck(channels), bottleneck(channels)),
        lambda channels: 2 * channels,
        1,
    ),
    "transformers": Kind(
        lambda width: ReversibleBlock(Attention(width), feed_forward(width)),
        lambda width: 4 * width,
        -1,
    ),
}


def networks(kind: Kind, width: int, blocks: int) -> dict[str, InvertibleSequential]:
    """From everything stored to everything rebuilt, of the same weights."""
    torch.manual_seed(0)
    layers = [kind.block(width) for _ in range(blocks)]
    stored = InvertibleSequential(Split(dim=kind.dim), *layers, Merge(dim=kind.dim))
    dial = {
        PLAIN: False,
        "all products kept": Rebuild(context_fn=keep_matmuls()),
        "dearest products kept": Rebuild(context_fn=keep_matmuls(kind.dearest(width))),
        "rebuilt": True,
    }
    found = {name: copy.deepcopy(stored) for name in dial}
    for name, checkpoint in dial.items():
        found[name].checkpoint = checkpoint
    return found


def measure(kind: Kind, width: int, shape: tuple[int, ...], config: Config) -> Comparison:
    """All points of the dial in turn."""
    setting = Setting(config.device, clock=config.clock)
    sides = {
        name: net.to(config.device) for name, net in networks(kind, width, config.blocks).items()
    }
    torch.manual_seed(1)
    x, grad = (torch.randn(shape, device=config.device) for _ in range(2))
    parameters = [p for net in sides.values() for p in net.parameters()]
    step = Step(x.requires_grad_(), grad, parameters, setting)
    return compare(step, sides, blocks=config.blocks, seconds=config.seconds)


def cases(config: Config) -> Mapping[str, tuple[str, Callable[[], Comparison]]]:
    """By name: the kind of block, and what measures it."""
    images = {
        f"bottlenecks, {side}x{side}": (
            "bottlenecks",
            partial(
                measure,
                KINDS["bottlenecks"],
                config.channels,
                (config.batch, 2 * config.channels, side, side),
                config,
            ),
        )
        for side in config.sides
    }
    return images | {
        f"transformers, {count} tokens": (
            "transformers",
            partial(
                measure,
                KINDS["transformers"],
                config.width,
                (config.batch, count, 2 * config.width),
                config,
            ),
        )
        for count in config.tokens
    }


def table(report: Report, found: Mapping[str, Comparison]) -> None:
    """A line for each size and point of the dial."""
    report.table(
        f"A training step of {report.about['config']['blocks']} blocks over storing everything",
        ("blocks", "ms a block, stored", "", "held, MiB", "part of stored", "peak, MiB", "time"),
        [
            (
                size,
                f"{1e3 * comparison.block_seconds:.2f}",
                name,
                f"{row.memory.held / 2**20:.2f}",
                f"{row.memory.held / comparison.rows[PLAIN].memory.held:.3f}",
                f"{row.memory.peak / 2**20:.2f}",
                "{:.2f} ({:.2f} to {:.2f})".format(*row.over_plain),
            )
            for size, comparison in found.items()
            for name, row in comparison.rows.items()
        ],
    )


def plot(path: Path, found: Mapping[str, Comparison], kinds: Mapping[str, str]) -> None:
    """Time over memory, a line for each size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
        for size, comparison in found.items():
            if kinds[size] != kind:
                continue
            rows = comparison.rows
            held = [row.memory.held / rows[PLAIN].memory.held for row in rows.values()]
            time = [row.over_plain.median for row in rows.values()]
            label = f"{size.removeprefix(kind + ', ')}, {1e3 * comparison.block_seconds:.1f} ms"
            axes.plot(held, time, marker="o", label=label)
        axes.set(title=kind, xlabel="memory held, of stored")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(title="size, and time of a block")
    figure.axes[0].set_ylabel("time of a step, over stored")
    figure.savefig(path, dpi=150)


def main(config: Config) -> dict[str, Any]:
    """Measures, prints and writes."""
    keep_heap()
    torch.set_num_threads(config.threads)
    report = Report(config)
    todo, found = cases(config), dict[str, Comparison]()
    for size, (_, run) in todo.items():
        found[size] = run()
        report.write({"sizes": found})
    table(report, found)
    report.write({"sizes": found})
    plot(report.out.with_suffix(".png"), found, {size: kind for size, (kind, _) in todo.items()})
    return found


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
