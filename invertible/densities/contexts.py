"""Contexts of several examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..state import Context, tensors


def count_examples(context: Context) -> int | None:
    """How many examples a context has; None if it has no tensors with a batch.

    Raises:
        ValueError: If its tensors differ in that.
    """
    counts = {len(x) for x in tensors(context) if x.dim()}
    if len(counts) > 1:
        raise ValueError(
            "Flow takes a context whose tensors all have one entry an example along their first "
            f"dimension, got {' and '.join(map(str, sorted(counts)))} entries."
        )
    return counts.pop() if counts else None


def for_examples(context: Context, count: int) -> Context:
    """A context for so many examples, one of a single example repeated.

    Raises:
        ValueError: If it is for another number of examples.
    """
    own = count_examples(context)
    if own is None or own == count:
        return context
    if own != 1:
        raise ValueError(f"Flow got a context of {own} examples, and {count} examples of data.")
    return map_tensors(lambda x: x.expand(count, *x.shape[1:]), context)


def repeated(context: Context, times: int) -> Context:
    """A context for several samples of each of its examples, all examples in turn."""
    return map_tensors(lambda x: x.repeat(times, *[1] * (x.dim() - 1)), context)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A context with a function applied to its tensors that have a batch."""
    if isinstance(value, Tensor):
        return function(value) if value.dim() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, part) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, part) for part in value)
    if isinstance(value, dict):
        return {name: map_tensors(function, part) for name, part in value.items()}
    return value
