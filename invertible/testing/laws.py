"""The laws that every layer keeps, each a function of the layer at one input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._support.checks import describe
from ..module import InvertibleModule
from ..state import Context, State, tensors, version
from .gradients import derivative, differentiable, rebuilding
from .log_determinant import log_determinant, require_opposite, require_same_log_det
from .states import (
    copied,
    examples,
    formats,
    in_other_format,
    kinds,
    listed,
    magnitude,
    mapped,
    rounded,
    same,
    shuffled,
    sliced,
    with_a_zero,
)
from .subject import InversecheckError, Subject
from .traces import no_trace

# Layers that only move numbers keep every grid: this one is tried.
ANY_QUANTUM = 2.0**-10


def state(subject: Subject) -> None:
    """Both directions return states, which ``subject.y`` and ``inverse`` look at."""
    subject.inverse(subject.y)


def dtype_and_device(subject: Subject) -> None:
    """Compares what comes out with what went in."""
    expected = kinds(subject.x)
    for direction, result in (("forward", subject.y), ("inverse", subject.inverse(subject.y))):
        if not kinds(result) <= expected:
            subject.fail(
                f"{direction} returned {listed(kinds(result))}, expected {listed(expected)}."
            )


def input_untouched(subject: Subject) -> None:
    """Looks for writes into what the methods are given, even of the same numbers."""
    changed: list[str] = []

    def look(layer: InvertibleModule, given: State, context: Context) -> None:
        parts = {"its argument": given, "the context": context}
        before = {what: (copied(part), _versions(part)) for what, part in parts.items()}
        run.direction.apply(layer, given, context)
        changed.extend(
            what
            for what, part in parts.items()
            if _versions(part) != before[what][1] or not same(part, before[what][0])
        )

    for run in subject.runs:
        for with_grad in subject.grad_modes:  # a layer can write with grad only
            given, context = subject.sources(run.given)[:2] if with_grad else (run.given, None)
            with torch.set_grad_enabled(with_grad):
                subject.evaluate(look, given, context)
            if changed:
                subject.fail(f"{run.name} changed {' and '.join(changed)} in place.")


def _versions(state: Any) -> list[int]:
    return [version(part) for part in tensors(state)]


def inverse_undoes_forward(subject: Subject) -> None:
    """Inverts with the layer, at a zero too, and with a copy that never ran forward."""
    what = "inverse(forward(x))"
    subject.require_close(subject.inverse(subject.y), subject.x, what, subject.y)
    _try_a_zero(subject)
    if subject.fresh is None:
        return
    what += ", inverted by a copy of the layer that has not run forward,"
    try:
        found = subject.inverse(subject.y, layer=subject.fresh)
    except Exception as error:
        subject.fail(f"{what} raised {_said(error)}", cause=error)
    subject.require_close(found, subject.x, what, subject.y)


def _try_a_zero(subject: Subject) -> None:
    """Inverts a state in which a number of each stream is zero, if that is in its domain."""
    x = with_a_zero(subject.x)
    if x is None:
        return
    try:
        y = subject.forward(x)
        back = subject.inverse(y)
    except Exception:
        return
    if all(bool(part.isfinite().all()) for part in tensors((y, back))):
        subject.require_close(back, x, "with a zero in x, inverse(forward(x))", y)


def forward_undoes_inverse(subject: Subject) -> None:
    """Starts from an output that the layer did not make, if it is bijective."""
    if not subject.layer.surjective:
        return
    y = subject.other_y
    x = subject.inverse(y)
    what = "the layer calls itself bijective, and forward(inverse(y))"
    subject.require_close(subject.forward(x), y, what, x)


def exact_on_the_grid(subject: Subject) -> None:
    """Compares bits, in both directions, for a layer that promises them."""
    if not (subject.layer.exact and subject.differentiable):
        return
    quantum = subject.quantum or ANY_QUANTUM
    limit = quantum / torch.finfo(subject.dtype).eps
    starts: list[tuple[str, str, State]] = [("forward", "inverse", rounded(subject.x, quantum))]
    if subject.layer.surjective:
        other = rounded(
            shuffled(subject.y) if subject.given_y is None else subject.given_y, quantum
        )
        starts.append(("inverse", "forward", other))
    for there, back, start in starts:
        middle: State = getattr(subject, there)(start)
        if max(map(magnitude, tensors((start, middle)))) >= limit:
            continue  # sums are not exact there
        if not same(middle, rounded(middle, quantum)):
            subject.fail(f"{there} takes multiples of {quantum!r} off the grid.")
        if any(bool(((x == 0) & x.signbit()).any()) for x in tensors(middle)):
            subject.fail(
                f"{there} makes -0.0, and a sum gives back 0.0: other bits. Return y + 0.0."
            )
        found = getattr(subject, back)(middle)
        if not same(found, start):
            error = max(
                magnitude(a - b) for a, b in zip(tensors(found), tensors(start), strict=True)
            )
            subject.fail(
                f"{back} does not undo {there} bit for bit on the grid of multiples of "
                f"{quantum!r}: it is wrong by up to {error:.3g}."
            )


def memory_format(subject: Subject) -> None:
    """Looks at strides, and tries the state in other layouts."""
    _require_format(subject, subject.x, subject.y)
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "a state in the other memory format": in_other_format,
        "a state sliced from one with more channels": sliced,
    }
    for what, layout in layouts.items():
        x = mapped(layout, subject.x)
        if all(
            a.stride() == b.stride() for a, b in zip(tensors(x), tensors(subject.x), strict=True)
        ):
            continue
        try:
            y = _undone(subject, x, subject.y, f"given {what}")
        except InversecheckError:
            raise
        except Exception as error:
            subject.fail(f"given {what}, it raised {_said(error)}", cause=error)
        if layout is in_other_format:
            _require_format(subject, x, y)


def _require_format(subject: Subject, x: State, y: State) -> None:
    for direction, given, result in (("forward", x, y), ("inverse", y, subject.inverse(y))):
        for rank in (4, 5):
            expected, found = formats(given, rank), formats(result, rank)
            if len(expected) == 1 and None not in expected and not found <= {*expected, None}:
                subject.fail(f"{direction} returned {listed(found)}, expected {listed(expected)}.")


def batch_size(subject: Subject) -> None:
    """Tries few examples, half of them and one more, unless they depend on each other."""
    batch = subject.batch
    try:
        if batch == 0 or subject.couples_examples:
            return
        for count in sorted({1, 2, 3, batch // 2, batch + 1} - {0, batch}):
            _try_examples(subject, [i % batch for i in range(count)])
    except InversecheckError:
        raise
    except Exception as error:
        # Whether a context belongs to the examples, and can be cut, only the layer knows.
        if not subject.layer.conditional:
            subject.fail(
                f"with another batch size than {batch}, it raised {_said(error)}", cause=error
            )


def _try_examples(subject: Subject, index: list[int]) -> None:
    given = f"with a batch of {len(index)} in place of {subject.batch}"
    x, y, context = (
        examples(part, index, subject.batch) for part in (subject.x, subject.y, subject.context)
    )
    # A part of a context can mean something else than the whole.
    comparable = not subject.layer.conditional
    y = _undone(subject, x, y, given, context, comparable=comparable)
    log_dets = []
    for run in subject.runs:
        if run.log_det is None:
            continue
        with torch.no_grad():
            start = y if run.direction.inverted else x
            _, found = subject.evaluate(run.direction.apply, start, context)
        what = f"{given}, that of {run.name}"
        expected = examples(run.log_det, index, subject.batch)
        if found.shape != expected.shape:
            subject.fail(f"{what} is {describe(found)}, expected {describe(expected)}.")
        if comparable and subject.comparable:
            require_same_log_det(subject, found, expected, start, what)
        log_dets.append(found)
    if len(log_dets) == 2:
        there, back = log_dets
        require_opposite(subject, there, back, x, f"{given}, ")


def _undone(
    subject: Subject,
    x: State,
    y: State,
    given: str,
    context: Context = None,
    *,
    comparable: bool = True,
) -> State:
    """Runs a variant of the state forward, which must lead to y, and back."""
    found = subject.forward(x, context)
    if comparable and subject.comparable:
        subject.require_close(found, y, f"{given}, forward(x)", x)
    back = subject.inverse(found, context)
    subject.require_close(back, x, f"{given}, inverse(forward(x))", found)
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# In this order, the law that explains a violation best speaks first.
LAWS: dict[str, Callable[[Subject], None]] = {
    "state": state,
    "dtype and device": dtype_and_device,
    "input untouched": input_untouched,
    "inverse undoes forward": inverse_undoes_forward,
    "forward undoes inverse": forward_undoes_inverse,
    "exact on the grid": exact_on_the_grid,
    "memory format": memory_format,
    "no trace": no_trace,
    "differentiable": differentiable,
    "derivative": derivative,
    "log-determinant": log_determinant,
    "batch size": batch_size,
    "rebuilding": rebuilding,
}
