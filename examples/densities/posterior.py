"""Simulation-based inference: a posterior learned from simulations, beside the true one.

For instance::

    python examples/densities/posterior.py --out runs/posterior
    python examples/densities/posterior.py --out runs/moons --task two-moons

A conditional flow learns the density of parameters given an observation, from pairs of both that
are simulated as it trains. Of both tasks the posterior is known:

``linear-gaussian``
    Parameters from a standard normal in 3 dimensions, 5 observed numbers which are a fixed matrix
    times these, and noise.
``two-moons``
    The benchmark's (Lueckmann et al. 2021, https://arxiv.org/abs/2101.04653, T.8): for each
    observation two crescents.

Recorded are the Kullback-Leibler divergence of the learned posterior from the true one, averaged
over observations; ``c2st``, how well a classifier tells samples of the two apart, 0.5 being not at
all; and how far ranks of true parameters among samples are from uniform, with what is by chance.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from sklearn.model_selection import cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.distributions import MultivariateNormal
from vectors import Batch, Kind, fit, make_flow, mean_and_error, write_record

from invertible import Flow


@dataclass(frozen=True)
class Config:
    """Simulation-based inference: a posterior learned from simulations, beside the true one."""

    out: Path  # Folder of record.json and the pictures
    task: Literal["linear-gaussian", "two-moons"] = "linear-gaussian"
    flow: Kind = "spline-coupling"
    depth: int = 4  # Steps of the flow
    width: int = 64  # Of its networks
    bins: int = 8  # Of its splines
    steps: int = 1500  # Of training
    batch_size: int = 512  # Simulations a step
    lr: float = 2e-3  # Learning rate of Adam, falling to 0
    observations: int = 3  # How many posteriors are compared by a classifier
    samples: int = 1000  # How many of each
    seed: int = 0


class Task(ABC):
    """A prior and a simulator of which the posterior is known."""

    parameters: int
    observed: int

    @abstractmethod
    def simulate(self, count: int) -> tuple[Tensor, Tensor]:
        """Draws parameters from the prior, and an observation of each."""

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """The same, where :meth:`log_posterior` holds."""
        return self.simulate(count)

    @abstractmethod
    def log_posterior(self, theta: Tensor, x: Tensor) -> Tensor:
        """The logarithm of the posterior's density at parameters, each given its observation."""

    @abstractmethod
    def sample_posterior(self, count: int, x: Tensor) -> Tensor:
        """Draws parameters given a single observation."""


class LinearGaussian(Task):
    r"""A normal prior and a normal likelihood: :math:`x = A \theta + 0.5 n`."""

    parameters, observed, noise = 3, 5, 0.5

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(self.observed, self.parameters, generator=generator) / 2

    def simulate(self, count: int) -> tuple[Tensor, Tensor]:
        theta = torch.randn(count, self.parameters)
        return theta, theta @ self.matrix.T + self.noise * torch.randn(count, self.observed)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        a = self.matrix / self.noise**2
        precision = torch.eye(self.parameters) + self.matrix.T @ a
        return MultivariateNormal((x @ a) @ precision.inverse(), precision_matrix=precision)

    def log_posterior(self, theta: Tensor, x: Tensor) -> Tensor:
        found: Tensor = self.posterior(x).log_prob(theta)
        return found

    def sample_posterior(self, count: int, x: Tensor) -> Tensor:
        return self.posterior(x).sample((count,))


class TwoMoons(Task):
    r"""Half a thin ring, moved by the parameters; of one of them only the size is seen.

    With :math:`u = (\theta_1 + \theta_2) / \sqrt 2` and :math:`v = (\theta_2 - \theta_1) / \sqrt 2`,
    :math:`x = (r \cos \alpha + 0.25 - |u|, r \sin \alpha + v)`.
    """

    parameters = observed = 2
    radius, thickness = 0.1, 0.01

    def ring(self, count: int) -> Tensor:
        r = self.radius + self.thickness * torch.randn(count)
        alpha = math.pi * (torch.rand(count) - 0.5)
        return torch.stack([r * alpha.cos() + 0.25, r * alpha.sin()], 1)

    def simulate(self, count: int) -> tuple[Tensor, Tensor]:
        theta = 2 * torch.rand(count, 2) - 1
        u, v = turned(theta).unbind(1)
        return theta, self.ring(count) + torch.stack([-u.abs(), v], 1)

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """Where both crescents lie within the prior, and apart from each other."""
        theta, x = self.simulate(8 * count)
        u, v = turned(theta).unbind(1)
        inside = (u.abs() > 0.2) & (u.abs() + v.abs() < 0.9)
        return theta[inside][:count], x[inside][:count]

    def log_posterior(self, theta: Tensor, x: Tensor) -> Tensor:
        """Half of the ring's density at what the parameters leave of the observation."""
        u, v = turned(theta).unbind(1)
        first, second = (x + torch.stack([u.abs() - 0.25, -v], 1)).unbind(1)
        r = torch.hypot(first, second)
        normal = -((r - self.radius) / self.thickness).square() / 2
        found = normal - (r * self.thickness * math.sqrt(2 * math.pi) * math.pi).log() - math.log(2)
        return found.where(first > 0, -math.inf)

    def sample_posterior(self, count: int, x: Tensor) -> Tensor:
        first, second = (self.ring(count) - x).unbind(1)
        sign = 2 * torch.randint(2, (count,)) - 1
        return turned(torch.stack([first * sign, -second], 1), back=True)


