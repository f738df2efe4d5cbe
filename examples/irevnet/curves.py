"""Draws the training loss and the test accuracy of runs, one over the other.

As in figure 3 of the paper, the loss is a moving average over 100 steps::

    python examples/irevnet/curves.py runs/irevnet/1 runs/irevnet/2 --out curves.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from analyses.analysis import short_names
from errors import RunError, try_writing, writing
from experiment.folder import read_log, read_settings
from scripts import run_script

CURVES = "curves.png"
WINDOW = 100  # steps


@dataclass(frozen=True)
class Settings:
    """Which runs are drawn, and where to."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]  # Folders of runs
    out: Path = Path(CURVES)  # The picture: .png, .pdf, .svg or whatever else matplotlib draws


def draw_curves(folders: Sequence[Path], path: Path) -> None:
    """Draws the curves of runs into one picture."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise RunError(f"cannot draw {path}: its name must end in one of {', '.join(kinds)}.")
    loss, accuracy = figure.subplots(1, 2)
    logs = [read_log(folder) for folder in folders]
    try_writing(path)
    for name, records in zip(short_names(list(map(_known, folders))), logs, strict=True):
        steps, means = smoothed_losses(records)
        form = "." if 1 in steps else "-"  # of each step, or a mean
        loss.plot(steps, means, form, label=name, linewidth=1)
        accuracy.plot(*accuracies(records), ".-", label=name, linewidth=1)
    loss.set_ylabel(f"training loss, mean of {WINDOW} steps\n(points: of each step)")
    accuracy.set_ylabel("test accuracy, top 1, %")
    for axes in (loss, accuracy):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    if len(folders) > 1:
        accuracy.legend()
    with writing(path):
        figure.savefig(path, dpi=120)


def smoothed_losses(records: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The last of each window of steps, and the mean loss in it; of few steps, the loss of each."""
    losses = np.array([loss for record in records for loss in record.get("losses", [])])
    if len(losses) < 2 * WINDOW:
        return np.arange(1, len(losses) + 1), losses
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    return np.arange(WINDOW, len(losses) + 1), (sums[WINDOW:] - sums[:-WINDOW]) / WINDOW


def accuracies(records: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """The step of each test, and its accuracy in percent."""
    tests = [record for record in records if "test_accuracy" in record]
    return [t["iteration"] for t in tests], [100 * t["test_accuracy"] for t in tests]


def _known(folder: Path) -> tuple[str, Path]:
    """Preset and path of a run."""
    try:
        return read_settings(folder)["preset"], folder
    except (RunError, KeyError):
        return "run", folder


def run(settings: Settings, console: Console) -> None:
    """Draws what is asked for."""
    if not settings.folders:
        raise RunError("give the folders of runs, as runs/irevnet/1.")
    draw_curves(settings.folders, settings.out)
    console.print(f"Drawn: {settings.out}")


main = partial(run_script, Settings, run)

if __name__ == "__main__":
    sys.exit(main())
