"""The laws of a layer, checked in the manner of ``torch.autograd.gradcheck``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._support.checks import describe
from .._support.generators import accelerators, get_rng_states, same_rng_states
from .._support.memory_format import memory_format
from .._support.no_trace import no_trace
from ..checkpointing.checkpoint import reversible_checkpoint
from ..composition.inverse import Inverse
from ..direction import Direction, call, call_inverse
from ..module import InvertibleModule
from ..state import State, tensors

# The Jacobian takes a backward pass a number: at most so many in a state.
JACOBIAN_LIMIT = 256


class InversecheckError(AssertionError):
    """A layer breaks a law; the message names the law, the place and the size."""


def inversecheck(
    layer: InvertibleModule,
    x: State,
    context: Any = None,
    *,
    y: State | None = None,
    tolerance: float | None = None,
    laws: Collection[str] | None = None,
    raise_exception: bool = True,
) -> bool:
    r"""Checks that a layer keeps the laws of :class:`invertible.InvertibleModule` at one input.

    The laws, by name:

    - ``state``: both directions return a tensor or a tuple of tensors.
    - ``dtype and device`` go through.
    - ``input untouched``: neither direction changes its argument or the context in place.
    - ``inverse undoes forward``, and for a bijective layer ``forward undoes inverse``, starting
      from ``y``.
    - ``memory format`` goes through.
    - ``no trace``: after ``inverse``, the buffers, the parameters, the modes and the random
      generators are what they were.
    - ``differentiable``: the gradient of ``inverse(forward(x))`` is that of the identity, within
      1e-6 in float64 and within 0.1 in other dtypes, where rounding flips the masks of ReLUs.
    - ``rebuilding``: :func:`invertible.reversible_checkpoint` gives the gradients of stored
      activations, in both directions, for the state and all parameters, as closely.
    - ``log-determinant``: it has the shape :math:`(N,)`, comes with the same output as
      ``forward`` does and agrees with the Jacobian that autograd gives, which is computed for
      states of at most 256 numbers. Passed over for a layer that defines none.

    The layer is checked in the mode that it is in; check twice for train and eval mode. Each
    evaluation starts from the same buffers and the same random state, so that a layer with
    dropout draws one mask. (A composition of several draws their masks in the other order when
    it is inverted: check it in eval mode.) Nothing is left behind, whatever the layer does:
    parameters, gradients, buffers, modes and generators are untouched.

    Args:
        layer: The layer to check.
        x: An input. Take float64 for tight tolerances, and a memory format other than the
            default to see it go through.
        context: What a conditional layer takes as its second argument.
        y: An output for ``forward undoes inverse``; by default the numbers of ``layer(x)``,
            shuffled.
        tolerance: Largest error allowed, relative to the largest magnitude in the states;
            ``eps ** (2/3)`` of the dtype by default: 4e-11 in float64, 2e-5 in float32.
        laws: Names of the laws to check; all by default.
        raise_exception: Whether a violation raises; otherwise it is returned.

    Returns:
        True when all laws hold, False when one is broken and ``raise_exception`` is False.

    Raises:
        InversecheckError: If a law is broken.
        TypeError: If ``layer`` is not an :class:`invertible.InvertibleModule`, or ``x`` or ``y``
            not a state.
        ValueError: If ``laws`` has an unknown name.

    Example:
        >>> layer = PixelUnshuffle(2)
        >>> from invertible.testing import inversecheck
        >>> inversecheck(layer, torch.randn(1, 3, 4, 4, dtype=torch.float64))
        True
    """
    names = LAWS if laws is None else [laws] if isinstance(laws, str) else laws
    unknown = set(names) - set(LAWS)
    if unknown:
        raise ValueError(f"inversecheck knows the laws {list(LAWS)}, got {sorted(unknown)}.")
    if not isinstance(layer, InvertibleModule):
        raise TypeError(
            f"inversecheck takes an invertible layer, got {describe(layer)}. Subclass "
            "InvertibleModule."
        )
    for state in (x,) if y is None else (x, y):
        if not _is_state(state):
            raise TypeError(
                f"inversecheck takes a tensor or a tuple of tensors, got {describe(state)}."
            )
    subject = _Subject(layer, x, context, y, tolerance)
    try:
        for name in names:
            LAWS[name](subject)
    except InversecheckError:
        if raise_exception:
            raise
        return False
    return True


class _Subject:
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
        self.x = _detached(x)
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
                return direction(self.layer, _copied(state), self.context)
        finally:
            for part, mode in self.modes:
                part.training = mode
            for place, buffers in self.buffers:  # no_trace leaves new ones
                place.clear()
                place.update(buffers)
            for parameter, value in self.parameters:
                if not _same(parameter, value):
                    parameter.data.copy_(value)

    def forward(self, x: State | None = None) -> State:
        return self._state_from("forward", call, self.x if x is None else x)

    def inverse(self, y: State) -> State:
        return self._state_from("inverse", call_inverse, y)

    def _state_from(self, name: str, direction: Callable[..., Any], given: State) -> State:
        with torch.no_grad():
            state = self.evaluate(direction, given)
        if not _is_state(state):
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
        if _shapes(found) != _shapes(expected):
            self.fail(law, f"{what} is {describe(found)}, expected {describe(expected)}.")
        scale = max(_magnitude(part) for part in tensors((expected, other_end)))
        allowed = self.tolerance * scale
        for stream, (one, other) in enumerate(zip(tensors(found), tensors(expected), strict=True)):
            error = _distance(one, other)
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


def _state(subject: _Subject) -> None:
    subject.inverse(subject.forward())


def _inverse_undoes_forward(subject: _Subject) -> None:
    y = subject.forward()
    found = subject.inverse(y)
    subject.require_close("inverse undoes forward", found, subject.x, "inverse(forward(x))", y)


def _forward_undoes_inverse(subject: _Subject) -> None:
    if not subject.layer.bijective:
        return
    y = subject.given_y if subject.given_y is not None else _shuffled(subject.forward())
    x = subject.inverse(y)
    subject.require_close(
        "forward undoes inverse",
        subject.forward(x),
        y,
        "the layer calls itself bijective, and forward(inverse(y))",
        x,
    )


def _dtype_and_device(subject: _Subject) -> None:
    y = subject.forward()
    expected = _kinds(subject.x)
    for direction, state in (("forward", y), ("inverse", subject.inverse(y))):
        if not _kinds(state) <= expected:
            subject.fail(
                "dtype and device",
                f"{direction} returned {_listed(_kinds(state))}, expected {_listed(expected)}.",
            )


def _memory_format(subject: _Subject) -> None:
    y = subject.forward()
    for direction, given, state in (
        ("forward", subject.x, y),
        ("inverse", y, subject.inverse(y)),
    ):
        for rank in (4, 5):
            expected, found = _formats(given, rank), _formats(state, rank)
            if len(expected) == 1 and None not in expected and not found <= {*expected, None}:
                subject.fail(
                    "memory format",
                    f"{direction} returned {_listed(found)}, expected {_listed(expected)}.",
                )


def _input_untouched(subject: _Subject) -> None:
    y = subject.forward()
    for name, direction, state in (("forward", call, subject.x), ("inverse", call_inverse, y)):
        changed: list[str] = []

        def look(
            layer: InvertibleModule,
            state: State,
            context: Any,
            direction: Callable[..., Any] = direction,
            changed: list[str] = changed,
        ) -> None:
            given = {"its argument": state, "the context": context}
            before = {what: _values(part) for what, part in given.items()}
            direction(layer, state, context)
            changed += [
                what for what, part in given.items() if not _same(_values(part), before[what])
            ]

        with torch.no_grad():
            subject.evaluate(look, state)
        if changed:
            subject.fail("input untouched", f"{name} changed {' and '.join(changed)} in place.")


def _no_trace(subject: _Subject) -> None:
    changed: list[str] = []

    def look(layer: InvertibleModule, y: State, context: Any) -> None:
        devices = accelerators((y, context))
        rng = get_rng_states(devices)
        values = {name: value.clone() for name, value in _named_tensors(layer)}
        modes = {name: part.training for name, part in layer.named_modules()}
        call_inverse(layer, y, context)
        changed.extend(
            name
            for name, value in _named_tensors(layer)
            if name not in values or not _same(value, values[name])
        )
        changed.extend(
            f"the mode of {name or 'the layer'}"
            for name, part in layer.named_modules()
            if part.training != modes.get(name)
        )
        if not same_rng_states(get_rng_states(devices), rng):
            changed.append("the random generator")

    y = subject.forward()
    with torch.no_grad():
        subject.evaluate(look, y)
    if changed:
        subject.fail(
            "no trace",
            f"inverse changed {', '.join(changed)}. Evaluate sub-networks in inverse with "
            "invertible.no_trace, in the mode that they are in.",
        )


def _differentiable(subject: _Subject) -> None:
    if not subject.dtype.is_floating_point:
        return
    law = "differentiable"
    x = _detached(subject.x, requires_grad=True)
    leaves = list(tensors(x))
    weights = _weights(leaves)
    with torch.enable_grad():
        back = list(tensors(subject.evaluate(call_inverse, subject.evaluate(call, x))))
        if not all(part.requires_grad for part in back):
            subject.fail(law, "no gradient flows through inverse(forward(x)).")
        gradients = torch.autograd.grad(back, leaves, weights, allow_unused=True)
    allowed = _gradient_tolerance(subject)
    for stream, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        of = f" stream {stream} of" if isinstance(x, tuple) else ""
        if gradient is None:
            subject.fail(law, f"no gradient reaches{of} the input through inverse(forward(x)).")
            continue
        error = ((gradient - weight).norm() / weight.norm().clamp_min(1e-30)).item()
        if not error <= allowed:
            subject.fail(
                law,
                f"the gradient of inverse(forward(x)) with respect to{of} the input is wrong by "
                f"{error:.3g} of its norm; allowed is {allowed:g}.",
            )


def _weights(parts: Sequence[Tensor]) -> list[Tensor]:
    """Random numbers in the shapes of some tensors, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(part.shape, generator=generator).to(part) for part in parts]


