"""How well simple classifiers read the classes from features of a network: numbers and figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor

from analyses.analysis import (
    Settings,
    images,
    normalised,
    progress,
    provenance,
    save,
    short_names,
)
from errors import RunError, at_least
from presets import Classifier
from trainer.weights import Network

COSTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the SVM, to choose from
CHOICE = 3_000  # samples among which the cost is chosen
FOLDS = 3
# Okabe and Ito's, told apart by the colour-blind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

Samples = tuple[np.ndarray, np.ndarray]  # features (N, d) in float32, and classes from 0


@dataclass(frozen=True)
class ProbeSettings(Settings):
    """Flags of what probes the features of one network or several."""

    # One network or several, for one figure: each a run's folder, its checkpoint.pt, a .safetensors
    # file or the released .pth.tar; by default the latest run under runs/irevnet
    weights: tuple[Path, ...] = ()  # type: ignore[assignment]
    # Training images for both classifiers, evenly spread; None takes all
    train_limit: int | None = 20_000
    test_limit: int | None = 10_000  # Test images, evenly spread; None takes all

    def networks(self, console: Console) -> Iterable[Network]:
        """Each network in turn, the flags being right."""
        at_least(FOLDS, train_limit=self.train_limit)
        at_least(1, test_limit=self.test_limit)
        self.check()
        for path in self.weights or (None,):
            network = self.load(path)
            console.print(f"Probing {network.origin}.")
            yield network


@dataclass(frozen=True)
class Accuracy:
    """A share of finitely many images, 0 to 1."""

    value: float
    images: int

    def interval(self) -> tuple[float, float]:
        """Wilson's interval, which holds the share of all possible images in 95 % of cases."""
        right = round(self.value * self.images)
        found = binomtest(right, self.images).proportion_ci(method="wilson")
        # At a share of 0 or 1 an end is this very share, but for rounding.
        return min(float(found.low), self.value), max(float(found.high), self.value)

    def as_dict(self) -> dict[str, Any]:
        """The value and its interval, for JSON."""
        return {"accuracy": self.value, "interval": self.interval()}


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> Accuracy:
    """The share of predictions that are right."""
    return Accuracy(float((predicted == labels).mean()), len(labels))


@dataclass(frozen=True)
class Features:
    """What a network makes of images."""

    # the spatial average behind each chosen block, :math:`(N, C)` of its channels
    blocks: list[np.ndarray]
    labels: np.ndarray  # classes of the images, :math:`(N,)`
    own: Accuracy  # the network's own accuracy


def read_features(
    network: Network, settings: ProbeSettings, console: Console, depths: int | None
) -> tuple[list[int], int, Features, Features]:
    """Features of the training and of the test images.

    Args:
        network: Of which features are wanted.
        settings: Say which images.
        console: Shows the progress.
        depths: Behind how many blocks, evenly spread, the last included; None takes all.

    Returns:
        The numbers of the chosen blocks, from 1, and how many there are; and both features.
    """
    parts = {
        "training images": images(network, "train", settings.train_limit, classified=True),
        "test images": images(network, "test", settings.test_limit, classified=True),
    }
    first, _ = next(normalised(network, parts["test images"]))
    count = count_blocks(network.model, first)
    numbers = spread_blocks(count, depths)
    train, test = (
        gather(
            network.model,
            progress(normalised(network, batches), name, console, len(batches)),
            numbers,
        )
        for name, batches in parts.items()
    )
    return numbers, count, train, test


@torch.no_grad()
def gather(
    model: Classifier, batches: Iterable[tuple[Tensor, Tensor]], chosen: Sequence[int]
) -> Features:
    """Reads the images once; only averages are kept, and in main memory.

    Raises:
        RunError: If a feature is not finite.
    """
    averages: dict[int, list[Tensor]] = {block: [] for block in chosen}
    labels, predicted = [], []
    for x, classes in batches:
        for block, phi in enumerate(model.each_block(x), 1):
            if block in averages:
                averages[block].append(phi.mean((2, 3)).cpu())
        labels.append(classes.cpu())
        predicted.append(model.classify(phi).argmax(1).cpu())
    found = [torch.cat(averages.pop(block)).numpy() for block in chosen]
    for block, features in zip(chosen, found, strict=True):
        if not np.isfinite(features).all():
            raise RunError(
                f"the features behind block {block} are not finite: the network has diverged, or "
                "its images are not normalised as in its training."
            )
    truth = torch.cat(labels).numpy()
    return Features(found, truth, accuracy(torch.cat(predicted).numpy(), truth))


@torch.no_grad()
def count_blocks(model: Classifier, x: Tensor) -> int:
    """How many blocks the network has, seen on an image."""
    return sum(1 for _ in model.each_block(x[:1]))


def spread_blocks(count: int, wanted: int | None) -> list[int]:
    """Numbers from 1 of as many blocks as wanted, evenly spread, the last included."""
    wanted = count if wanted is None else min(wanted, count)
    return [count * step // wanted for step in range(1, wanted + 1)]


def standardised(train: Features, test: Features, index: int) -> tuple[Samples, Samples]:
    """Training and test samples behind a chosen block, standardised by the training images."""
    scaler = StandardScaler().fit(train.blocks[index])
    first, second = ((scaler.transform(p.blocks[index]), p.labels) for p in (train, test))
    return first, second


@dataclass(frozen=True)
class Probe:
    """What was read from some features."""

    svm: Accuracy  # of a linear support vector machine
    cost: float  # the SVM's cost, chosen by cross-validation
    nearest: Accuracy  # of the class of the nearest training sample

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "svm": self.svm.as_dict() | {"cost": self.cost},
            "nearest_neighbour": self.nearest.as_dict(),
        }


