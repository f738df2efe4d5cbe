"""Draws the training loss and the test accuracy of runs, one over the other.

As in figure 3 of the paper, the loss is a moving average over 100 steps:

    python examples/irevnet/curves.py runs/irevnet/1 runs/irevnet/2 --out curves.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from matplotlib.figure import Figure

from analysis import short_names
from errors import RunError, try_writing, writing
from experiment.folder import read_log, read_settings
from scripts import script

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
    names = short_names([(read_settings(folder)["preset"], folder) for folder in folders])
    logs = [read_log(folder) for folder in folders]
    try_writing(path)
    loss, accuracy = figure.subplots(1, 2)
    for name, records in zip(names, logs, strict=True):
        steps, means = smoothed([each for r in records for each in r.get("losses", [])])
        # A point for each step, or a line through means.
        loss.plot(steps, means, "." if 1 in steps else "-", label=name, linewidth=1)
        tests = {r["iteration"]: 100 * r["test_accuracy"] for r in records if "test_accuracy" in r}
        accuracy.plot(list(tests), list(tests.values()), ".-", label=name, linewidth=1)
    loss_label = f"training loss, mean of {WINDOW} steps\n(points: of each step)"
    for axes, label in ((loss, loss_label), (accuracy, "test accuracy, top 1, %")):
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
    if len(folders) > 1:
        accuracy.legend()
    with writing(path):
        figure.savefig(path, dpi=120)


def smoothed(losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The last of each window of steps, and the mean loss in it; of few steps, the loss of each."""
    window = WINDOW if len(losses) >= 2 * WINDOW else 1
    steps = np.arange(window, len(losses) + 1)
    return steps, np.convolve(losses, np.full(window, 1 / window), "valid") if losses else steps


@script
def main(settings: Settings) -> None:
    """Draws what is asked for."""
    if not settings.folders:
        raise RunError("give the folders of runs, as runs/irevnet/1.")
    draw_curves(settings.folders, settings.out)
    print(f"Drawn: {settings.out}")


if __name__ == "__main__":
    raise SystemExit(main())