def _gradient_tolerance(subject: _Subject) -> float:
    """Largest error of a gradient, relative to its norm."""
    return 1e-6 if subject.dtype == torch.float64 else 0.1


def _rebuilding(subject: _Subject) -> None:
    if not subject.dtype.is_floating_point:
        return
    layer = subject.layer
    directions: list[tuple[str, InvertibleModule, State]] = [("forward", layer, subject.x)]
    if layer.bijective:
        directions.append(("inverse", Inverse(layer), subject.forward()))
    for name, module, state in directions:
        x = _detached(state, requires_grad=True)
        try:
            with torch.enable_grad():
                found, expected = (
                    subject.evaluate(partial(_gradients, run, module, list(tensors(x))), x)
                    for run in (reversible_checkpoint, call)
                )
        except RuntimeError as error:
            subject.fail("rebuilding", f"{name} cannot be rebuilt: {error}")
        norm = max((gradient.norm().item() for gradient in expected.values()), default=0.0)
        allowed = _gradient_tolerance(subject) * norm
        for what, gradient in expected.items():
            difference = (found[what] - gradient).norm().item()
            if not difference <= allowed:
                subject.fail(
                    "rebuilding",
                    f"reversible checkpointing of {name} makes the gradient of {what} wrong by "
                    f"{difference:.3g}; allowed is {allowed:.3g}. Check rebuild.",
                )


