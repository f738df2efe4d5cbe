"""The parts of ``gpu.py``. Each measures one thing after another, the most important first.

    python benchmarks/gpu_parts.py PART DEVICE FOLDER SECONDS

runs one part in this process, which ``gpu.py`` does for each.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import exact_cost
import exact_drift
import exact_networks
import exact_report
import torch
import training_step
from comparing import report
from comparing.networks import Workload, throughput
from comparing.setting import Setting, keep_heap
from comparing.sides import OURS, PLAIN, importable_sides, quiet_peers
from comparing.stacks import (
    Comparison,
    Stack,
    check,
    compare_stack,
    gradients_held,
    growth,
    reason,
    without_grad,
)
from rich.console import Console

Size = tuple[int, int, int]  # batch, channels of one stream, height and width of the images


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    device: str
    block: Size  # in the stacks that are compared by depth
    depths: tuple[int, ...]  # blocks, even numbers, ascending
    sizes: tuple[Size, ...]  # of blocks, in stacks of the least depth
    checked: Size  # of blocks whose gradients are compared, in float64 too
    heavy: int  # channels where weights are far heavier than activations
    networks: tuple[Workload, ...]
    largest: tuple[str, int, int]  # preset, side, no more images than this
    exact_networks: tuple[Workload, ...]
    drift_depths: tuple[int, ...]
    seeds: int  # of the weights, for drift


SCALES = {
    "cuda": Scale(
        device="cuda",
        block=(64, 256, 32),
        depths=(10, 100),
        sizes=((8, 32, 4), (8, 32, 8), (8, 32, 16), (8, 32, 32)),
        checked=(8, 32, 32),
        heavy=256,
        networks=(Workload("b", 64, 224), Workload("cifar10", 128, 32)),
        largest=("b", 224, 2**14),
        exact_networks=(Workload("cifar10", 16, 32), Workload("b", 4, 224)),
        drift_depths=(10, 100),
        seeds=2,
    ),
    "cpu": Scale(
        device="cpu",
        block=(2, 8, 8),
        depths=(2, 4),
        sizes=((2, 8, 4), (2, 4, 8)),
        checked=(2, 8, 8),
        heavy=32,
        networks=(Workload("digits", 4, 16),),
        largest=("digits", 32, 4),
        exact_networks=(Workload("digits", 4, 16),),
        drift_depths=(2,),
        seeds=1,
    ),
}
FLOATS = {"float32": None, "bfloat16": torch.bfloat16}  # by autocast


class Unit(NamedTuple):
    """One thing to measure."""

    name: str
    measure: Callable[[float], Any]  # times for so many seconds, prints, and gives what it found


class Part(NamedTuple):
    """What one process measures."""

    what: str
    share: int  # of the time
    units: Callable[[Scale], list[Unit]]


def stacks(scale: Scale) -> list[Unit]:
    """All sides by depth, in float32 and bfloat16, and whether they compute the same."""
    units = [unit for name in FLOATS for unit in _stacks(scale, name, Setting(scale.device))]
    return [*units, Unit("gradients", partial(_check, scale))]


def channels_last(scale: Scale) -> list[Unit]:
    """The same in the other memory format."""
    setting = Setting(scale.device, channels_last=True)
    return [unit for name in FLOATS for unit in _stacks(scale, name, setting)]


def compiled(scale: Scale) -> list[Unit]:
    """The same with compiled residual functions."""
    setting = Setting(scale.device, compiled=True)
    return [unit for name in FLOATS for unit in _stacks(scale, name, setting)]


def _stacks(scale: Scale, precision: str, setting: Setting) -> list[Unit]:
    setting = replace(setting, autocast=FLOATS[precision])
    by_depth: dict[int, Comparison] = {}

    def compare(depth: int, seconds: float) -> Comparison:
        found = compare_stack(Stack(depth, *scale.block, setting), _sides(), seconds)
        by_depth[depth] = found
        report.print_comparison(f"{precision}, {depth} blocks", found)
        return found

    def memory(_: float) -> dict[str, Any]:
        heavy = Stack(scale.depths[0], 1, scale.heavy, 2, setting)
        held = gradients_held(heavy, _sides())
        found = {"growth": growth(by_depth), "gradients_held": held}
        report.print_growth({"depths": by_depth, **found})
        return found

    comparisons = [Unit(f"{precision}, {d} blocks", partial(compare, d)) for d in scale.depths]
    return [*comparisons, Unit(f"{precision}, memory", memory)]


def _sides() -> dict[str, Any]:
    return importable_sides()[0]


def _check(scale: Scale, _: float) -> Any:
    found = check(Stack(scale.depths[0], *scale.checked, Setting(scale.device)), _sides())
    report.print_checks(found)
    return found


def sizes(scale: Scale) -> list[Unit]:
    """All sides by the size of a block; the tables of all sizes come after each."""
    compared: dict[str, Comparison] = {}
    setting = Setting(scale.device)

    def stack(size: Size) -> Stack:
        return Stack(scale.depths[0], *size, setting)

    def compare(size: Size, seconds: float) -> Comparison:
        compared[_name(size)] = compare_stack(stack(size), _sides(), seconds)
        report.print_sizes(compared)
        return compared[_name(size)]

    def loop(seconds: float) -> Any:
        found = {_name(size): without_grad(stack(size), seconds / 5) for size in scale.sizes}
        report.print_without_grad(found)
        return found

    units = [Unit(_name(size), partial(compare, size)) for size in scale.sizes]
    return [*units, Unit("without grad", loop)]


def _name(size: Size) -> str:
    batch, width, side = size
    return f"{batch}x{width}x{side}x{side}"


def whole_networks(scale: Scale) -> list[Unit]:
    """Training steps of i-RevNets, activations stored and rebuilt, float and exact."""

    def measure(work: Workload, precision: str, channels_last: bool, seconds: float) -> Any:
        config = training_step.Config(
            preset=work.preset,
            batch_size=work.batch,
            image_size=work.side,
            precision=precision,  # type: ignore[arg-type]
            channels_last=channels_last,
            device=scale.device,
            seconds=seconds,
            rounds=3,
        )
        rows = training_step.measure(config)
        Console(width=report.WIDTH).print(training_step.show(config, rows))
        return rows

    return [
        Unit(
            f"{work.preset}, {precision}{', channels_last' * last}",
            partial(measure, work, precision, last),
        )
        for precision, last in (("bfloat16", True), ("float32", False))
        for work in scale.networks
    ]


def largest_batch(scale: Scale) -> list[Unit]:
    """How many images fit on the GPU."""

    def measure(name: str, setting: Setting, _: float) -> Any:
        preset, side, at_most = scale.largest
        found = throughput(preset, side, name, setting, at_most=at_most)
        report.print_throughput(f"i-RevNet {preset}, {side}x{side}", {name: found})
        return found

    settings = {
        "float32": Setting(scale.device),
        "bfloat16, channels_last": Setting(scale.device, torch.bfloat16, channels_last=True),
    }
    return [
        Unit(f"{name}, {title}", partial(measure, name, setting))
        for title, setting in settings.items()
        for name in (PLAIN, OURS)
    ]


CUDNN = {  # name: flags of torch.backends.cudnn
    "benchmark off": {"benchmark": False, "deterministic": False},
    "benchmark on": {"benchmark": True, "deterministic": False},
    "deterministic": {"benchmark": False, "deterministic": True},
}


def exact(scale: Scale) -> list[Unit]:
    """Bits of gradients and images, the time of rounding, and drift without it."""
    tables = exact_report.Tables()

    def bits(work: Workload, autocast: bool, _: float) -> Any:
        case = exact_networks.Case(*work, exact_networks.QUANTUM, autocast, scale.device)
        rows = {}
        for name, flags in CUDNN.items():
            with _cudnn(flags):
                equal = exact_networks.equal_gradients(case, seed=0)
                rows[name] = (equal, exact_networks.measure(case, seed=0))
        tables.table(
            f"Exact mode, {work.preset}, {'bfloat16' if autocast else 'float32'}: tensors and "
            "images that agree in every bit",
            ("cuDNN", "gradients rebuilt", "gradients stored again", "images decoded", "buffers"),
            [
                (
                    name,
                    f"{equal.rebuilt} of {equal.gradients}",
                    f"{equal.stored_again} of {equal.gradients}",
                    f"{found.images_equal} of {work.batch}",
                    "equal" if found.buffers_equal else "differ",
                )
                for name, (equal, found) in rows.items()
            ],
        )
        return rows

    def cost(size: Size, seconds: float) -> Any:
        depth = scale.depths[0]
        found = exact_cost.measure(Stack(depth, *size, Setting(scale.device)), seconds)
        exact_report.cost(tables, {_name(size): found}, depth)
        return found

    def drift(depth: int, _: float) -> Any:
        blocks = exact_drift.Blocks(depth, 4, 8, 8, scale.device)
        rows = list(exact_drift.measure(blocks, importable_sides()[1], scale.seeds))
        exact_report.drift(tables, rows)
        return rows

    return [
        *(
            Unit(f"bits, {work.preset}, {name}", partial(bits, work, autocast is not None))
            for work in scale.exact_networks
            for name, autocast in FLOATS.items()
        ),
        *(Unit(f"cost, {_name(s)}", partial(cost, s)) for s in (scale.block, scale.sizes[-1])),
        *(Unit(f"drift, {depth} blocks", partial(drift, depth)) for depth in scale.drift_depths),
    ]


@contextmanager
def _cudnn(flags: dict[str, bool]) -> Iterator[None]:
    """Sets flags for a while."""
    before = {name: getattr(torch.backends.cudnn, name) for name in flags}
    _set_cudnn(flags)
    try:
        yield
    finally:
        _set_cudnn(before)


def _set_cudnn(flags: dict[str, bool]) -> None:
    for name, value in flags.items():
        setattr(torch.backends.cudnn, name, value)


PARTS = {  # in order of importance
    "stacks": Part(
        "time and memory of stacks of blocks, by depth, float32 and bfloat16", 4, stacks
    ),
    "sizes": Part("time with small blocks, beside the peers", 4, sizes),
    "networks": Part("training steps of whole i-RevNets", 4, whole_networks),
    "largest-batch": Part(
        "how many images fit on the GPU, and how fast they are", 4, largest_batch
    ),
    "exact": Part("exact mode: equal bits, the time of rounding, drift", 4, exact),
    "channels-last": Part("stacks of blocks in channels_last", 3, channels_last),
    "compiled": Part("stacks of blocks with compiled residual functions", 4, compiled),
}


def run(name: str, scale: Scale, out: Path, seconds: float) -> None:
    """Measures unit by unit; each gets an equal share of the time that is left.

    The record is written after each, and names what failed and what was not reached.
    """
    start = time.monotonic()
    units = PARTS[name].units(scale)
    command = f"python benchmarks/gpu_parts.py {name} {scale.device} FOLDER {seconds:.0f}"
    record: dict[str, Any] = {
        "about": report.about(scale) | {"command": command},
        "skipped": importable_sides()[1],
        "found": {},
        "failed": {},
        "missing": [unit.name for unit in units],
    }
    report.print_about(record)
    report.write_json(out / f"{name}.json", record)
    for i, unit in enumerate(units):
        spent = time.monotonic() - start
        if spent >= seconds:
            print("no time for", "; ".join(record["missing"]))
            break
        print(f"\n{name}, {spent:.0f} s: {unit.name}")
        try:
            # Half of it for timing: memory, warming up and building the network take time as well.
            record["found"][unit.name] = unit.measure((seconds - spent) / (len(units) - i) / 2)
        except Exception as error:  # the next may do better
            record["failed"][unit.name] = reason(error)
            traceback.print_exc()
        record["missing"].remove(unit.name)
        report.write_json(out / f"{name}.json", record)


if __name__ == "__main__":
    keep_heap()
    torch.set_num_threads(1)
    part, device, folder, seconds = sys.argv[1:]
    with quiet_peers():
        run(part, SCALES[device], Path(folder), float(seconds))
