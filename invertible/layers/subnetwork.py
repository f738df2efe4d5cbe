"""Calling somebody's module in a layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .._support.checks import describe
from ..module import InvertibleModule
from ..state import Context, version


def expect_module(layer: InvertibleModule, f: Any) -> nn.Module:
    """Returns ``f`` if it is a module, and raises otherwise."""
    if not isinstance(f, nn.Module):
        raise TypeError(
            f"{type(layer).__name__} takes a torch.nn.Module, got {describe(f)}. A plain function "
            "becomes one as the forward method of a module."
        )
    return f


def name_of_f(layer: InvertibleModule, f: nn.Module) -> str:
    """How a message calls a layer's sub-network."""
    return f"{type(layer).__name__}'s f ({type(f).__name__})"


def evaluate(
    layer: InvertibleModule,
    f: nn.Module,
    x: Tensor,
    context: Context,
    what: str = "a second stream",
) -> Any:
    """What a layer's sub-network returns for a stream, and a context if there is one.

    A message calls the stream by a name.

    Raises:
        RuntimeError: If it changes the stream in place.
    """
    counts = not torch.compiler.is_compiling()
    before = version(x) if counts else 0
    try:
        result = f(x) if context is None else f(x, context)
    except Exception as error:
        error.add_note(
            f"In {name_of_f(layer, f)}, given {what} of shape {tuple(x.shape)}, "
            f"{x.dtype} on {x.device}."
        )
        raise
    if counts and version(x) != before:
        raise RuntimeError(
            f"{name_of_f(layer, f)} changed its input in place, and the stream with it. Let its "
            "first operation be out of place, for instance ReLU(inplace=False)."
        )
    return result


def may_lack_context(f: nn.Module) -> bool:
    """Whether a sub-network has a default for its second argument."""
    try:
        _, second, *_ = inspect.signature(f.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    return second.default is not inspect.Parameter.empty
