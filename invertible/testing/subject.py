"""A layer at one input, as the laws look at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.nn.parameter import is_lazy

from .._support.checks import describe
from .._support.no_trace import no_trace
from ..module import InvertibleModule, call, call_inverse
from ..state import State, tensors
from .states import copied, detached, distance, is_state, magnitude, same, shapes


class InversecheckError(AssertionError):
    """A layer breaks a law; the message names the law, the place and the size."""


class Subject:
    """A layer at one input, evaluated without a trace."""

    def __init__(
        self,
        layer: InvertibleModule,
        x: State,
        context: Any,
        y: State | None,
        tolerance: float | None,
    ) -> None:
        self.layer = layer
        self.x = detached(x)
        self.context = context
        self.given_y = y
        self.dtype = next(tensors(x)).dtype
        floating = self.dtype.is_floating_point
        eps = torch.finfo(self.dtype).eps if floating else 0.0
        self.tolerance = eps ** (2 / 3) if tolerance is None else tolerance
        self.modes = [(part, part.training) for part in layer.modules()]
        self.buffers = [(part._buffers, dict(part._buffers)) for part in layer.modules()]
        self.parameters = [
            (parameter, parameter.detach().clone())
            for parameter in layer.parameters()
            if not is_lazy(parameter)
        ]

    def evaluate(self, direction: Callable[..., Any], state: State) -> Any:
        """Runs the layer on a copy of a state, and puts back whatever it changes."""
        try:
            with no_trace(self.layer, (state, self.context)):
                return direction(self.layer, copied(state), self.context)
        finally:
            for part, mode in self.modes:
                part.training = mode
            for place, buffers in self.buffers:  # no_trace leaves new ones
                place.clear()
                place.update(buffers)
            for parameter, value in self.parameters:
                if not same(parameter, value):
                    parameter.data.copy_(value)

    def forward(self, x: State | None = None) -> State:
        return self._state_from("forward", call, self.x if x is None else x)

    def inverse(self, y: State) -> State:
        return self._state_from("inverse", call_inverse, y)

    def _state_from(self, name: str, direction: Callable[..., Any], given: State) -> State:
        with torch.no_grad():
            state = self.evaluate(direction, given)
        if not is_state(state):
            expected = "expected a tensor or a tuple of tensors"
            self.fail("state", f"{name} returned {describe(state)}, {expected}.")
        result: State = state
        return result

    def fail(self, law: str, message: str) -> NoReturn:
        raise InversecheckError(f"{type(self.layer).__name__} breaks the law {law!r}: {message}")

    def require_close(
        self, law: str, found: State, expected: State, what: str, other_end: State
    ) -> None:
        """Fails unless two states agree, and names the worst place.

        Rounding is relative to the largest number on the way, of which both ends are seen.
        """
        if shapes(found) != shapes(expected):
            self.fail(law, f"{what} is {describe(found)}, expected {describe(expected)}.")
        scale = max(magnitude(part) for part in tensors((expected, other_end)))
        allowed = self.tolerance * scale
        for stream, (one, other) in enumerate(zip(tensors(found), tensors(expected), strict=True)):
            error = distance(one, other)
            if error.numel() == 0:
                continue
            # NaN counts as the worst error, so not "largest > allowed".
            error = error.nan_to_num(nan=float("inf"), posinf=float("inf"))
            largest = error.max().item()
            if not largest <= allowed:
                place = tuple(
                    int(i) for i in torch.unravel_index(error.argmax(), tuple(error.shape))
                )
                of = f" of stream {stream}" if isinstance(expected, tuple) else ""
                self.fail(
                    law,
                    f"{what} is wrong by {largest:.3g} at index {place}{of} (expected "
                    f"{other[place].item():.6g}, got {one[place].item():.6g}); allowed is "
                    f"{allowed:.3g}, {self.tolerance:.2g} times the largest magnitude.",
                )
