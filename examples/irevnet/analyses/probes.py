"""How well simple classifiers read the classes from features: accuracies with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analyses.linear_svm import choose_cost, fit_svm

CHOICE = 10_000  # samples among which the SVM's cost is chosen
SCORED = 500  # test samples whose distances to all training samples are in memory at once


@dataclass(frozen=True)
class Samples:
    """Features of images and their classes.

    Args:
        x: float32 of shape :math:`(N, d)`.
        labels: Classes from 0, of shape :math:`(N,)`.
    """

    x: Tensor
    labels: Tensor


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
        converged: Whether the SVM reached its minimum.
        nearest: Of the class of the nearest training sample.
    """

    svm: Accuracy
    cost: float
    converged: bool
    nearest: Accuracy

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "svm": self.svm.as_dict() | {"cost": self.cost, "converged": self.converged},
            "nearest_neighbour": self.nearest.as_dict(),
        }


def probe(train: Samples, test: Samples, classes: int, *, seed: int = 0) -> Probe:
    """Trains both classifiers and tests them; the seed is that of the choice of the cost."""
    some = _spread(train, CHOICE)
    cost = choose_cost(some.x, some.labels, classes, seed=seed)
    svm = fit_svm(train.x, train.labels, classes, cost)
    return Probe(
        svm=accuracy(svm.predict(test.x), test.labels),
        cost=cost,
        converged=svm.converged,
        nearest=accuracy(nearest_neighbour(train, test.x), test.labels),
    )


def accuracy(predicted: Tensor, labels: Tensor) -> Accuracy:
    """The share of predictions that are right."""
    return Accuracy((predicted == labels).double().mean().item(), len(labels))


def nearest_neighbour(train: Samples, x: Tensor) -> Tensor:
    """The class of the training sample that is nearest to each row of ``x``."""
    # |x - t|^2 / 2 up to |x|^2 / 2, which is the same for all t.
    half = train.x.square().sum(1) / 2
    nearest = [torch.addmm(half, part, train.x.T, alpha=-1).argmin(1) for part in x.split(SCORED)]
    return train.labels[torch.cat(nearest)]


def _spread(samples: Samples, count: int) -> Samples:
    """At most so many, evenly spread: the samples may be sorted by class."""
    chosen = torch.linspace(0, len(samples.x) - 1, min(count, len(samples.x))).long()
    return Samples(samples.x[chosen], samples.labels[chosen])


def standardised(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Features of mean 0 and deviation 1 in ``train``, the others shifted and scaled alike.

    A feature that is the same in all of ``train`` is shifted only.
    """
    deviation, mean = torch.std_mean(train, 0)
    scale = torch.where((train == train[0]).all(0), 1.0, deviation)
    return tuple((x - mean) / scale for x in (train, *others))