def _gradients(
    run: Callable[..., Any],
    module: InvertibleModule,
    inputs: Sequence[Tensor],
    layer: InvertibleModule,
    state: State,
    context: Any,
) -> dict[str, Tensor]:
    """Gradients of a weighted sum of a module's output, by what they are of."""
    sources = {f"stream {number} of the input": part for number, part in enumerate(inputs)}
    sources |= {name: p for name, p in layer.named_parameters() if p.requires_grad}
    outputs = [part for part in tensors(run(module, state, context)) if part.requires_grad]
    gradients = torch.autograd.grad(
        outputs, list(sources.values()), _weights(outputs), materialize_grads=True
    )
    return dict(zip(sources, gradients, strict=True))


def _log_determinant(subject: _Subject) -> None:
    law = "log-determinant"
    directions: Any = (
        ("forward", call, subject.x),
        ("inverse", call_inverse, subject.forward()),
    )
    results = {name: _with_log_det(subject, name, state) for name, _, state in directions}
    missing = [name for name, result in results.items() if result is None]
    if len(missing) == 2:
        return
    if missing:
        subject.fail(law, f"{missing[0]}_and_log_det is not defined, the other direction's is.")
    for name, plain, state in directions:
        method, result = f"{name}_and_log_det", results[name]
        batch = next(tensors(state)).shape[0]
        if not _is_state_and_tensor(result):
            subject.fail(
                law,
                f"{method} returned {describe(result)}, expected a state and a tensor of shape "
                f"({batch},).",
            )
        found, log_det = result
        with torch.no_grad():
            expected = subject.evaluate(plain, state)
        subject.require_close(law, found, expected, f"the state of {method}", state)
        if log_det.shape != (batch,):
            subject.fail(
                law, f"{method} returned one of shape {tuple(log_det.shape)}, expected ({batch},)."
            )
        if subject.dtype.is_floating_point and 0 < _count(state) <= JACOBIAN_LIMIT:
            _compare_with_jacobian(subject, name, plain, state, log_det)


