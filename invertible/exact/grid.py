"""The grid of multiples of a quantum, on which floating-point addition is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

# The dtypes of states on a grid.
HOLDING = torch.float32, torch.float64

# Quanta up to this power, and down to its reciprocal: what rounding computes with them stays
# a normal number in float32.
_LARGEST = 2.0**100


@dataclass(frozen=True)
class Grid:
    """The multiples of a quantum, a power of two."""

    quantum: float

    @classmethod
    def of(cls, layer: object, quantum: float | None) -> Grid | None:
        """The grid of a layer's quantum, None for None; raises unless it is a power of two."""
        if quantum is None:
            return None
        if not (1 / _LARGEST <= quantum <= _LARGEST) or math.frexp(quantum)[0] != 0.5:
            raise ValueError(
                f"{type(layer).__name__} takes a power of two as quantum, for instance 2**-16, "
                f"from 2**-100 to 2**100, got {quantum!r}."
            )
        return cls(float(quantum))

    def round(self, x: Tensor) -> Tensor:
        """The nearest values on the grid, halves to even; the gradient goes straight through.

        A zero is 0.0, never -0.0.
        """
        # Ordinary operations, since tracers drop what an autograd.Function derives. Neither product
        # rounds, q being a power of two. Nor does the difference: the multiple nearest to x is 0 or
        # between x / 2 and 2 x (Sterbenz, 1974). So the sum is that multiple, bit for bit.
        cut = x.detach()
        return (cut * (1 / self.quantum)).round_().mul_(self.quantum).sub_(cut).add_(x)

    def distance(self, x: Tensor) -> Tensor:
        """How far the worst value is off the grid."""
        return (x - self.round(x)).abs_().max()

    def limit(self, dtype: torch.dtype) -> float:
        """The magnitude below which sums are exact."""
        return 2.0 ** (24 if dtype == torch.float32 else 53) * self.quantum

    def require_dtype(self, layer: object, x: Tensor) -> None:
        """Raises unless a state can hold the grid."""
        if x.dtype not in HOLDING:
            raise TypeError(
                f"{type(layer).__name__} with a quantum takes a float32 or float64 state, got "
                f"{x.dtype}. "
                + (
                    "Let only the sub-networks run in lower precision, under torch.autocast."
                    if x.is_floating_point()
                    else "Convert it: x.float(), or x.float() / 256 for 8-bit images."
                )
            )

    @override
    def __str__(self) -> str:
        return f"2**{math.frexp(self.quantum)[1] - 1}"


def positive_zeros(x: Tensor) -> Tensor:
    """The same numbers with 0.0 in place of -0.0, which sums would not give back."""
    return x + 0.0
