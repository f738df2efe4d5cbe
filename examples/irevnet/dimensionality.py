"""Tells in how many dimensions a network's last features hold the classes.

For instance::

    python examples/irevnet/dimensionality.py --weights runs/irevnet/1

Figure 7 of the paper (https://arxiv.org/abs/1802.07088): a linear support vector machine and the
nearest neighbour classify the test images by the first principal components of the last features,
averaged over space and standardised; the components are those of the training images. The paper's
i-RevNet (b) on ImageNet needed about 200 of 3072.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from sklearn.decomposition import PCA

from analyses.accuracy_curves import Curve, draw, numbers, show
from analyses.analysis import progress, run_script, save
from analyses.block_features import ProbeSettings, read_features
from analyses.probes import Samples, probe
from trainer.weights import load_network


@dataclass(frozen=True)
class DimensionalitySettings(ProbeSettings):
    """Tells in how many dimensions a network's last features hold the classes."""


def dimensions(count: int) -> list[int]:
    """1, 2, 5, 10, ... below ``count``, then ``count``."""
    steps = (digit * 10**power for power in range(len(str(count))) for digit in (1, 2, 5))
    return [*(step for step in steps if step < count), count]


def first(count: int, samples: Samples) -> Samples:
    """The samples with so many of their features only."""
    return Samples(samples.x[:, :count], samples.labels)


def reduce(
    weights: Path | None, settings: DimensionalitySettings, device: torch.device, console: Console
) -> Curve:
    """Probes one network."""
    network = load_network(weights, device)
    console.print(f"Probing {network.origin}.")
    features = read_features(network, settings, device, console, depths=1)
    train, test = features.samples(0)
    pca = PCA().fit(train.x)
    parts = [Samples(pca.transform(part.x), part.labels) for part in (train, test)]
    counts = dimensions(pca.n_components_)
    probes = [
        probe(*(first(count, part) for part in parts), seed=settings.seed)
        for count in progress(counts, "probing", console)
    ]
    variance = pca.explained_variance_ratio_.cumsum().tolist()
    facts = [{"components": count, "of the variance": variance[count - 1]} for count in counts]
    return Curve(network, features, counts, facts, probes)


def run(settings: DimensionalitySettings, device: torch.device, console: Console) -> None:
    """Probes each network, and writes the results."""
    settings.check()
    curves = [reduce(path, settings, device, console) for path in settings.each_weights()]
    show(curves, console)
    title = "Classes read from the last features"
    figure = draw(curves, title, "principal components", logarithmic=True)
    paths = save(settings.out, "dimensionality", figure, numbers(curves, settings))
    console.print(f"Written: {', '.join(map(str, paths))}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script with these flags, or the command line's; returns the exit status."""
    return run_script(DimensionalitySettings, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