def turned(theta: Tensor, back: bool = False) -> Tensor:
    """The sum and the difference of both parameters, as a rotation; or these from them."""
    a, b = theta.unbind(1)
    parts = (a - b, a + b) if back else (a + b, b - a)
    return torch.stack(parts, 1) / math.sqrt(2)


TASKS: dict[str, type[Task]] = {"linear-gaussian": LinearGaussian, "two-moons": TwoMoons}


def c2st(a: Tensor, b: Tensor, seed: int) -> float:
    """Accuracy of a classifier between two sets of samples, five-fold cross-validated."""
    both = torch.cat([a, b])
    both = (both - b.mean(0)) / b.std(0)
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(a), len(b)]))
    width = 10 * a.shape[1]
    classifier = MLPClassifier((width, width), max_iter=200, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it could go on to converge
        scores = cross_val_score(classifier, both.numpy(), labels.numpy(), cv=_folds(seed))
    return float(scores.mean())


def _folds(seed: int):
    from sklearn.model_selection import StratifiedKFold

    return StratifiedKFold(5, shuffle=True, random_state=seed)


@torch.no_grad()
def ranks(flow: Flow, task: Task, count: int = 500, samples: int = 99) -> Tensor:
    """How many of the samples given an observation are below the true parameters, as a share."""
    theta, x = task.simulate(count)
    drawn = flow.sample((samples,), x)
    return (drawn < theta).float().mean(0)


def furthest(shares: Tensor) -> Tensor:
    """How far the distribution of shares is from uniform, at most; by parameter."""
    ordered = shares.sort(0).values
    expected = torch.arange(1, len(shares) + 1) / len(shares)
    return (ordered - expected[:, None]).abs().amax(0)


def draw_posterior(true: Tensor, learned: Tensor, out: Path) -> None:
    """Samples of the true and of the learned posterior given the same observation."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    for ax, (name, x) in zip(
        figure.subplots(1, 2, sharex=True, sharey=True),
        {"true": true, "learned": learned}.items(),
        strict=True,
    ):
        ax.scatter(x[:, 0], x[:, 1], s=3, alpha=0.6, linewidths=0)
        ax.set(title=f"{name} posterior", xlabel="parameter 1", ylabel="parameter 2")
    figure.savefig(out / "posterior.png", dpi=150)


def draw_calibration(shares: Tensor, allowed: float, out: Path) -> None:
    """Distributions of the ranks of true parameters, less that of uniform ones."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    ax = figure.subplots()
    expected = torch.arange(1, len(shares) + 1) / len(shares)
    ax.axhspan(-allowed, allowed, color="0.9", label="99 % by chance")
    for i, column in enumerate(shares.T):
        ax.plot(column.sort().values, expected - column.sort().values, label=f"parameter {i + 1}")
    ax.set(xlabel="share of samples below the true parameter", ylabel="distribution less uniform")
    ax.legend(fontsize=8)
    figure.savefig(out / "calibration.png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains on simulations, and compares with the true posterior."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    begin = time.perf_counter()
    torch.manual_seed(config.seed)
    task = TASKS[config.task]()
    sizes = task.parameters, task.observed, config.depth, config.width, config.bins
    flow = make_flow(config.flow, *sizes)
    config.out.mkdir(parents=True, exist_ok=True)

    def draw() -> Batch:
        return task.simulate(config.batch_size)

    for _ in fit(flow, draw, config.steps, config.lr):
        pass
    theta, x = task.pairs(4000)
    with torch.no_grad():
        kl, error = mean_and_error(task.log_posterior(theta, x) - flow.log_prob(theta, x))
    scores = []
    for i in range(config.observations):
        true = task.sample_posterior(config.samples, x[i])
        learned = flow.sample((config.samples,), x[i : i + 1])[:, 0]
        scores.append(c2st(true, learned, config.seed))
        if i == 0:
            draw_posterior(true, learned, config.out)
    shares = ranks(flow, task)
    allowed = 1.63 / math.sqrt(len(shares))  # of Kolmogorov and Smirnov, exceeded by 1 %
    draw_calibration(shares, allowed, config.out)
    write_record(
        config.out,
        config,
        time.perf_counter() - begin,
        kl=kl,
        kl_standard_error=error,
        c2st=sum(scores) / len(scores),
        c2st_each=scores,
        calibration=furthest(shares).tolist(),
        calibration_allowed=allowed,
    )


if __name__ == "__main__":
    sys.exit(main())
