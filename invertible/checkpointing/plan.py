"""A composition taken apart into the layers that it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ..direction import Direction
from ..module import InvertibleModule

NO_LAYERS = "InvertibleSequential has no layers to run: append some first."


class Step(NamedTuple):
    """A layer, which way it is run, and its place in the composition."""

    layer: InvertibleModule
    direction: Direction
    name: str

    @property
    def place(self) -> str:
        return f"layer {self.name} ({type(self.layer).__name__})"


def steps(module: InvertibleModule, direction: Direction, name: str = "") -> Iterator[Step]:
    """Takes compositions apart, but for inner ones with hooks, which are called as a whole."""
    members = module._members(direction.inverted)
    called = not (direction.inverted or direction.log_det)
    if members is None or (name and called and has_hooks(module)):
        yield Step(module, direction, name or "0")
        return
    if not members:
        raise ValueError(NO_LAYERS)
    for member, layer, inverted in members:
        prefix = f"{name}.{member}" if name else member
        yield from steps(layer, direction._replace(inverted=inverted), prefix)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
