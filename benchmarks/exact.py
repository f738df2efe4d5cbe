"""What exact mode gives, and what it costs.

    python benchmarks/exact.py drift
    python benchmarks/exact.py irevnet
    python benchmarks/exact.py cost
    python benchmarks/exact.py accuracy --cifar10 FOLDER

Each prints tables, and writes them beside a JSON file with everything measured, machine and
versions included. ``--help`` lists the settings. It needs the extra ``examples``; ``--cifar10``
needs pyarrow, and a folder with ``train.parquet`` and ``test.parquet`` as the Hugging Face hub has
them. MemCNN and RevTorch take part in ``drift`` where they are installed:

    pip install --no-deps memcnn revtorch
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import exact_accuracy
import exact_cost
import exact_drift
import exact_networks
import exact_report
import torch
import tyro
from comparing.setting import Setting
from comparing.sides import importable_sides, quiet_peers
from comparing.stacks import Stack
from exact_networks import Case
from exact_report import Report

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Drift:
    """Errors of rebuilt inputs and of gradients, by depth and precision."""

    depths: tuple[int, ...] = (10, 100, 1000)  # blocks, even numbers
    batch: int = 4
    width: int = 8  # channels of one stream
    side: int = 8  # height and width of the images
    seeds: int = 5  # of the weights
    threads: int = 1
    device: str = DEVICE
    out: Path = RESULTS / "exact_drift"  # of .json and .txt

    def run(self, report: Report) -> dict[str, Any]:
        """Depth by depth."""
        skipped = importable_sides()[1]
        rows: list[exact_drift.Row] = []
        found = {"skipped": skipped, "rows": rows}
        for depth in self.depths:
            blocks = exact_drift.Blocks(depth, self.batch, self.width, self.side, self.device)
            for row in exact_drift.measure(blocks, skipped, self.seeds):
                report.note(f"{row.depth} blocks, {row.precision}: {row.method}")
                rows.append(row)
            report.write(found)
        exact_report.drift(report, rows)
        return found


@dataclass(frozen=True)
class Networks:
    """i-RevNets at initialisation: CIFAR-10's, and (b) at ImageNet's size."""

    presets: tuple[Literal["cifar10", "b", "digits"], ...] = ("cifar10", "b")
    cifar10_batch: int = 16
    imagenet_batch: int = 2
    seeds: int = 3  # of the weights and the images; for (b) one
    threads: int = 1
    device: str = DEVICE
    out: Path = RESULTS / "exact_irevnet"  # of .json and .txt

    def run(self, report: Report) -> dict[str, Any]:
        """With the grid and without it, in float32 and under autocast."""
        batches = {"cifar10": self.cifar10_batch, "b": self.imagenet_batch, "digits": 16}
        sides = {"cifar10": 32, "b": 224, "digits": 16}
        rows: list[tuple[Case, list[exact_networks.Found]]] = []
        for preset in self.presets:
            for autocast in (False, True):
                for quantum in (None, exact_networks.QUANTUM):
                    case = Case(
                        preset, batches[preset], sides[preset], quantum, autocast, self.device
                    )
                    seeds = range(1 if preset == "b" else self.seeds)
                    rows.append((case, [exact_networks.measure(case, seed) for seed in seeds]))
                    report.note(rows[-1])
                    report.write({"rows": rows})
        exact_report.networks(report, rows)
        return {"rows": rows}


@dataclass(frozen=True)
class Cost:
    """Time of a training step with rounding over the same without."""

    depth: int = 20  # blocks
    batch: int = 4
    sizes: tuple[tuple[int, int], ...] = ((32, 8), (32, 32))  # channels of a stream, image side
    seconds: float = 40  # for each size
    clock: Literal["wall", "cpu"] = "wall"  # "cpu" leaves out what other processes take
    threads: int = 1
    device: str = DEVICE
    out: Path = RESULTS / "exact_cost"  # of .json and .txt

    def run(self, report: Report) -> dict[str, Any]:
        """Size by size."""
        found: dict[str, exact_cost.Cost] = {}
        for width, side in self.sizes:
            setting = Setting(self.device, clock=self.clock)
            stack = Stack(self.depth, self.batch, width, side, setting)
            found[f"{width} channels, {side}x{side}"] = exact_cost.measure(stack, self.seconds)
            report.write(found)
        exact_report.cost(report, found, self.depth)
        return found


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy with rounding and without, over several seeds."""

    digits_seeds: int = 6
    digits_epochs: int = 20
    cifar10: Path | None = None  # folder of the parquet files; without it, digits alone
    cifar10_seeds: int = 3
    cifar10_epochs: int = 4
    cifar10_images: int = 12_800  # for training, 0 for all
    cifar10_test_images: int = 5_000
    cifar10_blocks: tuple[int, ...] = (2, 2, 2)
    processes: int = 2  # of one thread each
    threads: int = 1
    device: Literal["cpu"] = "cpu"
    out: Path = RESULTS / "exact_accuracy"  # of .json and .txt

    def run(self, report: Report) -> dict[str, Any]:
        """Trains digits, then CIFAR-10."""
        tasks = [(exact_accuracy.digits_task(self.digits_epochs), self.digits_seeds)]
        if self.cifar10:
            cifar10 = exact_accuracy.cifar10_task(
                self.cifar10,
                blocks=self.cifar10_blocks,
                images=self.cifar10_images,
                test_images=self.cifar10_test_images,
                epochs=self.cifar10_epochs,
            )
            tasks.append((cifar10, self.cifar10_seeds))
        found = {}
        for task, seeds in tasks:
            outcomes = exact_accuracy.train_all(task, seeds, self.processes, report.note)
            summary = exact_accuracy.summarise(outcomes)
            found[task.name] = {"summary": summary, "runs": outcomes}
            exact_report.accuracy(report, task.name, summary)
            report.write(found)
        return found


Config = Drift | Networks | Cost | Accuracy
COMMANDS = {"drift": Drift, "irevnet": Networks, "cost": Cost, "accuracy": Accuracy}


def main(config: Config) -> None:
    """Measures, prints and writes."""
    torch.set_num_threads(config.threads)
    report = Report(config)
    with quiet_peers():
        report.write(config.run(report))


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__))
