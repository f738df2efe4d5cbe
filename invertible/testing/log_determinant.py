"""The law of the log-determinant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._support.checks import describe
from ..direction import Direction
from ..module import call, call_inverse
from ..state import State, tensors
from .states import by_example, count, is_state
from .subject import Subject

# The Jacobian takes a backward pass a number: at most so many in a state.
JACOBIAN_LIMIT = 256


def log_determinant(subject: Subject) -> None:
    """Compares both log-determinants with the Jacobian that autograd gives."""
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
        if subject.dtype.is_floating_point and 0 < count(state) <= JACOBIAN_LIMIT:
            _compare_with_jacobian(subject, name, plain, state, log_det)


def _with_log_det(subject: Subject, name: str, state: State) -> Any:
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
        and is_state(result[0])
        and isinstance(result[1], Tensor)
    )


def _compare_with_jacobian(
    subject: Subject, name: str, direction: Callable[..., Any], state: State, log_det: Tensor
) -> None:
    batch = log_det.shape[0]

    def function(*leaves: Tensor) -> Tensor:
        given = leaves if isinstance(state, tuple) else leaves[0]
        return by_example(subject.evaluate(direction, given))

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


def _couples_examples(jacobian: Tensor) -> bool:
    """Whether an example depends on another, as behind batch statistics."""
    batch = jacobian.shape[0]
    return any(jacobian[n, :, m].any() for n in range(batch) for m in range(batch) if n != m)
