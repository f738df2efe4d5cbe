"""Tells in how many dimensions a network's last features hold the classes.

    python examples/irevnet/dimensionality.py --weights runs/irevnet/1

Figure 7 of the paper (https://arxiv.org/abs/1802.07088): the classifiers of ``separation.py`` read
the first principal components of the last features, which are those of the training images.
"""

from collections.abc import Iterator

from sklearn.decomposition import PCA

import separation
from scripts import script
from separation import Blocks, Point, ProbeSettings


def dimensions(count: int) -> list[int]:
    """1, 2, 5, 10, ... below ``count``, then ``count``."""
    steps = (digit * 10**power for power in range(len(str(count))) for digit in (1, 2, 5))
    return [*(step for step in steps if step < count), count]


def points(train: Blocks, test: Blocks) -> Iterator[Point]:
    """The first principal components of the last features."""
    [(_, x, test_x)] = separation.points(train, test)
    pca = PCA().fit(x)
    x, test_x = pca.transform(x), pca.transform(test_x)
    variance = pca.explained_variance_ratio_.cumsum().tolist()
    for first in dimensions(pca.n_components_):
        facts = {"components": first, "of the variance": variance[first - 1]}
        yield facts, x[:, :first], test_x[:, :first]


@script
def main(settings: ProbeSettings) -> None:
    """Probes each network, and writes the results."""
    title = "Classes read from the first principal components of the last features"
    axis = {"title": title, "x": "components", "scale": "log"}
    separation.run_probes(settings, "dimensionality", 1, points, **axis)


if __name__ == "__main__":
    raise SystemExit(main())
