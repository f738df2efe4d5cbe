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
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from sklearn.decomposition import PCA

from analyses.analysis import progress
from analyses.probing import Curve, ProbeSettings, finish, probe, read_features, standardised
from scripts import run_script
from trainer.weights import Network


@dataclass(frozen=True)
class DimensionalitySettings(ProbeSettings):
    """Tells in how many dimensions a network's last features hold the classes."""


def dimensions(count: int) -> list[int]:
    """1, 2, 5, 10, ... below ``count``, then ``count``."""
    steps = (digit * 10**power for power in range(len(str(count))) for digit in (1, 2, 5))
    return [*(step for step in steps if step < count), count]


def reduce(network: Network, settings: DimensionalitySettings, console: Console) -> Curve:
    """Probes one network."""
    _, count, train, test = read_features(network, settings, console, depths=1)
    samples = standardised(train, test, 0)
    pca = PCA().fit(samples[0][0])
    components = [(pca.transform(x), labels) for x, labels in samples]
    counts = dimensions(pca.n_components_)
    probes = [
        probe(*((x[:, :first], labels) for x, labels in components), seed=settings.seed)
        for first in progress(counts, "probing", console)
    ]
    variance = pca.explained_variance_ratio_.cumsum().tolist()
    facts = [{"components": first, "of the variance": variance[first - 1]} for first in counts]
    about = {"blocks": count, "train_images": len(train.labels)}
    return Curve(network, test, counts, facts, probes, about)


def run(settings: DimensionalitySettings, console: Console) -> None:
    """Probes each network, and writes the results."""
    curves = [reduce(network, settings, console) for network in settings.networks(console)]
    axis = {"label": "principal components", "logarithmic": True}
    title = "Classes read from the last features"
    finish(curves, settings, console, "dimensionality", title=title, **axis)


main = partial(run_script, DimensionalitySettings, run)

if __name__ == "__main__":
    sys.exit(main())
