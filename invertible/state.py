"""What layers take and return: a tensor, or a tuple of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

Pair = tuple[Tensor, Tensor]
State = Tensor | tuple[Tensor, ...]
# What conditional layers take besides: any object.
Context = Any


def streams_of(state: State) -> tuple[Tensor, ...]:
    """The tensors of a state; a tensor by itself is one stream."""
    return state if isinstance(state, tuple) else (state,)


def map_streams(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The state with a function applied to each stream."""
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a state or a context, however nested in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def has_values(state: Any) -> bool:
    """Whether there is something to read: not on the meta device, nor in a fake tensor."""
    return not any(x.is_meta or is_fake(x) for x in tensors(state))


def gathered(x: Tensor) -> Tensor:
    """A tensor to read values of: a distributed one is brought together from all processes."""
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole


def version(x: Tensor) -> int:
    """How often a tensor was changed in place; 0 where torch does not count."""
    try:
        return x._version
    except RuntimeError:  # an inference tensor
        return 0


def versions(xs: Sequence[Tensor]) -> list[int]:
    """:func:`version` of each tensor, quicker."""
    try:
        return [x._version for x in xs]
    except RuntimeError:
        return [version(x) for x in xs]
