"""Draws the training loss and the test accuracy of runs, one over the other.

As in figure 3 of the paper, the loss is a moving average over 100 steps::

    python examples/irevnet/curves.py runs/irevnet/1 runs/irevnet/2 --out curves.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from experiment.folder import SETTINGS, RunError, read_log, writing

CURVES = "curves.png"
WINDOW = 100  # steps


@dataclass(frozen=True)
class Settings:
    """Which runs are drawn, and where to."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""

    out: Path = Path(CURVES)
    """The picture: .png, .pdf or .svg."""


def draw_curves(folders: Sequence[Path], path: Path) -> None:
    """Draws the curves of runs into one picture.

    Args:
        folders: Those of the runs; each must have a log.
        path: The picture, of the type that its name ends in.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for folder in folders:
        records = read_log(folder)
        label = _name(folder)
        loss.plot(*smoothed_losses(records), label=label, linewidth=1)
        accuracy.plot(*accuracies(records), ".-", label=label, linewidth=1)
    loss.set_ylabel(f"training loss, mean of {WINDOW} steps")
    accuracy.set_ylabel("test accuracy, top 1, %")
    for axes in (loss, accuracy):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    if len(folders) > 1:
        accuracy.legend()
    with writing(path):
        figure.savefig(path, dpi=120)


def smoothed_losses(records: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The last of each window of steps, and the mean loss in it."""
    losses = np.array([loss for record in records for loss in record.get("losses", [])])
    window = min(WINDOW, max(1, len(losses)))  # a short run has one mean
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    means = (sums[window:] - sums[:-window]) / window
    return np.arange(window, len(losses) + 1), means


def accuracies(records: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """The step of each test, and its accuracy in percent."""
    tests = [record for record in records if "test_accuracy" in record]
    return [t["iteration"] for t in tests], [100 * t["test_accuracy"] for t in tests]


def _name(folder: Path) -> str:
    """What a run is called in the legend."""
    try:
        preset = json.loads((folder / SETTINGS).read_text())["preset"]
    except (OSError, ValueError, KeyError):
        return str(folder)
    return f"{preset} ({folder})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script with these flags, or the command line's; returns the exit status."""
    try:
        settings = tyro.cli(Settings, args=arguments, description=__doc__)
        draw_curves(settings.folders, settings.out)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Drawn: {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
