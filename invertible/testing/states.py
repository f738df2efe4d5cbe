"""States taken apart, copied and compared, as the laws need it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .._support.memory_format import memory_format
from ..module import InvertibleModule
from ..state import State, tensors


def is_state(state: Any) -> bool:
    """Whether it is a tensor or a tuple of tensors, at least one."""
    parts = state if isinstance(state, tuple) else (state,)
    return len(parts) > 0 and all(isinstance(part, Tensor) for part in parts)


def detached(state: State, *, requires_grad: bool = False) -> State:
    """A copy with the graph cut."""
    if isinstance(state, tuple):
        return tuple(copy(part.detach()).requires_grad_(requires_grad) for part in state)
    return copy(state.detach()).requires_grad_(requires_grad)


def copied(state: State) -> State:
    """A copy of a state, which keeps the graph."""
    return tuple(map(copy, state)) if isinstance(state, tuple) else copy(state)


def copy(x: Tensor) -> Tensor:
    """A copy with the same strides: what was a slice is like a slice to the layer."""
    if 0 in x.stride():  # expanded: there is no writing into such strides
        return x.clone()
    return x.new_empty_strided(x.shape, x.stride()).copy_(x)


def shuffled(state: State) -> State:
    """The same numbers in other places: an output that the layer did not make."""
    parts = list(tensors(state))
    numbers = torch.cat([part.flatten() for part in parts])
    generator = torch.Generator().manual_seed(0)
    numbers = numbers[torch.randperm(len(numbers), generator=generator).to(numbers.device)]
    pieces = torch.split(numbers, [part.numel() for part in parts])
    # empty_like keeps the memory format
    shuffled = [
        torch.empty_like(part).copy_(piece.view(part.shape))
        for part, piece in zip(parts, pieces, strict=True)
    ]
    return tuple(shuffled) if isinstance(state, tuple) else shuffled[0]


def shapes(state: Any) -> Any:
    """The shapes of a state, in its structure."""
    return tuple(map(shapes, state)) if isinstance(state, tuple) else tuple(state.shape)


def magnitude(x: Tensor) -> float:
    """The largest finite absolute value."""
    return x.double().abs().nan_to_num(posinf=0.0).max().item() if x.numel() else 0.0


def distance(one: Tensor, other: Tensor) -> Tensor:
    """How far two tensors are apart, place by place."""
    return (one - other).abs().double() if one.dtype.is_floating_point else (one != other).double()


def kinds(state: State) -> set[str]:
    """The dtypes and devices in a state, in words."""
    return {f"{part.dtype} on {part.device}" for part in tensors(state)}


def formats(state: State, rank: int) -> set[torch.memory_format | None]:
    """The memory formats in a state; None where strides do not tell: one channel, one pixel."""
    return {
        memory_format(part) if part.shape[1] > 1 and part.shape[2:].numel() > 1 else None
        for part in tensors(state)
        if part.dim() == rank
    }


def listed(things: Collection[object]) -> str:
    """Some things in words."""
    return ", ".join(sorted(map(str, things)))


def values(state: Any) -> list[Tensor]:
    """Copies of the tensors in a state or a context."""
    return [part.clone() for part in tensors(state)]


def same(one: Any, other: Any) -> bool:
    """Whether two states or contexts hold the same numbers, NaN being one."""
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(tensors(one), tensors(other), strict=True)
    )


def named_tensors(layer: InvertibleModule) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a layer."""
    return [*layer.named_parameters(), *layer.named_buffers()]


def count(state: State) -> int:
    """How many numbers are in a state."""
    return sum(part.numel() for part in tensors(state))


def by_example(state: State) -> Tensor:
    """A state as ``(N, L)``: all numbers of an example in a row."""
    return torch.cat([part.flatten(1) for part in tensors(state)], 1)