def _with_log_det(subject: _Subject, name: str, state: State) -> Any:
    """What the log-determinant method of a direction returns, None if it is not defined."""
    direction = Direction(inverted=name == "inverse", log_det=True)
    try:
        with torch.no_grad():
            return subject.evaluate(direction.run, state)
    except NotImplementedError:
        return None


def _is_state_and_tensor(result: Any) -> bool:
    return (
        isinstance(result, tuple)
        and len(result) == 2
        and _is_state(result[0])
        and isinstance(result[1], Tensor)
    )


def _compare_with_jacobian(
    subject: _Subject, name: str, direction: Callable[..., Any], state: State, log_det: Tensor
) -> None:
    batch = log_det.shape[0]

    def function(*leaves: Tensor) -> Tensor:
        given = leaves if isinstance(state, tuple) else leaves[0]
        return _by_example(subject.evaluate(direction, given))

    with torch.enable_grad():
        rows = torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]
            function, tuple(tensors(state))
        )
    # (example, number, example, number), whatever the streams' shapes were
    jacobian = torch.cat([part.flatten(3) for part in rows], 3).double()
    size = jacobian.shape[1]
    if jacobian.shape[3] != size:
        subject.fail("log-determinant", f"the Jacobian of {name} is not square.")
    if batch > 1 and _couples_examples(jacobian):
        full = jacobian.reshape(batch * size, batch * size)
        expected, found = full.slogdet().logabsdet[None], log_det.double().sum()[None]
    else:
        blocks = torch.stack([jacobian[n, :, n] for n in range(batch)])
        expected, found = blocks.slogdet().logabsdet, log_det.double()
    error = (found - expected).abs().max().item()
    # A rounding error a number, and the Jacobian's own.
    allowed = 10 * subject.tolerance * size * max(1.0, expected.abs().max().item())
    # A singular Jacobian has -inf, and everything would be allowed.
    if not error <= allowed < float("inf"):
        subject.fail(
            "log-determinant",
            f"that of {name} is {found.tolist()}, the Jacobian's {expected.tolist()}; allowed is "
            f"a difference of {allowed:.3g}.",
        )


