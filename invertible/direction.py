"""Running a layer in one of its four ways: forward or backward, with its log-determinant or not."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .module import InvertibleModule
from .state import Context, State


class Direction(NamedTuple):
    """Which of a layer's four methods is run."""

    inverted: bool = False
    log_det: bool = False

    def apply(
        self, layer: InvertibleModule, state: State, context: Context
    ) -> tuple[State, Tensor | None]:
        """Runs a layer; the log-determinant is None unless it is asked for."""
        if not self.log_det:
            return (call_inverse if self.inverted else call)(layer, state, context), None
        method: Any = layer.inverse_and_log_det if self.inverted else layer.forward_and_log_det
        return method(state, context) if layer.conditional else method(state)  # type: ignore[no-any-return]


def method_of(direction: Direction) -> str:
    """The name of a layer's method that runs it so."""
    # Not a property: Dynamo of torch 2.5 takes none of named tuples.
    return ("inverse" if direction.inverted else "forward") + "_and_log_det" * direction.log_det


def call(layer: InvertibleModule, x: State, context: Context) -> Any:
    """Runs a layer, with the context if it takes one."""
    return layer(x, context) if layer.conditional else layer(x)


def call_inverse(layer: InvertibleModule, y: State, context: Context) -> Any:
    """Runs a layer backwards, with the context if it takes one."""
    inverse: Any = layer.inverse  # the abstract one takes no context
    return inverse(y, context) if layer.conditional else inverse(y)
