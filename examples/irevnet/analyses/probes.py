"""How well simple classifiers read the classes from features: accuracies with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

COSTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the SVM, to choose from
CHOICE = 3_000  # samples among which the cost is chosen
FOLDS = 3


@dataclass(frozen=True)
class Samples:
    """Features of images and their classes.

    Args:
        x: float32 of shape :math:`(N, d)`.
        labels: Classes from 0, of shape :math:`(N,)`.
    """

    x: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Accuracy:
    """A share of finitely many images, 0 to 1.

    Args:
        value: The share.
        images: Of how many.
    """

    value: float
    images: int

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's interval, which holds the share of all possible images in 95 % of cases.

        References:
            Brown, Cai and DasGupta, *Interval estimation for a binomial proportion*
            (Statistical Science 2001), section 3.1.1.
        """
        n, p = self.images, self.value
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        # At a share of 0 or 1 an end is this very share, but for rounding.
        return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))

    def as_dict(self) -> dict[str, Any]:
        """The value and its interval, for JSON."""
        return {"accuracy": self.value, "interval": self.interval()}


@dataclass(frozen=True)
class Probe:
    """What was read from some features.

    Args:
        svm: Of a linear support vector machine.
        cost: The SVM's cost, chosen by cross-validation.
        nearest: Of the class of the nearest training sample.
    """

    svm: Accuracy
    cost: float
    nearest: Accuracy

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "svm": self.svm.as_dict() | {"cost": self.cost},
            "nearest_neighbour": self.nearest.as_dict(),
        }


def probe(train: Samples, test: Samples, *, seed: int = 0) -> Probe:
    """Trains both classifiers and tests them; the seed is that of the choice of the cost."""
    cost = choose_cost(train, seed)
    svm = _linear_svm(cost).fit(train.x, train.labels)
    nearest = KNeighborsClassifier(1, algorithm="brute").fit(train.x, train.labels)
    return Probe(
        svm=accuracy(svm.predict(test.x), test.labels),
        cost=cost,
        nearest=accuracy(nearest.predict(test.x), test.labels),
    )


def choose_cost(samples: Samples, seed: int) -> float:
    """The SVM's cost of the best accuracy in cross-validation; the seed divides into folds."""
    some = _spread(samples, CHOICE)
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    search = GridSearchCV(_linear_svm(), {"C": COSTS}, cv=folds, refit=False)
    return float(search.fit(some.x, some.labels).best_params_["C"])


def _linear_svm(cost: float = 1.0) -> LinearSVC:
    # With more samples than features the primal problem is the quicker one. A tenth of this
    # tolerance takes a third longer, and changes the accuracy on CIFAR-10 by 0.2 % at most.
    return LinearSVC(C=cost, dual=False, tol=1e-2)


def _spread(samples: Samples, count: int) -> Samples:
    """At most so many, evenly spread: the samples may be sorted by class."""
    count = min(count, len(samples.x))
    chosen = np.arange(count) * len(samples.x) // count
    return Samples(samples.x[chosen], samples.labels[chosen])


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> Accuracy:
    """The share of predictions that are right."""
    return Accuracy(float((predicted == labels).mean()), len(labels))
