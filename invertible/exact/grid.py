"""The grid of multiples of a quantum, on which floating-point addition is exact."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

if TYPE_CHECKING:
    from ..module import InvertibleModule


@dataclass(frozen=True)
class Grid:
    """The multiples of a quantum, a power of two."""

    quantum: float

    @classmethod
    def of(cls, layer: object, quantum: float | None) -> Grid | None:
        """The grid of a layer's quantum, None for None; raises unless it is a power of two."""
        if quantum is None:
            return None
        if not (0 < quantum < math.inf) or math.frexp(quantum)[0] != 0.5:
            raise ValueError(
                f"{type(layer).__name__} takes a power of two as quantum, for instance 2**-16, got "
                f"{quantum!r}."
            )
        return cls(quantum)

    def round(self, x: Tensor) -> Tensor:
        """The nearest values on the grid, halves to even; the gradient goes straight through."""
        return _Round.apply(x, self.quantum)  # type: ignore[no-untyped-call,no-any-return]

    def distance(self, x: Tensor) -> Tensor:
        """How far the worst value is off the grid."""
        return (x - self.round(x)).abs_().max()

    def limit(self, dtype: torch.dtype) -> float:
        """The magnitude below which sums are exact."""
        return 2.0 ** (24 if dtype == torch.float32 else 53) * self.quantum

    def require_dtype(self, layer: object, x: Tensor) -> None:
        """Raises unless a state can hold the grid."""
        if x.dtype not in (torch.float32, torch.float64):
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


def finest_grid(layers: Iterable[InvertibleModule]) -> Grid | None:
    """The grid of a composition: the finest of its layers'.

    None if a layer keeps none, or if all layers only move numbers and keep any.
    """
    quanta = [layer.quantum for layer in layers if not layer.moves_only]
    known = [quantum for quantum in quanta if quantum is not None]
    return Grid(min(known)) if known and len(known) == len(quanta) else None


class _Round(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(x: Tensor, quantum: float) -> Tensor:
        # A quantum is a power of two: neither product rounds.
        return (x * (1 / quantum)).round_().mul_(quantum)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    @override
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    @override
    def jvp(_: Any, tangent: Tensor, __: None) -> Tensor:
        return tangent.clone()
