"""Checks at the edge of every layer: what came, what is expected, what to try."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def describe(x: Any) -> str:
    """Says in a few words what a caller handed over."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)} ({', '.join(map(describe, x))})"
    if isinstance(x, type):
        return f"the class {x.__name__}, not an instance of it"
    name = type(x).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def expect_tensor(layer: object, x: Any, *, min_dim: int = 2) -> Tensor:
    """Returns ``x`` if it is a tensor of at least ``min_dim`` dimensions, and raises otherwise."""
    name = type(layer).__name__
    if not isinstance(x, Tensor):
        hint = (
            "Put Merge() before it to join the streams, or Parallel(...) to treat each."
            if isinstance(x, tuple | list)
            else "Convert it with torch.as_tensor."
        )
        raise TypeError(f"{name} takes a tensor, got {describe(x)}. {hint}")
    if x.dim() < min_dim:
        raise ValueError(
            f"{name} takes a tensor of at least {min_dim} dimensions, batch and channels first, "
            f"got {describe(x)}. If it is a single example, give it a batch dimension: "
            "x.unsqueeze(0)."
        )
    return x


def expect_streams(layer: object, x: Any, count: int) -> tuple[Tensor, ...]:
    """Returns ``x`` if it is a tuple of ``count`` like tensors, and raises otherwise."""
    name = type(layer).__name__
    kind = "a pair of tensors" if count == 2 else f"a tuple of {_tensors(count)}"
    if not isinstance(x, tuple):
        hint = (
            f"Put {'Split()' if count == 2 else 'Split(sizes)'} before it to make them."
            if isinstance(x, Tensor)
            else "Hand the streams over as a tuple."
        )
        raise TypeError(f"{name} takes {kind}, got {describe(x)}. {hint}")
    if len(x) != count:
        raise ValueError(
            f"{name} takes {kind}, got {describe(x)}. As many as that come out of "
            f"{'Split()' if count == 2 else 'Split(sizes)'}."
        )
    for stream in x:
        if not isinstance(stream, Tensor):
            raise TypeError(f"{name} takes {kind}, got {describe(x)}. Each must be a tensor.")
    for what in ("dtype", "device"):
        first, *others = (getattr(stream, what) for stream in x)
        if any(other != first for other in others):
            found = ", ".join(str(getattr(stream, what)) for stream in x)
            raise ValueError(
                f"{name} takes streams of one {what}, got {found}. Bring them together with .to()."
            )
    return x


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def check_context(layer: object, conditional: bool, context: Any) -> None:
    """Raises when a context is missing, or given to a layer that would ignore it."""
    name = type(layer).__name__
    if conditional and context is None:
        raise TypeError(f"{name} is conditional and got no context. Call it as layer(x, context).")
    if not conditional and context is not None:
        raise TypeError(
            f"{name} got a context ({describe(context)}) that nothing in it would use. "
            "Leave the context out, or make a coupling take it: AdditiveCoupling(f, "
            "conditional=True) calls f(x2, context)."
        )
