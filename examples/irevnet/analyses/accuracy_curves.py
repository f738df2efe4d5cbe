"""Curves of the probes' accuracy for several networks: their table, figure and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from analyses.analysis import provenance
from analyses.block_features import Features, ProbeSettings
from analyses.probes import Accuracy, Probe
from trainer.weights import Network

# Okabe and Ito's, told apart by the colour-blind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Curve:
    """How well the classes can be read from a network's features, along some axis.

    Args:
        network: The network.
        features: Its features.
        at: Where each point is along the axis.
        facts: About each point: whole numbers, and shares from 0 to 1 as floats.
        probes: Of each point.
    """

    network: Network
    features: Features
    at: Sequence[float]
    facts: Sequence[Mapping[str, int | float]]
    probes: Sequence[Probe]

    @property
    def own(self) -> Accuracy:
        """The network's own accuracy."""
        return self.features.test.accuracy

    @property
    def chance(self) -> float:
        """The accuracy of always guessing the most frequent class."""
        labels = self.features.test.labels
        return float(np.bincount(labels).max() / len(labels))


def names(curves: Sequence[Curve]) -> list[str]:
    """The presets; with the weights' origin where two are of one preset."""
    presets = [curve.network.config.preset for curve in curves]
    return [
        preset if presets.count(preset) == 1 else curve.network.origin
        for preset, curve in zip(presets, curves, strict=True)
    ]


def numbers(curves: Sequence[Curve], settings: ProbeSettings) -> dict[str, Any]:
    """All that was found, for JSON."""
    return {
        "networks": [
            provenance(settings, curve.network)
            | {
                "own": curve.own.as_dict(),
                "chance": curve.chance,
                "blocks": curve.features.count,
                "train_images": len(curve.features.train.labels),
                "test_images": curve.own.images,
                "points": [
                    {**facts, **probe.as_dict()}
                    for facts, probe in zip(curve.facts, curve.probes, strict=True)
                ],
            }
            for curve in curves
        ]
    }


def show(curves: Sequence[Curve], console: Console) -> None:
    """Prints a row for each point."""
    facts = curves[0].facts[0]
    rows = Table("network", *facts, "SVM", "its cost", "1-NN")
    for column in rows.columns[1:]:
        column.justify = "right"
    for name, curve in zip(names(curves), curves, strict=True):
        for values, probe in zip(curve.facts, curve.probes, strict=True):
            rows.add_row(
                name,
                *(
                    f"{value:.1%}" if isinstance(value, float) else f"{value}"
                    for value in values.values()
                ),
                f"{probe.svm.value:.2%}",
                f"{probe.cost:g}",
                f"{probe.nearest.value:.2%}",
            )
        rows.add_row(name, *("" for _ in facts), f"itself {curve.own.value:.2%}", "", "")
        rows.add_section()
    console.print(rows)


def draw(curves: Sequence[Curve], title: str, axis: str, *, logarithmic: bool = False) -> Figure:
    """Accuracies with intervals of 95 %, a colour for each network."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    handles: list[Artist | Container] = []
    for index, (name, curve) in enumerate(zip(names(curves), curves, strict=True)):
        style = {"color": COLOURS[index % len(COLOURS)]}
        svm, nearest = zip(*((probe.svm, probe.nearest) for probe in curve.probes), strict=True)
        handles += [
            _line(axes, curve.at, svm, fmt="o-", label=f"{name}, linear SVM", **style),
            _line(
                axes, curve.at, nearest, fmt="s--", label=f"{name}, 1-nearest neighbour", **style
            ),
            _level(axes, curve.own.value, linestyle=":", label=f"{name} itself", **style),
        ]
    handles.append(_level(axes, curves[0].chance, color="0.5", label="chance"))
    axes.set(title=title, xlabel=axis, ylabel="test accuracy (%)", ylim=(0, 102))
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="0.9")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _line(axes: Axes, at: Sequence[float], found: Sequence[Accuracy], **style: Any) -> Container:
    values = [100 * accuracy.value for accuracy in found]
    intervals = [accuracy.interval() for accuracy in found]
    below = [value - 100 * low for value, (low, _) in zip(values, intervals, strict=True)]
    above = [100 * high - value for value, (_, high) in zip(values, intervals, strict=True)]
    return axes.errorbar(at, values, yerr=(below, above), markersize=4, capsize=2, **style)


def _level(axes: Axes, share: float, **style: Any) -> Artist:
    return axes.axhline(100 * share, linewidth=1, **style)
