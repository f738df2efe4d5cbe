"""Running a layer forward or backward, with its log-determinant or without."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .module import InvertibleModule, call, call_inverse


class Direction(NamedTuple):
    """Which of a layer's four methods is run."""

    inverted: bool = False
    log_det: bool = False

    def run(self, layer: InvertibleModule, state: Any, context: Any) -> tuple[Any, Tensor | None]:
        """Runs a layer; the log-determinant is None unless it is asked for."""
        if not self.log_det:
            return (call_inverse if self.inverted else call)(layer, state, context), None
        method = layer.inverse_and_log_det if self.inverted else layer.forward_and_log_det
        return method(state, context) if layer.conditional else method(state)

    def undo(self, layer: InvertibleModule, state: Any, context: Any) -> Any:
        """Runs a layer the other way."""
        return (call if self.inverted else call_inverse)(layer, state, context)

    def flipped(self) -> Direction:
        """The other way."""
        return self._replace(inverted=not self.inverted)
