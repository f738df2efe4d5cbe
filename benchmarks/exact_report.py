"""What ``exact.py`` found: printed, and written to files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from comparing.meters import Spread
from comparing.report import about
from exact_cost import Cost
from exact_drift import Row
from exact_networks import Case, Found


class Tables:
    """Prints tables, in the simple form of reStructuredText, to be copied into documentation."""

    def __init__(self) -> None:
        self.tables: list[str] = []

    def note(self, line: Any) -> None:
        """Prints what is not worth keeping."""
        print(line, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table, and keeps it for the file."""
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        rule = "  ".join("=" * width for width in widths)
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        self.keep("\n".join([title, "", rule, lines[0], rule, *lines[1:], rule, ""]))

    def keep(self, text: str) -> None:
        """Prints what belongs into the file."""
        self.tables.append(text)
        print("\n" + text, flush=True)


class Report(Tables):
    """Writes the tables, with all numbers, to ``config.out``: .txt and .json."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.out: Path = config.out
        self.about = about(config)
        versions = ", ".join(f"{name} {v}" for name, v in self.about["versions"].items() if v)
        where = self.about["gpu"] or f"{self.about['processor']}, {self.about['cores']} cores"
        self.note(f"{where}, {self.about['threads']} threads; {versions}")

    def write(self, found: Mapping[str, Any]) -> None:
        """Writes both files anew."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        data = json.dumps(_data({"about": self.about, **found}), indent=1)
        self.out.with_suffix(".json").write_text(data + "\n")
        self.out.with_suffix(".txt").write_text("\n".join(self.tables))


def _data(x: Any) -> Any:
    """Named tuples and dataclasses as dictionaries."""
    if is_dataclass(x):
        return _data(vars(x))
    if hasattr(x, "_asdict"):
        return _data(x._asdict())
    if isinstance(x, Mapping):
        return {str(key): _data(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_data(value) for value in x]
    return str(x) if isinstance(x, Path) else x


def drift(report: Tables, rows: Sequence[Row]) -> None:
    """A line for each method and precision, two columns for each depth."""
    depths = sorted({row.depth for row in rows})
    lines: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        lines.setdefault((row.precision, row.method), {})[row.depth] = row
    for title, column in (
        ("Relative error of the rebuilt input in train mode", "reconstruction"),
        ("Relative error of the worst parameter gradient", "gradient"),
    ):
        report.table(
            f"{title}: median over the seeds, and the largest",
            ("state and f", "method", *(f"{depth} blocks" for depth in depths)),
            [
                (*line, *(_cell(by_depth.get(depth), column) for depth in depths))
                for line, by_depth in lines.items()
            ],
        )
    for row in rows:
        if row.failed:
            report.keep(f"{row.method}, {row.precision}, {row.depth} blocks: {row.failed}")
    if not all(error.same_output for row in rows for error in row.errors):
        report.keep("In some rows the stored network's output differs: see the JSON file.")


def _cell(row: Row | None, column: str) -> str:
    if row is None:
        return ""
    if row.failed:
        return "fails"
    values = [getattr(error, column) for error in row.errors]
    return f"{_number(statistics.median(values))} ({_number(max(values))})"


def _number(x: float) -> str:
    return "0" if x == 0 else f"{x:.1e}"


def networks(report: Tables, rows: Sequence[tuple[Case, Sequence[Found]]]) -> None:
    """A line for each network and mode."""
    report.table(
        "i-RevNets at initialisation, smallest and largest over the seeds",
        (
            "network",
            "f",
            "mode",
            "rebuilt, train mode",
            "rebuilt, eval mode",
            "images equal",
            "gradient",
            "gradients equal",
        ),
        [
            (
                f"{case.preset}, {case.batch} of {case.side}x{case.side}",
                "bfloat16" if case.autocast else "float32",
                "float" if case.quantum is None else "exact",
                _range([f.train_error for f in found]),
                _range([f.eval_error for f in found]),
                f"{sum(f.images_equal for f in found)} of {case.batch * len(found)}",
                _range([f.gradient_error for f in found]),
                f"{sum(f.gradients_equal for f in found)} of {sum(f.gradients for f in found)}",
            )
            for case, found in rows
        ],
    )


def _range(values: Sequence[float]) -> str:
    low, high = _number(min(values)), _number(max(values))
    return low if low == high else f"{low} to {high}"


def cost(report: Tables, found: Mapping[str, Cost], depth: int) -> None:
    """A line for each size of block."""
    report.table(
        "Time of a training step with rounding over the same step without: median, quartiles",
        ("block", "ms a block, stored", "activations stored", "activations rebuilt"),
        [
            (
                name,
                f"{1e3 * cost.steps['stored'].median / depth:.2f}",
                _spread(cost.stored),
                _spread(cost.rebuilt),
            )
            for name, cost in found.items()
        ],
    )


def _spread(x: Spread) -> str:
    return f"{x.median:.3f} ({x.low:.3f} to {x.high:.3f})"


def accuracy(report: Report, task: str, summary: Mapping[str, Any]) -> None:
    """Mean and spread by side."""
    report.table(
        f"{task}: test accuracy",
        ("", "runs", "mean, %", "deviation", "lowest", "highest"),
        [
            (side, str(s.runs), *(f"{100 * x:.2f}" for x in (s.mean, s.deviation, s.low, s.high)))
            for side, s in summary.items()
        ],
    )
