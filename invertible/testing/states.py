"""States taken apart, copied and compared, as the laws need it."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .._support.memory_format import is_channels_last, memory_format
from ..module import InvertibleModule
from ..state import Context, State, tensors


def is_state(state: Any) -> bool:
    """Whether it is a tensor or a tuple of tensors, at least one."""
    parts = state if isinstance(state, tuple) else (state,)
    return len(parts) > 0 and all(isinstance(part, Tensor) for part in parts)


def mapped(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """A state or a context with a function applied to its tensors, and all else as it is."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple):
        parts = [mapped(function, part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    if isinstance(state, list | dict):
        result: Any = copying.copy(state)
        for key in range(len(state)) if isinstance(state, list) else state:
            result[key] = mapped(function, state[key])
        return result
    return state


def detached(state: State, *, requires_grad: bool = False) -> State:
    """A copy with the graph cut."""
    result: State = mapped(lambda x: copy(x.detach()).requires_grad_(requires_grad), state)
    return result


def leaves_of(context: Context) -> tuple[Any, list[Tensor]]:
    """A copy of a context whose floating-point tensors take gradients, and these tensors."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        leaves.append(copy(x.detach()).requires_grad_())
        return leaves[-1]

    return mapped(leaf, context), leaves


def copied(state: Any) -> Any:
    """A copy of a state or a context, which keeps the graph."""
    return mapped(copy, state)


def copy(x: Tensor) -> Tensor:
    """A copy with the same strides: what was a slice is like a slice to the layer."""
    if 0 in x.stride():  # expanded: there is no writing into such strides
        return x.clone()
    return x.new_empty_strided(x.shape, x.stride()).copy_(x)


def rounded(state: State, quantum: float | None) -> State:
    """A state on the grid of multiples of a quantum, without -0.0; None rounds nothing."""
    if quantum is None:
        return state
    result: State = mapped(lambda x: (x / quantum).round() * quantum + 0.0, state)
    return result


def examples(state: Any, index: Sequence[int], batch: int) -> Any:
    """Some examples of a state or of a context, whose tensors of another length stay whole."""

    def some(x: Tensor) -> Tensor:
        if x.shape[:1] != (batch,):
            return x
        if list(index) == list(range(len(index))):
            return x[: len(index)]  # as it lies in memory
        return torch.cat([x[i : i + 1] for i in index])

    return mapped(some, state)


def in_other_format(x: Tensor) -> Tensor:
    """With channels last if they are not, and in torch's order if they are."""
    if x.dim() not in (4, 5) or x.shape[1] == 1 or x.shape[2:].numel() == 1:
        return x
    if is_channels_last(x):
        return x.contiguous()
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=last)


def sliced(x: Tensor) -> Tensor:
    """As a slice of a tensor with twice the channels, such as Split makes."""
    return torch.cat([x, x], 1)[:, : x.shape[1]] if x.dim() > 1 else x


def shuffled(state: State) -> State:
    """The same numbers in other places: an output that the layer did not make."""
    parts = list(tensors(state))
    numbers = torch.cat([part.flatten() for part in parts])
    generator = torch.Generator().manual_seed(0)
    numbers = numbers[torch.randperm(len(numbers), generator=generator).to(numbers.device)]
    pieces = torch.split(numbers, [part.numel() for part in parts])
    # empty_like keeps the memory format
    mixed = [
        torch.empty_like(part).copy_(piece.view(part.shape))
        for part, piece in zip(parts, pieces, strict=True)
    ]
    return tuple(mixed) if isinstance(state, tuple) else mixed[0]


def with_a_zero(state: State) -> State | None:
    """The state with a zero in front of each stream, if zero lies between its numbers."""
    parts = list(tensors(state))
    if not all(part.is_floating_point() and part.numel() for part in parts):
        return None
    if not all(bool(part.min() < 0 < part.max()) for part in parts):
        return None
    result: State = mapped(copy, state)
    for part in tensors(result):
        part[(0,) * part.dim()] = 0
    return result


def weights(parts: Sequence[Tensor], seed: int = 2018) -> list[Tensor]:
    """Random numbers in the shapes of some tensors, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(part.shape, generator=generator).to(part) for part in parts]


def shapes(state: Any) -> Any:
    """The shapes of a state, in its structure."""
    return tuple(map(shapes, state)) if isinstance(state, tuple) else tuple(state.shape)


def magnitude(x: Tensor) -> float:
    """The largest finite absolute value."""
    x = x.abs().double() if x.is_complex() else x.double().abs()
    return x.nan_to_num(posinf=0.0).max().item() if x.numel() else 0.0


def distance(one: Tensor, other: Tensor) -> Tensor:
    """How far two tensors are apart, place by place."""
    rounds = one.dtype.is_floating_point or one.dtype.is_complex
    return (one - other).abs().double() if rounds else (one != other).double()


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


def same(one: Any, other: Any) -> bool:
    """Whether two states or contexts hold the same numbers, NaN being one."""
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(tensors(one), tensors(other), strict=True)
    )


def named_tensors(layer: InvertibleModule) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a layer."""
    return [*layer.named_parameters(), *layer.named_buffers()]


def by_example(state: State) -> Tensor:
    """A state as ``(N, L)``: all numbers of an example in a row."""
    return torch.cat([part.flatten(1) for part in tensors(state)], 1)
