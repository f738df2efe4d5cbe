"""What layers take and return: a tensor, or a tuple of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
State = Tensor | tuple[Tensor, ...]


def tensors(state: Any) -> Iterator[Tensor]:
    """The tensors in a state or a context, however nested in tuples, lists and dicts."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple | list):
        for part in state:
            yield from tensors(part)
    elif isinstance(state, dict):
        yield from tensors(list(state.values()))


def version(x: Tensor) -> int:
    """How often a tensor was changed in place; 0 where torch does not count."""
    if torch.compiler.is_compiling():
        return 0
    try:
        return x._version
    except RuntimeError:  # an inference tensor
        return 0


def detach(state: Any) -> Any:
    """A state cut off from the graph, with the same memory."""
    return tuple(map(detach, state)) if isinstance(state, tuple) else state.detach()
