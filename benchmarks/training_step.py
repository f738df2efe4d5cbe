r"""Time and memory of a training step of the networks in examples/irevnet.

    python benchmarks/training_step.py --preset b --batch-size 64 --image-size 224 \
        --precision bfloat16 --channels-last --device cuda

A step is forward, loss, backward and SGD with momentum, on random images that are on the device
already. Activations are stored or rebuilt, states are floating or exact, all in turn in one
process, so that what slows the machine slows all of them. It prints a table and adds its record to
a JSON file. ``--profile`` tells where the time goes, ``--help`` lists the settings.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from comparing import report
from comparing.meters import (
    Memory,
    Spread,
    Step,
    interleave,
    measure_memory,
    old_objects_frozen,
    time_step,
)
from comparing.setting import Setting, keep_heap
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parents[1] / "examples" / "irevnet"))
from presets import PRESETS
from trainer.optimisation import compile_blocks

QUANTUM = 2**-16
IMAGENET = 1_281_167  # training images
# name: what the preset is given
KINDS: dict[str, dict[str, Any]] = {
    "stored, float": {"checkpoint": False, "quantum": None},
    "stored, exact": {"checkpoint": False, "quantum": QUANTUM},
    "rebuilt, float": {"checkpoint": True, "quantum": None},
    "rebuilt, exact": {"checkpoint": True, "quantum": QUANTUM},
}


@dataclass(frozen=True)
class Config:
    """One measurement; every field is also a flag."""

    preset: Literal[tuple(PRESETS)] = "b"  # type: ignore[valid-type]
    batch_size: int = 64  # images in a step
    image_size: int = 224  # height and width
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is autocast
    channels_last: bool = False
    compile: bool = False  # the blocks
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1  # of the CPU; 0 leaves it to torch
    clock: Literal["wall", "cpu"] = "wall"  # "cpu", with 1 thread, where other processes run too
    rounds: int = 5  # of timing at least
    seconds: float = 30  # of timing at least
    profile: bool = False  # also where the time of a step goes
    epochs: int = 128  # of ImageNet, for the projection
    gpus: int = 1  # for the projection
    out: Path = Path(__file__).parent / "results" / "irevnet.json"


class StepTimes(NamedTuple):
    """Seconds that a step took."""

    forward: float  # with the loss
    backward: float
    update: float  # by the optimizer


class Training:
    """A network in training.

    Args:
        config: The measurement.
        kind: What the preset is given.
    """

    def __init__(self, config: Config, kind: Mapping[str, Any]) -> None:
        torch.manual_seed(0)
        autocast = torch.bfloat16 if config.precision == "bfloat16" else None
        self.setting = Setting(config.device, autocast, config.channels_last, clock=config.clock)
        self.model = self.setting.module(PRESETS[config.preset].build(**kind))
        if config.compile:
            compile_blocks(self.model)
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)
        side = config.image_size
        x = self.setting.images(config.batch_size, self.model.in_channels, side, side)
        self.labels = torch.arange(config.batch_size, device=x.device) % 10
        self.one_step = Step(x, torch.ones((), device=x.device), parameters, self.setting)

    def loss(self, x: Tensor) -> Tensor:
        """Of the images."""
        return F.cross_entropy(self.model(x), self.labels)

    def run(self) -> StepTimes:
        """Trains for a step."""
        times = time_step(self.one_step, self.loss)
        start = self._now()
        self.optimizer.step()
        return StepTimes(*times, self._now() - start)

    def memory(self) -> Memory:
        """What a step needs besides weights, gradients and momentum."""
        return measure_memory(self.one_step, self.loss)

    def state_bytes(self) -> int:
        """Of weights, gradients, momentum and statistics."""
        weights = sum(p.nbytes for p in self.one_step.parameters)
        return 3 * weights + sum(buffer.nbytes for buffer in self.model.buffers())

    def _now(self) -> float:
        self.setting.wait()
        return self.setting.now()


class Row(NamedTuple):
    """One kind of training."""

    step: Spread  # seconds
    over_stored: Spread  # its step over that of the first kind, by the round
    images_per_second: float  # by the median
    projected_hours: float
    memory: Memory  # bytes besides the state
    state_bytes: int  # weights, gradients, momentum and statistics
    times: list[StepTimes]


def measure(config: Config) -> dict[str, Row]:
    """All kinds of training that the network has, the first without anything of ours."""
    # What a ResNet stores could not be rebuilt.
    kinds = {"stored, float": {}} if config.preset.startswith("resnet") else KINDS
    trainings = {name: Training(config, kind) for name, kind in kinds.items()}
    with old_objects_frozen():
        memory = {name: training.memory() for name, training in trainings.items()}
    tasks = {name: training.run for name, training in trainings.items()}
    times = interleave(tasks, config.seconds, min_rounds=config.rounds)
    first = [sum(step) for step in next(iter(times.values()))]
    rows = {}
    for name, own in times.items():
        steps = [sum(step) for step in own]
        speed = config.batch_size / Spread.of(steps).median
        rows[name] = Row(
            Spread.of(steps),
            Spread.of([a / b for a, b in zip(steps, first, strict=True)]),
            speed,
            config.epochs * IMAGENET / (speed * config.gpus) / 3600,
            memory[name],
            trainings[name].state_bytes(),
            own,
        )
    return rows


class Profile(NamedTuple):
    """Where the time of a step goes, the profiler's own included."""

    kind: str
    seconds: float
    share_outside: float  # of the time, in which no kernel (on the CPU: no operator) runs
    table: str  # of the operators that take the most time


