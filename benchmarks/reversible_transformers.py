r"""A training step of reversible transformers, against storing, checkpointing and the peers.

    python benchmarks/reversible_transformers.py --clock cpu

Blocks of attention and a feed-forward network, at several depths and lengths of the sequence.
All sides run the same sub-networks, and in turn in one process: storing activations,
``torch.utils.checkpoint`` around each block, this library in floating point and on a grid, and
RevTorch and revlib where they are installed. It also trains a small transformer on a grid, with
activations stored and rebuilt, and compares the losses.

It prints tables, and writes them and a JSON file with every number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from comparing.meters import Spread, Step
from comparing.setting import Setting, keep_heap
from comparing.sides import (
    OURS,
    PEERS,
    SIDES,
    Network,
    Side,
    checkpointed,
    importable_sides,
    layers,
    quiet_peers,
)
from comparing.stacks import Comparison, compare
from dial import Attention, feed_forward
from exact_report import Report
from torch import Tensor, nn

from invertible import AdditiveCoupling, InvertibleSequential, Quantize

QUANTUM = 2**-16
BLOCKS, EXACT = "checkpoint, blocks", "invertible, exact"


@dataclass(frozen=True)
class Config:
    """One measurement; every field is also a flag."""

    depths: tuple[int, ...] = (6, 12, 24, 48)  # blocks of attention and feed-forward network
    lengths: tuple[int, ...] = (128, 512, 1024)  # tokens, at the least depth
    width: int = 128  # features of one stream
    batch: int = 4
    seconds: float = 5  # of timing, for each size
    losses: int = 200  # steps over which exact training is compared; 0 for none
    clock: Literal["wall", "cpu"] = "wall"  # "cpu" leaves out what other processes take
    threads: int = 1
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = Path(__file__).parent / "results" / "transformers"  # of .json and .txt


class Tokens(nn.Module):
    """A sub-network of tokens, for sides that cut streams ``(N, 1, T, D)`` of ``(N, 2, T, D)``."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.f(x.squeeze(1))
        return y.unsqueeze(1)


def sub_networks(depth: int, width: int) -> nn.ModuleList:
    """Attention and feed-forward network in turn."""
    torch.manual_seed(0)
    return nn.ModuleList(
        Tokens(f) for _ in range(depth) for f in (Attention(width), feed_forward(width))
    )


def exact(fs: Sequence[nn.Module], checkpoint: bool = True) -> InvertibleSequential:
    """This library's stack on a grid."""
    stack = [
        AdditiveCoupling(layer.f, quantum=QUANTUM) if isinstance(layer, AdditiveCoupling) else layer
        for layer in layers(fs)
    ]
    return InvertibleSequential(Quantize(QUANTUM), *stack, checkpoint=checkpoint)


def sides() -> dict[str, Side]:
    """Those that run here; MemCNN evaluates a sub-network once more than all others."""
    found, _ = importable_sides()
    own = {**SIDES, BLOCKS: lambda fs: checkpointed(fs, 2)}
    del own["checkpoint, segments"]
    peers = {name: side for name, side in found.items() if name in PEERS and name != "MemCNN"}
    return {**own, EXACT: exact, **peers}


def measure(depth: int, length: int, config: Config) -> Comparison:
    """All sides at one size."""
    setting = Setting(config.device, clock=config.clock)
    fs = sub_networks(depth, config.width).to(config.device)
    torch.manual_seed(1)
    shape = config.batch, 2, length, config.width
    x, grad = (torch.randn(shape, device=config.device) for _ in range(2))
    step = Step(x.requires_grad_(), grad, list(fs.parameters()), setting)
    with quiet_peers():
        networks: dict[str, Network] = {name: side(list(fs)) for name, side in sides().items()}
        return compare(step, networks, blocks=depth, seconds=config.seconds)


def over_checkpointing(comparison: Comparison) -> dict[str, Spread]:
    """The time of our steps over those of checkpointing each block, by the round."""
    rows = comparison.rows
    return {
        name: Spread.of(
            [a.step / b.step for a, b in zip(rows[name].times, rows[BLOCKS].times, strict=True)]
        )
        for name in (OURS, EXACT)
        if name in rows and BLOCKS in rows
    }


def losses(config: Config, checkpoint: bool) -> list[float]:
    """Of a small transformer on a grid that learns to copy, by stochastic gradient descent."""
    fs = sub_networks(3, 32)
    network = exact(fs, checkpoint)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    found = []
    for number in range(config.losses):
        torch.manual_seed(number)
        x = torch.randn(8, 2, 16, 32)
        loss = (network(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def tables(report: Report, found: Mapping[str, Comparison]) -> None:
    """A line for each size and side."""
    report.table(
        f"A training step of transformers {report.about['config']['width']} wide",
        (
            *("blocks, tokens", "ms a block, stored", "", "held, MiB", "peak, MiB"),
            *("over stored", "over checkpointing each block"),
        ),
        [
            (
                size,
                f"{1e3 * comparison.block_seconds:.1f}",
                name,
                f"{row.memory.held / 2**20:.1f}",
                f"{row.memory.peak / 2**20:.1f}",
                "{:.2f} ({:.2f} to {:.2f})".format(*row.over_plain),
                "{:.2f} ({:.2f} to {:.2f})".format(*over[name]) if name in over else "",
            )
            for size, comparison in found.items()
            for over in [over_checkpointing(comparison)]
            for name, row in comparison.rows.items()
        ],
    )
    for size, comparison in found.items():
        for name, why in comparison.failed.items():
            report.keep(f"{name}, {size}: {why}")


def main(config: Config) -> None:
    """Measures, prints and writes."""
    keep_heap()
    torch.set_num_threads(config.threads)
    report = Report(config)
    least = min(config.depths), min(config.lengths)
    sizes = [(depth, least[1]) for depth in config.depths]
    sizes += [(least[0], length) for length in config.lengths if length != least[1]]
    found: dict[str, Any] = {"sizes": {}}
    for depth, length in sizes:
        found["sizes"][f"{depth}, {length}"] = measure(depth, length, config)
        report.write(found)
    tables(report, found["sizes"])
    if config.losses:
        stored, rebuilt = (losses(config, checkpoint) for checkpoint in (False, True))
        same = sum(a == b for a, b in zip(stored, rebuilt, strict=True))
        found["losses"] = {"stored": stored, "rebuilt": rebuilt}
        report.keep(
            f"On a grid, {same} of {config.losses} losses are the same bit for bit with "
            f"activations stored and rebuilt: the first is {stored[0]:.4g}, the last "
            f"{stored[-1]:.4g}."
        )
    report.write(found)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