# In this order, the law that explains a violation best speaks first.
LAWS: dict[str, Callable[[_Subject], None]] = {
    "state": _state,
    "dtype and device": _dtype_and_device,
    "input untouched": _input_untouched,
    "inverse undoes forward": _inverse_undoes_forward,
    "forward undoes inverse": _forward_undoes_inverse,
    "memory format": _memory_format,
    "no trace": _no_trace,
    "differentiable": _differentiable,
    "rebuilding": _rebuilding,
    "log-determinant": _log_determinant,
}


def _is_state(state: Any) -> bool:
    parts = state if isinstance(state, tuple) else (state,)
    return len(parts) > 0 and all(isinstance(part, Tensor) for part in parts)


def _detached(state: State, *, requires_grad: bool = False) -> State:
    """A copy with the graph cut."""
    if isinstance(state, tuple):
        return tuple(_copy(part.detach()).requires_grad_(requires_grad) for part in state)
    return _copy(state.detach()).requires_grad_(requires_grad)


def _copied(state: State) -> State:
    return tuple(map(_copy, state)) if isinstance(state, tuple) else _copy(state)


def _copy(x: Tensor) -> Tensor:
    """A copy with the same strides: what was a slice is like a slice to the layer."""
    if 0 in x.stride():  # expanded: there is no writing into such strides
        return x.clone()
    return x.new_empty_strided(x.shape, x.stride()).copy_(x)


def _shuffled(state: State) -> State:
    """The same numbers in other places: an output that the layer did not make."""
    parts = list(tensors(state))
    numbers = torch.cat([part.flatten() for part in parts])
    generator = torch.Generator().manual_seed(0)
    numbers = numbers[torch.randperm(len(numbers), generator=generator).to(numbers.device)]
    pieces = torch.split(numbers, [part.numel() for part in parts])
    # empty_like keeps the memory format
    shuffled = [
        torch.empty_like(part).copy_(piece.view(part.shape))
        for part, piece in zip(parts, pieces, strict=True)
    ]
    return tuple(shuffled) if isinstance(state, tuple) else shuffled[0]


def _shapes(state: Any) -> Any:
    return tuple(map(_shapes, state)) if isinstance(state, tuple) else tuple(state.shape)


def _magnitude(x: Tensor) -> float:
    return x.double().abs().nan_to_num(posinf=0.0).max().item() if x.numel() else 0.0


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().double() if one.dtype.is_floating_point else (one != other).double()


def _kinds(state: State) -> set[str]:
    return {f"{part.dtype} on {part.device}" for part in tensors(state)}


def _formats(state: State, rank: int) -> set[torch.memory_format | None]:
    """The memory formats in a state; None where strides do not tell: one channel, one pixel."""
    return {
        memory_format(part) if part.shape[1] > 1 and part.shape[2:].numel() > 1 else None
        for part in tensors(state)
        if part.dim() == rank
    }


def _listed(things: Collection[object]) -> str:
    return ", ".join(sorted(map(str, things)))


def _values(state: Any) -> list[Tensor]:
    return [part.clone() for part in tensors(state)]


def _same(one: Any, other: Any) -> bool:
    """Whether two states or contexts hold the same numbers, NaN being one."""
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(tensors(one), tensors(other), strict=True)
    )


def _named_tensors(layer: InvertibleModule) -> list[tuple[str, Tensor]]:
    return [*layer.named_parameters(), *layer.named_buffers()]


def _count(state: State) -> int:
    return sum(part.numel() for part in tensors(state))


def _by_example(state: State) -> Tensor:
    """A state as ``(N, L)``: all numbers of an example in a row."""
    return torch.cat([part.flatten(1) for part in tensors(state)], 1)


def _couples_examples(jacobian: Tensor) -> bool:
    """Whether an example depends on another, as behind batch statistics."""
    batch = jacobian.shape[0]
    return any(jacobian[n, :, m].any() for n in range(batch) for m in range(batch) if n != m)
