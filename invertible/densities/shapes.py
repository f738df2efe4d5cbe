"""The shapes that a layer makes of others, found without running it on values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size

from .._support.checks import describe
from .._support.fakes import NEED_VALUES, copy_with, fake_mode
from ..module import InvertibleModule
from ..state import Context, streams_of

Shapes = tuple[Size, ...]


def shapes_of(given: Any) -> Shapes:
    """One shape, or one for each stream.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(given, Sequence) and not isinstance(given, str):
        if all(isinstance(size, int) and size > 0 for size in given):
            return (Size(given),)
        if all(isinstance(shape, Sequence) for shape in given):
            return tuple(Size(shape) for shape in given)
    raise TypeError(
        "Flow takes as event_shape the shape of one example, such as (3, 32, 32), or a tuple of "
        f"the shapes of its streams, got {describe(given)}."
    )


def describe_shapes(shapes: Shapes) -> str:
    """How a message has them."""
    return " and ".join(str(tuple(shape)) for shape in shapes)


def shapes_through(
    layer: InvertibleModule, shapes: Shapes, context: Context, count: int, inverse: bool = False
) -> Shapes | None:
    """What examples of some shapes become; None if that depends on values.

    The layer is a copy without values: none of it is initialised, and nothing drawn.
    """
    fake = fake_mode()
    twin, context = copy_with(fake.from_tensor, layer, context)
    floating = (x for x in layer.parameters() if x.is_floating_point())
    like = next(floating, torch.empty(0))
    try:
        with fake, torch.no_grad():
            state: Any = tuple(like.new_empty(count, *shape) for shape in shapes)
            state = state[0] if len(shapes) == 1 else state
            run = twin.inverse if inverse else twin
            found = run(state, context) if layer.conditional else run(state)
    except NEED_VALUES:
        return None
    except Exception as error:
        error.add_note(f"While the shape {describe_shapes(shapes)} was followed through a flow.")
        raise
    return tuple(x.shape[1:] for x in streams_of(found))