def profile_step(config: Config) -> Profile:
    """Profiles a step: an exact one that rebuilds, if the network has it."""
    resnet = config.preset.startswith("resnet")
    name = "stored, float" if resnet else "rebuilt, exact"
    training = Training(config, {} if resnet else KINDS[name])
    for _ in range(3):
        training.run()
    cuda = config.device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        training.run()
        seconds = time.perf_counter() - start
    events = profiler.key_averages()
    by = "self_device_time_total" if cuda else "self_cpu_time_total"
    busy = sum(getattr(event, by) for event in events if _computes(event, cuda)) / 1e6
    table = events.table(sort_by=by, row_limit=15, max_name_column_width=60)
    return Profile(name, seconds, 1 - busy / seconds, table)


def _computes(event: Any, cuda: bool) -> bool:
    if not cuda:
        return event.key.startswith(("aten::", "mkldnn"))
    # The optimizer marks its kernels as a whole, too.
    on_device = event.device_type == torch.autograd.DeviceType.CUDA
    return on_device and not event.key.startswith("Optimizer.")


def show(config: Config, rows: Mapping[str, Row]) -> Table:
    """The rows of a measurement."""
    table = Table(
        title=f"{config.preset}, {config.batch_size} images of {config.image_size}x"
        f"{config.image_size}, {config.precision}, {config.device}",
        title_justify="left",
    )
    hours = f"hours for {config.epochs} epochs of ImageNet, {config.gpus} such"
    columns = ("step, ms", "over stored", "images/s", "peak, MiB", "with state, MiB", hours)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            _spread(row.step, 1e3, digits=1),
            _spread(row.over_stored),
            f"{row.images_per_second:.1f}",
            f"{row.memory.peak / 2**20:,.0f}",
            f"{(row.memory.peak + row.state_bytes) / 2**20:,.0f}",
            f"{row.projected_hours:,.1f}",
        )
    return table


def _spread(x: Spread, unit: float = 1, digits: int = 3) -> str:
    median, low, high = (f"{unit * value:.{digits}f}" for value in x)
    return f"{median} [dim]({low}-{high})[/]"


def add_record(path: Path, name: str, record: Mapping[str, Any]) -> None:
    """Adds a measurement to those in the file, in place of one of the same name."""
    found = json.loads(path.read_text()) if path.exists() else {}
    report.write_json(path, {**found, name: record})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    import tyro  # here, since gpu.py does without

    config = tyro.cli(Config, description=__doc__, args=arguments)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    rows = measure(config)
    table = show(config, rows)
    Console(width=report.WIDTH).print(table)
    record: dict[str, Any] = {
        "about": report.about(config),
        "rows": rows,
        "projection": "assumes that each device is as fast as this one in a step, that no image is "
        "waited for, and counts no tests",
    }
    if config.profile:
        record["profile"] = found = profile_step(config)
        print(
            f"{found.kind}: in {found.share_outside:.0%} of a step no kernel runs (on the CPU: no "
            f"operator)\n{found.table}"
        )
    add_record(config.out, str(table.title), record)


if __name__ == "__main__":
    keep_heap()
    main()
