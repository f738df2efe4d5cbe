"""A layer at one input, as the laws look at it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._support.checks import describe
from .._support.no_trace import no_trace
from ..direction import Direction, call, call_inverse
from ..module import InvertibleModule
from ..state import Context, State, tensors
from .evaluator import Evaluator, fresh_copy
from .states import (
    copied,
    detached,
    distance,
    examples,
    is_state,
    leaves_of,
    magnitude,
    mapped,
    rounded,
    shapes,
    shuffled,
    weights,
)


class InversecheckError(AssertionError):
    """A layer breaks a law; the message names the law, the place and the size."""


class Run(NamedTuple):
    """One of the layer's methods, what it was given, and what it returned without grad."""

    name: str
    direction: Direction
    given: State
    state: State
    log_det: Tensor | None


class Subject:
    """A layer at one input, evaluated without a trace."""

    def __init__(
        self,
        layer: InvertibleModule,
        x: State,
        context: Context,
        y: State | None,
        tolerance: float | None,
    ) -> None:
        self.layer = layer
        self.law = "state"
        self.context = context
        self.dtype = next(tensors(x)).dtype
        self.differentiable = self.dtype.is_floating_point
        rounds = self.differentiable or self.dtype.is_complex
        eps = torch.finfo(self.dtype).eps if rounds else 0.0
        self.tolerance = eps ** (2 / 3) if tolerance is None else tolerance
        self.quantum = layer.quantum
        self.x = rounded(detached(x), self.quantum)
        self.given_y = None if y is None else rounded(detached(y), self.quantum)
        if any(map(is_lazy, layer.parameters())):
            with torch.no_grad(), no_trace(layer, (x, context)):
                call(layer, copied(self.x), copied(context))
        self.evaluator = Evaluator(layer)
        # A layer that never ran forward: what forward leaves behind can't help its inverse.
        self.fresh = fresh_copy(layer)

    def evaluate(
        self,
        run: Callable[..., Any],
        state: State,
        context: Context = None,
        layer: InvertibleModule | None = None,
    ) -> Any:
        """Runs the layer on copies of a state and a context, by default its own."""
        context = self.context if context is None else context
        return self.evaluator(run, layer or self.layer, state, context)

    @property
    def draws(self) -> bool:
        """Whether random numbers were drawn so far."""
        return self.evaluator.draws

    @property
    def modules(self) -> list[nn.Module]:
        """The layer and all modules in it."""
        return self.evaluator.modules

    @cached_property
    def y(self) -> State:
        """``forward(x)``."""
        return self.forward(self.x)

    @cached_property
    def other_y(self) -> State:
        """An output that the layer did not make: the one given, or the numbers of y, shuffled."""
        return shuffled(self.y) if self.given_y is None else self.given_y

    @cached_property
    def runs(self) -> list[Run]:
        """Both directions, without log-determinants and with those that the layer itself defines.

        What is wrong with the form of a log-determinant is for its own law to say.
        """
        runs = [
            Run("forward", Direction(), self.x, self.y, None),
            Run("inverse", Direction(inverted=True), self.y, self.inverse(self.y), None),
        ]
        for plain in list(runs):
            name = f"{plain.name}_and_log_det"
            if getattr(type(self.layer), name) is getattr(InvertibleModule, name):
                continue
            direction = plain.direction._replace(log_det=True)
            try:
                with torch.no_grad():
                    state, log_det = self.evaluate(direction.apply, plain.given)
            except Exception:
                continue
            if is_state(state) and getattr(log_det, "shape", None) == (self.batch,):
                runs.append(Run(name, direction, plain.given, state, log_det))
        return runs

    @property
    def grad_modes(self) -> tuple[bool, ...]:
        """Without grad and, where there are gradients, with it."""
        return (False, True) if self.differentiable else (False,)

    @property
    def batch(self) -> int:
        """How many examples there are."""
        return next(tensors(self.x)).shape[0]

    @cached_property
    def rounds(self) -> float:
        """The coarsest grid that a part of the layer rounds to; 0 if none rounds."""
        layers = (part for part in self.modules if isinstance(part, InvertibleModule))
        return max((part.quantum or 0.0 for part in layers), default=0.0)

    @property
    def comparable(self) -> bool:
        """Whether variants of the state must lead to the same numbers.

        Random numbers fall elsewhere, and what is rounded can be off by a quantum.
        """
        return not (self.draws or self.rounds)

    @cached_property
    def couples_examples(self) -> bool:
        """Whether an example depends on another, as behind batch statistics."""
        if any(map(_takes_batch_statistics, self.modules)) or not self.differentiable:
            return True
        # A single example can't tell: it is taken twice.
        every = [*range(self.batch), *[0] * (self.batch == 1)]
        x = detached(examples(self.x, every, self.batch), requires_grad=True)
        context = examples(self.context, every, self.batch)
        with torch.enable_grad():
            y = list(tensors(self.evaluate(call, x, context)))
            if any(part.shape[:1] != (len(every),) for part in y):
                return True
            first = [part[0] for part in y if part.requires_grad]
            gradients = torch.autograd.grad(
                first, list(tensors(x)), weights(first), allow_unused=True
            )
        return any(bool(g[1:].any()) for g in gradients if g is not None)

    def forward(self, x: State, context: Context = None) -> State:
        """``forward`` of a state, without grad."""
        return self._state_from("forward", call, x, context)

    def inverse(
        self, y: State, context: Context = None, layer: InvertibleModule | None = None
    ) -> State:
        """``inverse`` of a state, without grad."""
        return self._state_from("inverse", call_inverse, y, context, layer)

    def _state_from(
        self,
        name: str,
        direction: Callable[..., Any],
        given: State,
        context: Context,
        layer: InvertibleModule | None = None,
    ) -> State:
        with torch.no_grad():
            state = self.evaluate(direction, given, context, layer)
        if not is_state(state):
            expected = "expected a tensor or a tuple of tensors"
            self.fail(f"{name} returned {describe(state)}, {expected}.", law="state")
        result: State = state
        return result

    def sources(self, state: State) -> tuple[State, Any, dict[str, Tensor]]:
        """Leaves for a state and a context, and beside the state all that gradients flow to."""
        given = detached(state, requires_grad=True)
        context, found = leaves_of(self.context)
        others: dict[str, Tensor] = {
            f"parameter {name}": parameter
            for name, parameter in self.layer.named_parameters()
            if parameter.requires_grad
        }
        several = len(found) > 1
        others |= {f"the context{f' ({i})' * several}": leaf for i, leaf in enumerate(found)}
        return given, context, others

    def in_float64(self, x: State) -> Subject | None:
        """A copy of the layer in float64 at a state, if the layer can be copied and cast."""
        try:
            layer = copy.deepcopy(self.layer).double()
            wide = Subject(layer, mapped(_double, x), mapped(_double, self.context), None, None)
            wide.law = self.law
            wide.forward(wide.x)
        except Exception:
            return None
        return wide

    def fail(
        self, message: str, *, law: str | None = None, cause: Exception | None = None
    ) -> NoReturn:
        """Raises what is wrong, under the law that is being checked."""
        raise InversecheckError(
            f"{type(self.layer).__name__} breaks the law {law or self.law!r}: {message}"
        ) from cause

    def require_close(self, found: State, expected: State, what: str, other_end: State) -> None:
        """Fails unless two states agree, and names the worst place.

        Rounding is relative to the largest number on the way, of which both ends are seen.
        """
        if shapes(found) != shapes(expected):
            self.fail(f"{what} is {describe(found)}, expected {describe(expected)}.")
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
                    f"{what} is wrong by {largest:.3g} at index {place}{of} (expected "
                    f"{other[place].item():.6g}, got {one[place].item():.6g}); allowed is "
                    f"{allowed:.3g}, {self.tolerance:.2g} times the largest magnitude."
                )


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _takes_batch_statistics(module: nn.Module) -> bool:
    # Its gradient does not tell while its gain is zero.
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )
