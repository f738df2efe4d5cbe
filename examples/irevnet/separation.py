"""Tells how well the classes are separated behind each block of a network, or of several.

    python examples/irevnet/separation.py --weights runs/irevnet/1 runs/irevnet/2

Figure 6 of the paper (https://arxiv.org/abs/1802.07088): a linear support vector machine and the
nearest neighbour classify the test images by the features behind each block, averaged over space
and standardised with the training images.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import analysis
from errors import RunError, at_least
from images.batches import Batches
from scripts import script
from trainer.weights import Network

PASSED = "share of the blocks passed"
COSTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the SVM, to choose from
CHOICE = 3_000  # samples among which the cost is chosen
FOLDS = 3
# Okabe and Ito's, told apart by the colour-blind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

Samples = tuple[np.ndarray, np.ndarray]  # features (N, d) in float32, and classes from 0
# The spatial average behind each chosen block, by its number from 1: (N, C) of its channels
Blocks = dict[int, np.ndarray]
# Facts about a point of a curve, features there of the training images and of the test images
Point = tuple[Mapping[str, int | float], np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ProbeSettings(analysis.Settings):
    """Flags of what probes the features of one network or several."""

    weights: tuple[Path, ...] = ()  # type: ignore[assignment]
    """Runs' folders or files of weights, for one figure; by default the latest run"""

    # Training images for both classifiers, evenly spread; None takes all
    train_limit: int | None = 20_000
    test_limit: int | None = 10_000  # Test images, evenly spread; None takes all


def run_probes(
    settings: ProbeSettings,
    name: str,
    depths: int | None,
    points: Callable[[Blocks, Blocks], Iterable[Point]],
    **axis: Any,
) -> None:
    """Probes each network, and writes figure and numbers of all under a name.

    Features are read behind so many blocks (``depths``), evenly spread; None takes all. Of those of
    training and test images, ``points`` says what is probed, and ``axis`` how it is drawn.
    """
    at_least(FOLDS, train_limit=settings.train_limit)
    at_least(1, test_limit=settings.test_limit)
    networks, found = [], []
    for path in settings.weights or (None,):
        network = settings.begin(path)
        networks.append((network.config.preset, network.path))
        found.append(curve(network, settings, depths, points))
    curves = dict(zip(analysis.short_names(networks), found, strict=True))
    rows = [{"network": label} | point for label in curves for point in curves[label]["points"]]
    analysis.print_table(rows)
    analysis.save(settings.out, name, draw(curves, **axis), {"networks": found})


def curve(
    network: Network,
    settings: ProbeSettings,
    depths: int | None,
    points: Callable[[Blocks, Blocks], Iterable[Point]],
) -> dict[str, Any]:
    """What can be written down of one network."""
    train = analysis.images(network, "train", classified=True).at_most(settings.train_limit)
    test = analysis.images(network, "test", classified=True).at_most(settings.test_limit)
    blocks, labels, _ = read_features(network, train, depths)
    test_blocks, test_labels, guesses = read_features(network, test, depths)
    probes = [
        {**facts, **probe((x, labels), (test_x, test_labels), settings.seed)}
        for facts, x, test_x in analysis.progress(points(blocks, test_blocks), "probing")
    ]
    return analysis.provenance(settings, network) | {
        "own": share(guesses, test_labels),
        # of always guessing the most frequent class
        "chance": np.bincount(test_labels).max() / len(test_labels),
        "blocks": max(blocks),
        "train_images": len(labels),
        "test_images": len(test_labels),
        "points": probes,
    }


@torch.no_grad()
def read_features(
    network: Network, batches: Batches, depths: int | None
) -> tuple[Blocks, np.ndarray, np.ndarray]:
    """Features, averaged over space and kept in main memory; classes, and those that are found."""
    read = []
    for x, labels in analysis.progress(batches.epoch(), "reading images", len(batches)):
        averages = []
        for phi in network.model.each_block(x):
            averages.append(phi.mean((2, 3)).cpu())
        numbers = spread_blocks(len(averages), depths)
        found = network.model.classify(phi).argmax(1)
        read.append([*(averages[number - 1] for number in numbers), labels.cpu(), found.cpu()])
    *features, classes, guesses = (torch.cat(each).numpy() for each in zip(*read, strict=True))
    blocks = dict(zip(numbers, features, strict=True))
    for block, each in blocks.items():
        if not np.isfinite(each).all():
            raise RunError(
                f"the features behind block {block} are not finite: the network has diverged, or "
                "its images are not normalised as in its training."
            )
    return blocks, classes, guesses


