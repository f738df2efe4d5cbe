"""What was measured, in tables, in a file and in a plot."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from rich.console import Console
from rich.table import Table

from .meters import Spread
from .networks import EndToEnd, Throughput
from .sides import OURS, PEERS, PLAIN, SIDES
from .stacks import Check, Comparison, Growth, NoGrad, Row

WIDTH = 160
RIGHT: dict[str, Any] = {"justify": "right"}  # a column of numbers


def about(config: Any) -> dict[str, Any]:
    """All that is needed to repeat a run."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "commit": _said_by(
            "git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"
        ),
        **(_about_gpu() if config.device.startswith("cuda") else {"gpu": None}),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name)
            for name in (
                *("torch", "invertible", "memcnn", "revtorch", "revlib"),
                *("FrEIA", "nflows", "normflows", "zuko"),
            )
        },
        "config": {name: value for name, value in asdict(config).items() if name != "out"},
    }


def _processor() -> str:
    """The name of the CPU."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _about_gpu() -> dict[str, Any]:
    """The device and what runs it."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _said_by(*query),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        # Where it is allowed, float32 means rounded to 10 bits inside of convolutions.
        "tf32 in convolutions": torch.backends.cudnn.allow_tf32,
    }


def _said_by(*command: str) -> str | None:
    """What a program prints, if it is there and succeeds."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def print_about(found: Mapping[str, Any]) -> None:
    """Machine, versions, and the peers that are missing."""
    facts = found["about"]
    threads = f"{facts['threads']} thread(s) for all sides, {facts['cores']} cores"
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items() if v)
    _print(f"{facts['processor']}, {threads}; Python {facts['python']}, {versions}")
    if facts["gpu"]:
        names = ("driver", "cuda", "cudnn", "tf32 in convolutions")
        _print(", ".join([facts["gpu"], *(f"{name} {facts[name]}" for name in names)]))
    for name, why in found["skipped"].items():
        _print(f"[yellow]skipped {name}[/]: {why}", highlight=False)


def print_comparison(title: str, comparison: Comparison) -> None:
    """Time and memory by side."""
    table = _table(
        f"{title}: {1e3 * comparison.block_seconds:.2f} ms a block in a plain step; the limit, one "
        f"more forward, is {_spread(comparison.limit)} of that step",
        *("step, ms", "over plain", "over the limit", "held, MiB", "peak, MiB", "left, MiB"),
    )
    for name, row in comparison.rows.items():
        table.add_row(
            name,
            _spread(row.step, 1e3, digits=1),
            _spread(row.over_plain),
            _spread(row.over_limit),
            *(f"{x / 2**20:.2f}" for x in row.memory),
        )
    _print(table)
    for name, why in comparison.failed.items():
        _print(f"[red]{name} failed[/]: {why}", highlight=False)


def print_growth(found: Mapping[str, Any]) -> None:
    """Memory against depth."""
    small, large = min(found["depths"]), max(found["depths"])
    table = _table(
        f"Memory from {small} to {large} blocks",
        "held per block, KiB",
        "of plain's",
        f"held, {large} over {small}",
        f"peak, {large} over {small}",
        "gradients waiting, blocks",
    )
    growths: dict[str, Growth] = found["growth"]
    for name, row in growths.items():
        table.add_row(
            name,
            f"{row.held_per_block / 2**10:.2f}",
            f"{row.share_of_plain:.2%}",
            f"{row.held_ratio:.2f}",
            f"{row.peak_ratio:.2f}",
            f"{found['gradients_held'].get(name, float('nan')):.1f}",
        )
    _print(table)


def print_checks(checks: Mapping[str, Check | str]) -> None:
    """Whether the sides compute the same."""
    table = _table(
        "Worst relative error of a gradient, and BatchNorm after one step",
        "float32",
        "to float64's",
        "float64",
        "statistics",
        "batches counted",
        "evaluations",
    )
    for name, row in checks.items():
        if isinstance(row, str):
            table.add_row(name, row)
            continue
        table.add_row(
            name,
            *(f"{x:.1e}" for x in (row.float32, row.float32_exact, row.float64)),
            "equal" if row.statistics else "differ",
            str(row.batches),
            f"{row.evaluations:.2f}",
        )
    _print(table)


def print_sizes(sizes: Mapping[str, Comparison]) -> None:
    """Time over plain's and over the limit, by the size of a block, and ours over the peers'."""
    table = _table("Time of a step over plain, and over the limit, by size and time of a block")
    for size, comparison in sizes.items():
        table.add_column(f"{size}: {1e3 * comparison.block_seconds:.2f} ms\nover plain", **RIGHT)
        table.add_column("over\nlimit", **RIGHT)
    names = dict.fromkeys(name for c in sizes.values() for name in c.rows)
    for name in names:
        rows = [comparison.rows.get(name) for comparison in sizes.values()]
        table.add_row(name, *(cell for row in rows for cell in _both_ratios(row)))
    table.add_section()
    limits = (cell for c in sizes.values() for cell in (_spread(c.limit), "1.000"))
    table.add_row("the limit", *limits)
    table.add_section()
    peers = dict.fromkeys(name for c in sizes.values() for name in c.over_peers)
    for name in peers:
        ratios = [comparison.over_peers.get(name) for comparison in sizes.values()]
        cells = (cell for ratio in ratios for cell in (_spread(ratio) if ratio else "", ""))
        table.add_row(f"{OURS} over {name}", *cells)
    _print(table)


def _both_ratios(row: Row | None) -> tuple[str, str]:
    return (_spread(row.over_plain), f"{row.over_limit.median:.3f}") if row else ("", "")


def print_without_grad(found: Mapping[str, NoGrad]) -> None:
    """What the composition itself costs."""
    table = _table(
        "InvertibleSequential without grad, over a loop by hand over the same layers",
        *(f"{size}: {1e3 * times.loop.median:.2f} ms" for size, times in found.items()),
    )
    table.add_row(OURS, *(_spread(times.ratio) for times in found.values()))
    _print(table)


def print_end_to_end(found: EndToEnd) -> None:
    """A whole network."""
    work = found.work
    title = f"i-RevNet {work.preset}, {work.batch} images of {work.side}x{work.side}"
    print_comparison(title, found.comparison)
    errors = ", ".join(f"{name} {error:.1e}" for name, error in found.errors.items())
    _print(f"relative error of all gradients: {errors}", highlight=False)


def print_throughput(title: str, found: Mapping[str, Throughput]) -> None:
    """Batches and images per second."""
    table = _table(title, "largest batch", "best batch", "images/s at it")
    for name, row in found.items():
        speed = row.images_per_second[row.best_batch]
        table.add_row(name, str(row.largest_batch), str(row.best_batch), f"{speed:.1f}")
    _print(table)


def _print(*parts: Any, **options: Any) -> None:
    Console(width=WIDTH).print(*parts, **options)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, **RIGHT)
    return table


def _spread(x: Spread, unit: float = 1, digits: int = 3) -> str:
    median, low, high = (f"{unit * value:.{digits}f}" for value in x)
    return f"{median} [dim]({low}-{high})[/]"


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Everything, with the times of every step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_data(found), indent=1) + "\n")


def _data(x: Any) -> Any:
    """Named tuples and dataclasses as dictionaries."""
    if isinstance(x, Comparison):
        names = ("block_seconds", "limit", "over_peers")
        derived = {name: getattr(x, name) for name in names}
        return _data(derived | vars(x))
    if is_dataclass(x):
        return _data(vars(x))
    if hasattr(x, "_asdict"):
        return _data(x._asdict())
    if isinstance(x, Mapping):
        return {str(key): _data(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_data(value) for value in x]
    return str(x) if isinstance(x, Path) else x


COLOURS = dict(zip([*SIDES, *PEERS], mpl.color_sequences["tab10"], strict=False))


def plot(path: Path, found: Mapping[str, Any]) -> None:
    """The time of a step over plain's against depth and size, over the limit, and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8.6), layout="constrained")  # letters are read on a page
    (deep, memory), (sizes, limits) = figure.subplots(2, 2)
    depths: dict[int, Comparison] = found["depths"]
    by_size: dict[str, Comparison] = {
        f"{size}\n{1e3 * comparison.block_seconds:.2f}": comparison
        for size, comparison in found["sizes"].items()
    }
    for name, colour in COLOURS.items():
        style = {"color": colour, "marker": "o", "linewidth": 3 if name == OURS else 1.3}
        rows = {depth: c.rows[name] for depth, c in depths.items() if name in c.rows}
        _ratios(deep, list(rows), [row.over_plain for row in rows.values()], label=name, **style)
        held = [row.memory.held / 2**20 for row in rows.values()]
        memory.plot(list(rows), held, **style)
        rows = {size: c.rows[name] for size, c in by_size.items() if name in c.rows}
        _ratios(sizes, list(rows), [row.over_plain for row in rows.values()], **style)
        if name != PLAIN:
            _ratios(limits, list(rows), [row.over_limit for row in rows.values()], **style)
    dashed = {"color": "k", "linestyle": "--"}
    label = "limit: plain + one forward"
    _ratios(deep, list(depths), [c.limit for c in depths.values()], label=label, **dashed)
    _ratios(sizes, list(by_size), [c.limit for c in by_size.values()], **dashed)
    limits.axhline(1, **dashed)
    deep.set(title="time of a step over plain's", xlabel="blocks")
    memory.set(title="held between forward and backward", xlabel="blocks", ylabel="MiB")
    for axes, what in ((sizes, "plain's"), (limits, "the limit")):
        title = f"time over {what}, {min(depths)} blocks"
        axes.set(title=title, xlabel="size, and ms a block in a plain step")
    memory.set_yscale("log")
    memory.yaxis.set_major_formatter("{x:g}")
    memory.yaxis.set_minor_formatter("")
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle(_caption(found["about"]), fontsize=10)
    figure.savefig(path, dpi=150)


def _ratios(axes: Any, x: Sequence[Any], y: Sequence[Spread], **style: Any) -> None:
    """Medians, with bars from quartile to quartile."""
    bars = [[s.median - s.low for s in y], [s.high - s.median for s in y]]
    axes.errorbar(x, [s.median for s in y], bars, capsize=2, **style)


def _caption(facts: Mapping[str, Any]) -> str:
    where = facts["gpu"] or f"{facts['processor']}, {facts['threads']} thread(s)"
    config = facts["config"]
    return (
        f"i-RevNet blocks, {config['width']} channels, batch {config['batch']}, "
        f"{config['side']}x{config['side']}, {config['dtype']}\n{where}, "
        f"{config['clock']} clock, torch {facts['versions']['torch']}"
    )