def probe(train: Samples, test: Samples, *, seed: int = 0) -> Probe:
    """Trains both classifiers and tests them; the seed is that of the choice of the cost."""
    cost = choose_cost(train, seed)
    svm = _linear_svm(cost).fit(*train)
    nearest = KNeighborsClassifier(1, algorithm="brute").fit(*train)
    x, labels = test
    return Probe(accuracy(svm.predict(x), labels), cost, accuracy(nearest.predict(x), labels))


def choose_cost(train: Samples, seed: int) -> float:
    """The SVM's cost of the best accuracy in cross-validation; the seed divides into folds."""
    x, labels = train
    count = min(CHOICE, len(x))
    chosen = np.arange(count) * len(x) // count  # spread: samples may be sorted by class
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    search = GridSearchCV(_linear_svm(), {"C": COSTS}, cv=folds, refit=False)
    return float(search.fit(x[chosen], labels[chosen]).best_params_["C"])


def _linear_svm(cost: float = 1.0) -> LinearSVC:
    # With more samples than features the primal problem is the quicker one. A tenth of this
    # tolerance takes a third longer, and changes the accuracy on CIFAR-10 by 0.2 % at most.
    return LinearSVC(C=cost, dual=False, tol=1e-2)


@dataclass(frozen=True)
class Curve:
    """How well the classes can be read from a network's features, along some axis."""

    network: Network  # the network
    test: Features  # its features of the test images
    at: Sequence[float]  # where each point is along the axis
    # about each point: whole numbers, and shares from 0 to 1 as floats
    facts: Sequence[Mapping[str, int | float]]
    probes: Sequence[Probe]  # of each point
    about: Mapping[str, Any]  # what else there is to write down

    @property
    def chance(self) -> float:
        """The accuracy of always guessing the most frequent class."""
        return float(np.bincount(self.test.labels).max() / len(self.test.labels))


def finish(
    curves: Sequence[Curve], settings: ProbeSettings, console: Console, name: str, **axis: Any
) -> None:
    """Prints a row for each point, and writes figure and numbers of several networks."""
    named = dict(zip(_names(curves), curves, strict=True))
    console.print(table(named))
    numbers = [
        provenance(settings, curve.network)
        | {"own": curve.test.own.as_dict(), "chance": curve.chance, **curve.about}
        | {"test_images": curve.test.own.images}
        | {
            "points": [
                {**facts, **each.as_dict()}
                for facts, each in zip(curve.facts, curve.probes, strict=True)
            ]
        }
        for curve in curves
    ]
    save(settings.out, name, draw(named, **axis), {"networks": numbers}, console)


def _names(curves: Sequence[Curve]) -> list[str]:
    names = short_names([(c.network.config.preset, c.network.path) for c in curves])
    # The same network twice.
    return [f"{n} #{i}" if names.count(n) > 1 else n for i, n in enumerate(names, 1)]


def table(curves: Mapping[str, Curve]) -> Table:
    """A row for each point."""
    facts = next(iter(curves.values())).facts[0]
    rows = Table("network", *facts, "SVM", "its cost", "1-NN")
    for column in rows.columns[1:]:
        column.justify = "right"
    for name, curve in curves.items():
        for values, each in zip(curve.facts, curve.probes, strict=True):
            shown = (f"{v:.1%}" if isinstance(v, float) else f"{v}" for v in values.values())
            svm, nearest = (f"{found.value:.2%}" for found in (each.svm, each.nearest))
            rows.add_row(name, *shown, svm, f"{each.cost:g}", nearest)
        rows.add_row(name, *("" for _ in facts), f"itself {curve.test.own.value:.2%}", "", "")
        rows.add_section()
    return rows


def draw(
    curves: Mapping[str, Curve], *, title: str, label: str, logarithmic: bool = False
) -> Figure:
    """Accuracies with intervals of 95 %, a colour for each network."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    handles: list[Any] = []
    for index, (name, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)]}
        for what, form, found in (
            ("linear SVM", "o-", [each.svm for each in curve.probes]),
            ("1-nearest neighbour", "s--", [each.nearest for each in curve.probes]),
        ):
            values = np.array([100 * each.value for each in found])
            ends = 100 * np.array([each.interval() for each in found]).T
            errors = np.abs(ends - values)
            options = style | {"fmt": form, "markersize": 4, "capsize": 2}
            handles.append(
                axes.errorbar(curve.at, values, errors, label=f"{name}, {what}", **options)
            )
        own = 100 * curve.test.own.value
        handles.append(
            axes.axhline(own, linestyle=":", linewidth=1, label=f"{name} itself", **style)
        )
    chance = 100 * next(iter(curves.values())).chance
    handles.append(axes.axhline(chance, linewidth=1, color="0.5", label="chance"))
    axes.set(title=title, xlabel=label, ylabel="test accuracy (%)", ylim=(0, 102))
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="0.9")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