def spread_blocks(count: int, wanted: int | None) -> list[int]:
    """Numbers from 1 of as many blocks as wanted, evenly spread, the last included."""
    wanted = count if wanted is None else min(wanted, count)
    return [count * step // wanted for step in range(1, wanted + 1)]


def probe(train: Samples, test: Samples, seed: int) -> dict[str, Any]:
    """Trains both classifiers and tests them."""
    svm = linear_svm(train, seed)
    nearest = KNeighborsClassifier(1, algorithm="brute").fit(*train)
    x, labels = test
    return {
        "svm": share(svm.predict(x), labels) | {"cost": svm.C},
        "nearest_neighbour": share(nearest.predict(x), labels),
    }


def linear_svm(train: Samples, seed: int) -> LinearSVC:
    """The best cost is chosen by cross-validation; the seed divides into folds."""
    # With more samples than features the primal problem is the quicker one. A tenth of this
    # tolerance takes a third longer, and changes the accuracy on CIFAR-10 by 0.2 % at most.
    svm = LinearSVC(dual=False, tol=1e-2)
    x, labels = train
    count = min(CHOICE, len(x))
    chosen = np.arange(count) * len(x) // count  # spread: samples may be sorted by class
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    search = GridSearchCV(svm, {"C": COSTS}, cv=folds, refit=False)
    return svm.set_params(**search.fit(x[chosen], labels[chosen]).best_params_).fit(x, labels)


def share(predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The share of predictions that are right, and Wilson's interval of 95 % about it."""
    right = predicted == labels
    low, high = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    value = float(right.mean())
    # At a share of 0 or 1 an end is this very share, but for rounding.
    return {"accuracy": value, "interval": (min(low, value), max(high, value))}


def draw(curves: Mapping[str, Any], *, title: str, x: str, scale: str = "linear") -> Figure:
    """Accuracies with intervals of 95 % over a fact about the points, a colour for each network."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    handles: list[Any] = []
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        style: dict[str, Any] = {"color": colour, "markersize": 4, "capsize": 2}
        places = [point[x] for point in curve["points"]]
        for key, what, form in (
            ("svm", "linear SVM", "o-"),
            ("nearest_neighbour", "1-nearest neighbour", "s--"),
        ):
            shares = [point[key] for point in curve["points"]]
            values = np.array([100 * each["accuracy"] for each in shares])
            errors = np.abs(100 * np.array([each["interval"] for each in shares]).T - values)
            label = f"{name}, {what}"
            handles.append(axes.errorbar(places, values, errors, fmt=form, label=label, **style))
        own = 100 * curve["own"]["accuracy"]
        handles.append(axes.axhline(own, ls=":", lw=1, label=f"{name} itself", color=colour))
    handles.append(axes.axhline(100 * curve["chance"], lw=1, color="0.5", label="chance"))
    axes.set(title=title, xlabel=x, ylabel="test accuracy (%)", ylim=(0, 102), xscale=scale)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="0.9")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


@dataclass(frozen=True)
class Settings(ProbeSettings):
    """Tells how well the classes are separated behind each block of a network."""

    # Blocks behind which features are read, evenly spread, the last included; None takes all
    depths: int | None = 12


def points(train: Blocks, test: Blocks) -> Iterator[Point]:
    """The features behind each chosen block, standardised."""
    for block, x in train.items():
        scaler = StandardScaler().fit(x)
        facts = {"block": block, PASSED: block / max(train), "channels": x.shape[1]}
        yield facts, scaler.transform(x), scaler.transform(test[block])


@script
def main(settings: Settings) -> None:
    """Probes each network, and writes the results."""
    at_least(1, depths=settings.depths)
    title = "Classes read from each block"
    run_probes(settings, "separation", settings.depths, points, title=title, x=PASSED)


if __name__ == "__main__":
    raise SystemExit(main())
