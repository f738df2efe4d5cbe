"""What all layers do that apply an elementwise map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._support.checks import describe, expect_tensor, rank_for
from .._support.memory_format import in_format_of
from ..module import InvertibleModule
from .maps import ElementwiseMap
from .subnetwork import name_of_f


def expect_map(layer: InvertibleModule, bijection: Any) -> ElementwiseMap:
    """Returns a map, and raises for anything else."""
    if not isinstance(bijection, ElementwiseMap):
        raise TypeError(
            f"{type(layer).__name__} takes an elementwise map such as Affine(), got "
            f"{describe(bijection)}. For one of your own subclass ElementwiseMap."
        )
    return bijection


def expect_dim(layer: nn.Module, dim: int) -> int:
    """Returns the dimension of the channels, and raises for that of the batch."""
    if dim == 0:
        raise ValueError(
            f"{type(layer).__name__} cannot take dim=0, the batch; channels are dim=1, or dim=-1 "
            "for tokens."
        )
    return dim


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of another are computed in: float32 at least."""
    return dtype if dtype == torch.float64 else torch.float32


def apply_map(
    bijection: ElementwiseMap, x: Tensor, parameters: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Maps values one way or the other, and keeps their dtype and memory format.

    Log-derivatives stay wide.
    """
    run = bijection.inverse_and_log_det if inverse else bijection.forward_and_log_det
    y, log_slope = run(x.to(wide(x.dtype)), parameters)
    return in_format_of(x, y.to(x.dtype)), log_slope


def can_look(x: Tensor) -> bool:
    """Whether an inverse looks at its values, which costs 10 us on a CPU.

    Elsewhere it would wait for the device.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def require_finite(layer: InvertibleModule, x: Tensor, y: Tensor) -> None:
    """Raises if an inverse made values that are not finite of such that are."""
    if can_look(x) and not x.isfinite().all() and y.isfinite().all():
        raise OverflowError(
            f"{type(layer).__name__}'s inverse made {int((~x.isfinite()).sum())} of {x.numel()} "
            f"values infinite or NaN, of values up to {y.abs().max():.3g}. They were amplified "
            "layer by layer: let f be small (begin with a last layer of zeros, decay its weights), "
            "put ActNorm between, or compute in float64."
        )


def total(log_slope: Tensor, x: Tensor) -> Tensor:
    """The log-determinant of an elementwise map, ``(N,)``, from its log-derivatives."""
    return log_slope.expand(x.shape).sum(list(range(1, x.dim())))


def in_blocks(
    layer: InvertibleModule,
    f: nn.Module,
    bijection: ElementwiseMap,
    found: Any,
    x: Tensor,
    dim: int,
    other: str = "",
) -> Tensor:
    """The parameters of a map for a stream, from what a sub-network returned in blocks.

    A message adds another shape that the layer takes.
    """
    x = expect_tensor(layer, x, min_dim=rank_for(dim))
    count, channels = bijection.parameters_per_value, x.shape[dim]
    expected = list(x.shape)
    expected[dim] = count * channels
    if not isinstance(found, Tensor) or list(found.shape) != expected:
        raise ValueError(
            f"{name_of_f(layer, f)} must return {count} x {channels} = {count * channels} channels "
            f"along dimension {dim}, as {type(bijection).__name__} takes {count} for each of the "
            f"stream's {channels}: a tensor of shape {tuple(expected)}{other}, got "
            f"{describe(found)}."
        )
    require_narrow(layer, f, found, x)
    place = dim % x.dim()
    shape = (*x.shape[:place], count, *x.shape[place:])
    return found.to(wide(x.dtype)).view(shape).movedim(place, 0)


def at_all_places(bijection: ElementwiseMap, found: Tensor, x: Tensor, dim: int) -> Tensor:
    """The parameters of a map that are the same at all places, from ``(N or 1, P C)``."""
    count, channels = bijection.parameters_per_value, x.shape[dim]
    shape = [1] * x.dim()
    shape[0], shape[dim] = len(found), channels
    blocks = found.to(wide(x.dtype)).view(-1, count, channels).movedim(1, 0)
    return blocks.reshape(count, *shape)


def require_narrow(layer: InvertibleModule, f: nn.Module, found: Tensor, x: Tensor) -> None:
    """Raises if parameters are wider than what they are computed with."""
    dtype = wide(x.dtype)
    if found.dtype != dtype and torch.promote_types(found.dtype, dtype) != dtype:
        raise ValueError(
            f"{name_of_f(layer, f)} returned {found.dtype}, which is wider than the {dtype} that a "
            f"stream of {x.dtype} is computed in. Cast f or the state."
        )
