"""Reversible checkpointing against storing activations, torch.utils.checkpoint and its peers.

    python benchmarks/checkpointing.py

prints tables and writes a JSON file with every time measured, and a plot. Times come as ratios:
*over plain*, what rebuilding costs, is a step's time over that of the step that stores everything,
*over the limit* over that step with one more forward. Sides run in turn, and ratios are those of
one round, their medians and quartiles shown. It needs the extra ``examples``. The peers take part
where they are installed:

    pip install --no-deps memcnn revtorch revlib

``--help`` lists the settings, ``--end-to-end`` adds whole i-RevNets.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from comparing import report
from comparing.setting import Setting, keep_heap
from comparing.sides import OURS, PLAIN, importable_sides, quiet_peers
from comparing.stacks import Stack, check, compare_stack, gradients_held, growth, without_grad


@dataclass(frozen=True)
class Config:
    """One run; every field is also a flag."""

    depths: tuple[int, ...] = (10, 30, 100)  # blocks in the stack, even numbers
    batch: int = 8
    width: int = 32  # channels of one stream
    side: int = 32  # height and width of the images
    other_sides: tuple[int, ...] = (4, 8, 16)  # for blocks of other sizes, least depth only
    seconds: float = 12  # of timing for each stack
    clock: Literal["wall", "cpu"] = "wall"  # "cpu", with 1 thread, where other processes run too
    threads: int = 1  # of the CPU; 0 leaves it to torch
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is autocast, states in float32
    channels_last: bool = False
    compile: bool = False  # the residual functions
    end_to_end: bool = False  # also time and memory of whole i-RevNets
    largest_batch: bool = False  # also the largest batch of i-RevNet (b) that fits a GPU
    out: Path = Path(__file__).parent / "results" / "checkpointing"  # of .json and .png


def run(config: Config) -> dict[str, Any]:
    """Measures and prints; returns all that was found."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    autocast = torch.bfloat16 if config.dtype == "bfloat16" else None
    setting = Setting(config.device, autocast, config.channels_last, config.compile, config.clock)
    sides, skipped = importable_sides()
    found: dict[str, Any] = {"about": report.about(config), "skipped": skipped}
    report.print_about(found)

    def stack(depth: int, side: int = config.side) -> Stack:
        return Stack(depth, config.batch, config.width, side, setting)

    found["depths"] = {}
    for depth in config.depths:
        found["depths"][depth] = compare_stack(stack(depth), sides, config.seconds)
        report.print_comparison(f"{depth} blocks", found["depths"][depth])

    if len(config.depths) > 1:
        found["growth"] = growth(found["depths"])
        # Weights that are far heavier than the activations.
        heavy = Stack(10, batch=1, width=8 * config.width, side=2, setting=setting)
        found["gradients_held"] = gradients_held(heavy, sides)
        report.print_growth(found)

    found["checks"] = check(stack(max(config.depths)), sides)
    report.print_checks(found["checks"])

    found |= {"sizes": {}, "without_grad": {}}
    for side in sorted({config.side, *config.other_sides}):
        small = stack(min(config.depths), side)
        size = f"{side}x{side}"
        found["sizes"][size] = compare_stack(small, sides, config.seconds)
        found["without_grad"][size] = without_grad(small, config.seconds / 4)
    report.print_sizes(found["sizes"])
    report.print_without_grad(found["without_grad"])

    if config.end_to_end:
        found["end_to_end"] = measure_presets(config, setting)
    if config.largest_batch:
        found["largest_batch"] = measure_largest_batch(setting)
    return found


def measure_presets(config: Config, setting: Setting) -> list[Any]:
    """The i-RevNets for CIFAR-10 and ImageNet."""
    from comparing.networks import CPU_WORKLOADS, GPU_WORKLOADS, measure

    found = []
    for work in CPU_WORKLOADS if setting.device == "cpu" else GPU_WORKLOADS:
        found.append(measure(work, setting, config.seconds))
        report.print_end_to_end(found[-1])
    return found


def measure_largest_batch(setting: Setting) -> dict[str, Any]:
    """How far the memory of a GPU goes for i-RevNet (b) on images of ImageNet's size."""
    from comparing.networks import throughput

    found = {name: throughput("b", 224, name, setting) for name in (PLAIN, OURS)}
    report.print_throughput("i-RevNet b, 224x224", found)
    return found


def main(config: Config) -> None:
    """Measures, prints and writes."""
    if config.largest_batch and config.device == "cpu":
        sys.exit("--largest-batch asks how many images fit on a GPU: there is none here.")
    if config.clock == "cpu" and (config.device != "cpu" or config.threads != 1):
        sys.exit(
            "--clock cpu adds up all threads and knows of no GPU: it needs one thread on a CPU."
        )
    with quiet_peers():
        found = run(config)
    report.write_json(config.out.with_suffix(".json"), found)
    report.plot(config.out.with_suffix(".png"), found)


if __name__ == "__main__":
    import tyro

    keep_heap()
    main(tyro.cli(Config, description=__doc__))
