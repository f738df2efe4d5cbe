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
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from invertible import Flow
from simulators import TASKS, Task
from vectors import Batch, Kind, fit, make_flow, mean_and_error, write_record


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


def c2st(a: Tensor, b: Tensor, seed: int) -> float:
    """Accuracy of a classifier between two sets of samples, five-fold cross-validated."""
    both = (torch.cat([a, b]) - b.mean(0)) / b.std(0)
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(a), len(b)]))
    width = 10 * a.shape[1]
    classifier = MLPClassifier((width, width), random_state=seed)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it could go on to converge
        scores = cross_val_score(classifier, both.numpy(), labels.numpy(), cv=folds)
    return float(scores.mean())


@torch.no_grad()
def calibration(flow: Flow, task: Task, count: int, samples: int = 99) -> Tensor:
    """How often so many samples or fewer are below the true parameters, less how often by chance.

    Given an observation, the rank of the true parameter among samples of the right posterior is
    uniform. By rank and parameter.
    """
    theta, x = task.simulate(count)
    ranks = (flow.sample((samples,), x) < theta).sum(0)
    levels = torch.arange(samples + 1)
    found = (ranks <= levels[:, None, None]).float().mean(1)
    return found - (levels[:, None] + 1) / (samples + 1)


def draw_posterior(true: Tensor, learned: Tensor, out: Path) -> None:
    """Samples of the true and of the learned posterior given the same observation."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    for ax, (name, x) in zip(
        figure.subplots(1, 2, sharex=True, sharey=True),
        {"true": true.numpy(), "learned": learned.numpy()}.items(),
        strict=True,
    ):
        ax.scatter(x[:, 0], x[:, 1], s=3, alpha=0.6, linewidths=0)
        ax.set(title=f"{name} posterior", xlabel="parameter 1", ylabel="parameter 2")
    figure.savefig(out / "posterior.png", dpi=150)


def draw_calibration(excess: Tensor, allowed: float, out: Path) -> None:
    """The distribution of the ranks of true parameters, less the uniform one."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    ax = figure.subplots()
    ax.axhspan(-allowed, allowed, color="0.9", label="99 % by chance")
    share = torch.linspace(0, 1, len(excess)).numpy()
    for i, column in enumerate(excess.T.numpy()):
        ax.plot(share, column, label=f"parameter {i + 1}")
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
    simulations = 500
    excess = calibration(flow, task, simulations)
    allowed = 1.63 / math.sqrt(simulations)  # of Kolmogorov and Smirnov, exceeded by 1 %
    draw_calibration(excess, allowed, config.out)
    write_record(
        config.out,
        config,
        time.perf_counter() - begin,
        kl=kl,
        kl_standard_error=error,
        c2st=sum(scores) / len(scores),
        c2st_each=scores,
        calibration=excess.abs().amax(0).tolist(),
        calibration_allowed=allowed,
    )


if __name__ == "__main__":
    main()
