"""A few numbers of a tensor, by which it is known again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

COUNT = 64
_PLAIN = Tensor, nn.Parameter


def sample(x: Tensor) -> Tensor | None:
    """Values of a tensor at fixed places, or None where there are none to be read.

    The places are spread over the examples, at least one in each of up to 64, and pseudo-random
    within: a plain stride would hit one pixel of each image, or the first feature of each token.
    """
    if type(x) not in _PLAIN or x.is_meta or not x.numel():
        return None
    return x.detach().take(_places(x.shape[0] if x.dim() else 1, x.numel(), x.device))


def checksum(x: Tensor) -> Tensor | None:
    """A number that changes with any bit of a floating-point tensor, but the sign of zeros."""
    if type(x) not in _PLAIN or x.is_meta:
        return None
    return (x.detach() + 0.0).view(torch.int64 if x.dtype == torch.float64 else torch.int32).sum()


def sizes(samples: Sequence[Tensor]) -> Tensor:
    """The root mean square of each sample."""
    return (_squares(_rows(samples)).sum(1) / COUNT).sqrt()


def distances(samples: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The root mean square of each sample's difference from another, without the largest number.

    A threshold in a network, such as rounding or a mask, may be passed by one number the other way
    where the rest is off by its last bit.
    """
    squares = _squares(_rows(samples) - _rows(others))
    return ((squares.sum(1) - squares.amax(1)).clamp_min(0) / COUNT).sqrt()


def difference(true: Tensor, found: Tensor) -> float:
    """The distance of two tensors, over the norm of the first."""
    kind = torch.complex128 if true.is_complex() else torch.float64
    true, found = true.to(kind), found.to(kind)
    return float((found - true).norm() / true.norm().clamp_min(1e-300))


def tolerance_for(dtypes: set[torch.dtype], on_cpu: bool) -> float:
    """How far rebuilt values may be off by default, after the coarsest of some dtypes."""
    inexact = {x for x in dtypes if x.is_floating_point or x.is_complex}
    if inexact <= {torch.float64, torch.complex128}:
        return 1e-6
    if inexact <= {torch.float64, torch.complex128, torch.float32, torch.complex64}:
        # Accelerators round what a float32 convolution multiplies, by default to TF32.
        return 1e-3 if on_cpu else 1e-2
    return 0.2


def _rows(samples: Sequence[Tensor]) -> Tensor:
    if len({(x.dtype, x.device) for x in samples}) > 1:
        wide = torch.complex128 if any(x.is_complex() for x in samples) else torch.float64
        samples = [x.to(samples[0].device, wide) for x in samples]
    rows = torch.stack([*samples]) if samples else torch.empty(0, COUNT)
    return rows.to(torch.float64) if rows.dtype in _WHOLE else rows


_WHOLE = torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64


def _squares(rows: Tensor) -> Tensor:
    return rows.abs().to(torch.float64).square()


@lru_cache(maxsize=1024)
def _places(examples: int, numel: int, device: torch.device) -> Tensor:
    number = torch.arange(COUNT, dtype=torch.float64)
    size = numel // examples
    within = (number * 0.6180339887498949 % 1 * size).long()  # the most even of sequences
    example = number * examples // COUNT if examples > COUNT else number % examples
    return (example.long() * size + within).to(device)
