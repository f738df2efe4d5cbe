"""Densities of two numbers, normalised, that can be sampled: what a learned one is measured by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Density(NamedTuple):
    """A density of points in the plane."""

    sample: Callable[[int, Generator], Tensor]
    """Draws points, ``(N, 2)``."""
    log_prob: Callable[[Tensor], Tensor]
    """The logarithm of the density at each of them, ``(N,)``."""


def _normal(x: Tensor, mean: Tensor | float, std: float) -> Tensor:
    return -((x - mean) / std).square() / 2 - math.log(std * math.sqrt(2 * math.pi))


# Eight normals on a circle.
_ANGLES = torch.arange(8) * (math.pi / 4)
_CENTRES = 2 * torch.stack([_ANGLES.cos(), _ANGLES.sin()], 1)
_WIDTH = 0.2


def _sample_mixture(count: int, generator: Generator) -> Tensor:
    which = torch.randint(8, (count,), generator=generator)
    return _CENTRES[which] + _WIDTH * torch.randn(count, 2, generator=generator)


def _mixture(x: Tensor) -> Tensor:
    each = _normal(x[:, None], _CENTRES, _WIDTH).sum(2)
    return each.logsumexp(1) - math.log(8)


# Circles whose radii are normal around 1 and 2, cut off at 0, in any direction alike.
_RADII, _THICKNESS = torch.tensor([1.0, 2.0]), 0.1


def _sample_rings(count: int, generator: Generator) -> Tensor:
    which = torch.randint(2, (count,), generator=generator)
    radius = (_RADII[which] + _THICKNESS * torch.randn(count, generator=generator)).abs()
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


def _rings(x: Tensor) -> Tensor:
    # That a radius is below 0 has a probability of 1e-23.
    radius = x.norm(dim=1)
    each = _normal(radius[:, None], _RADII, _THICKNESS)
    return each.logsumexp(1) - math.log(2) - (2 * math.pi * radius).log()


# A normal number, and another around its square.
def _sample_banana(count: int, generator: Generator) -> Tensor:
    x, noise = torch.randn(2, count, generator=generator)
    return torch.stack([x, x.square() / 2 - 0.5 + 0.25 * noise], 1)


def _banana(x: Tensor) -> Tensor:
    first, second = x.unbind(1)
    return _normal(first, 0.0, 1.0) + _normal(second, first.square() / 2 - 0.5, 0.25)


# The black fields of a board of 4x4, between -2 and 2.
def _sample_checkerboard(count: int, generator: Generator) -> Tensor:
    row = torch.randint(4, (count,), generator=generator)
    column = 2 * torch.randint(2, (count,), generator=generator) + row % 2
    corner = torch.stack([column, row], 1) - 2
    return corner + torch.rand(count, 2, generator=generator)


def _checkerboard(x: Tensor) -> Tensor:
    column, row = (x + 2).floor().unbind(1)
    inside = ((x + 2 >= 0) & (x + 2 < 4)).all(1)
    black = inside & ((column - row) % 2 == 0)
    return torch.full_like(row, -math.log(8)).where(black, -math.inf)


DENSITIES = {
    "mixture": Density(_sample_mixture, _mixture),
    "rings": Density(_sample_rings, _rings),
    "banana": Density(_sample_banana, _banana),
    "checkerboard": Density(_sample_checkerboard, _checkerboard),
}
