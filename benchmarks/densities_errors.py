"""How far round trips and log-determinants are off."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from flows import SHAPES, Density, sides
from torch import Tensor, nn


class Error(NamedTuple):
    """How far a side is off, NaN where something is not finite."""

    kind: str  # the architecture
    side: str
    depth: int
    factor: float  # of the weights
    dtype: str
    round_trip: float  # over the largest number
    log_det: float


def errors(config: Any) -> Iterator[Error]:
    """Of all sides, for all settings."""
    for kind, shape in SHAPES.items():
        x = torch.randn(8 if kind == "glow" else 256, *shape)
        for depth in config.error_depths:
            for factor in config.factors:
                torch.manual_seed(0)
                for name, density in sides(kind, depth, config.width, shape):
                    if name != "rebuilt":  # whose values are those of stored
                        for dtype, round_trip, log_det in errors_of(density, x, factor):
                            who = "ours" if name == "stored" else name
                            yield Error(kind, who, depth, factor, dtype, round_trip, log_det)


@torch.no_grad()
def errors_of(density: Density, x: Tensor, factor: float) -> Iterator[tuple[str, float, float]]:
    """In float32 and under autocast."""
    density(x)  # some begin from a batch
    multiply(density, factor)
    exact = copy.deepcopy(density).double()
    expected = exact.run(exact.flow, x.double())[1]
    for dtype in ("float32", "bfloat16"):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            yield dtype, *error_of(density, x, expected)


def multiply(density: Density, factor: float) -> None:
    """Makes the weights of all linear layers and convolutions larger."""
    for part in density.flow.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.weight.mul_(factor)


def error_of(density: Density, x: Tensor, expected: Tensor) -> tuple[float, float]:
    """There and back; raising counts as not finite."""
    try:
        z, log_det = density.run(density.flow, x)
        back = density.undo(density.flow, z)
    except (OverflowError, RuntimeError, ValueError, AssertionError):
        return math.nan, math.nan
    trip = (back - x).abs().max() / x.abs().max()
    return trip.item(), (log_det.double() - expected).abs().max().item()
