"""Densities learned by all sides: the same data, batches and steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from comparing.meters import Spread
from comparing.setting import Setting
from flows import PEERS, Density, ours
from torch import Tensor, nn

from invertible import ActNorm, InvertibleSequential


def digits() -> tuple[Tensor, Tensor]:
    """To train and to test on: 4 channels of 4x4, between 0 and 1."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(0)
    x = torch.from_numpy(load_digits().images).float()[:, None]
    x = (x + torch.rand(x.shape, generator=generator)) / 17
    x = nn.functional.pixel_unshuffle(x, 2)[torch.randperm(len(x), generator=generator)]
    return x[360:], x[:360]


def moons() -> tuple[Tensor, Tensor]:
    """To train and to test on, in standard units."""
    from sklearn.datasets import make_moons

    x, _ = make_moons(20_000, noise=0.05, random_state=0)
    x = torch.from_numpy((x - x.mean(0)) / x.std(0)).float()
    return x[2000:], x[:2000]


TASKS: dict[str, tuple[str, Callable[[], tuple[Tensor, Tensor]]]] = {
    "digits": ("glow", digits),
    "moons": ("spline", moons),
}


@dataclass(frozen=True)
class Learned:
    """What a side made of a task."""

    log_likelihood: list[float]  # of test examples, nats a number, by seed
    step: Spread  # seconds
    sample: Spread  # seconds for a thousand


def begin(density: Density, x: Tensor) -> None:
    """Lets a batch decide where our ActNorm begins, as it does the others'."""
    if isinstance(density.flow, InvertibleSequential):
        for layer in density.flow:
            if isinstance(layer, ActNorm):
                layer.initialise(x)
            x = layer(x)
    else:
        density(x)


def learn(density: Density, train: Tensor, steps: int, config: Any, seed: int) -> list[float]:
    """Trains by Adam; returns the seconds of each step."""
    now, seconds = Setting(clock=config.clock).now, []
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        begin(density, train[:512])
    optimizer = torch.optim.Adam(density.parameters(), lr=config.lr)
    for _ in range(steps):
        x = train[torch.randint(len(train), (config.batch,), generator=generator)]
        start = now()
        optimizer.zero_grad()
        density(x).mean().backward()
        optimizer.step()
        seconds.append(now() - start)
    return seconds


def log_likelihood(density: Density, x: Tensor) -> float:
    """Of test examples, in nats a number."""
    with torch.no_grad():
        constant = math.log(2 * math.pi) / 2
        return -density(x).mean().item() / x[0].numel() - constant


def sampling(density: Density, shape: tuple[int, ...], config: Any) -> list[float]:
    """Seconds for a thousand samples, ten times."""
    now, seconds = Setting(clock=config.clock).now, []
    for _ in range(10):
        z = torch.randn(1000, *shape)
        start = now()
        with torch.no_grad():
            density.undo(density.flow, z)
        seconds.append(now() - start)
    return seconds


def learning(config: Any) -> dict[str, dict[str, Learned]]:
    """All sides in turn, for each seed."""
    found: dict[str, dict[str, Learned]] = {}
    for task, (kind, read) in TASKS.items():
        train, test = read()
        steps = config.digit_steps if task == "digits" else config.moon_steps
        notes: dict[str, tuple[list[float], list[float], list[float]]] = {}
        for seed in range(config.seeds):
            for name, make in {"ours": ours, **available()}.items():
                torch.manual_seed(seed)
                density = make(kind, config.depth, config.width, tuple(train.shape[1:]))
                if density is None:
                    continue
                results, times, samples = notes.setdefault(name, ([], [], []))
                times += learn(density.train(), train, steps, config, seed)
                results.append(log_likelihood(density.eval(), test))
                samples += sampling(density, tuple(train.shape[1:]), config)
        found[task] = {
            name: Learned(results, Spread.of(times), Spread.of(samples))
            for name, (results, times, samples) in notes.items()
        }
    return found


def available() -> dict[str, Any]:
    """The peers that are installed."""
    return {name: make for name, make in PEERS.items() if find_spec(name) is not None}
