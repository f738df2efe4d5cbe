"""The law of the log-determinant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._support.checks import describe
from ..direction import Direction
from ..state import State, tensors
from .differences import require_derivative
from .estimate import estimate_log_det
from .states import by_example, detached, is_state, weights
from .subject import Subject

# The Jacobian takes a backward pass a row: at most so many.
JACOBIAN_LIMIT = 1024
# Which are vectorized, so that small ones take little time, and large ones little memory.
ROWS_AT_ONCE = 64


def log_determinant(subject: Subject) -> None:
    """Compares both log-determinants with the Jacobian that autograd gives."""
    directions = {
        "forward": (Direction(log_det=True), subject.x),
        "inverse": (Direction(inverted=True, log_det=True), subject.y),
    }
    results = {
        name: _with_log_det(subject, direction, state)
        for name, (direction, state) in directions.items()
    }
    missing = [name for name, result in results.items() if result is None]
    if len(missing) == 2:
        return
    if missing:
        subject.fail(f"{missing[0]}_and_log_det is not defined, the other direction's is.")
    for name, (direction, state) in directions.items():
        method = f"{name}_and_log_det"
        log_det = _require_form(subject, method, results[name], direction, state)
        if subject.differentiable and log_det.numel():
            _compare_with_jacobian(subject, name, direction, state, log_det)
            if _defines(subject, method) and subject.layer.surjective:
                require_derivative(subject, direction, state, method)
    if subject.differentiable:
        there, back = (result[1] for result in results.values())
        require_opposite(subject, there, back, subject.x)


def require_same_log_det(
    subject: Subject,
    found: Tensor,
    expected: Tensor,
    state: State,
    what: str,
    whose: str = "expected",
) -> None:
    """Fails unless two log-determinants agree."""
    if not found.numel():
        return
    found, expected = found.double(), expected.double()
    error = (found - expected).abs().max().item()
    # A rounding error a number, and the Jacobian's own.
    size = by_example(state).shape[1]
    allowed = 10 * subject.tolerance * size * max(1.0, expected.abs().max().item())
    # A singular Jacobian has -inf, and everything would be allowed.
    if not error <= allowed < float("inf"):
        subject.fail(
            f"{what} is {found.tolist()}, {whose} {expected.tolist()}; allowed is a difference of "
            f"{allowed:.3g}."
        )


def require_opposite(
    subject: Subject, there: Tensor, back: Tensor, state: State, given: str = ""
) -> None:
    """Fails unless the log-determinants of both directions add up to zero."""
    what = f"{given}that of inverse, at forward(x),"
    require_same_log_det(subject, back, -there, state, what, "minus that of forward")


def _defines(subject: Subject, method: str) -> bool:
    return any(run.name == method for run in subject.runs)


def _with_log_det(subject: Subject, direction: Direction, state: State) -> Any:
    """What the log-determinant method of a direction returns, None if it is not defined."""
    try:
        with torch.no_grad():
            return subject.evaluate(direction.apply, state)
    except NotImplementedError:
        return None


def _require_form(
    subject: Subject, method: str, result: Any, direction: Direction, state: State
) -> Tensor:
    """The log-determinant, if it has the right form and comes with the right state."""
    batch = subject.batch
    pair = isinstance(result, tuple) and len(result) == 2
    if not (pair and is_state(result[0]) and isinstance(result[1], Tensor)):
        subject.fail(
            f"{method} returned {describe(result)}, expected a state and a tensor of shape "
            f"({batch},)."
        )
    found, log_det = result
    with torch.no_grad():
        expected, _ = subject.evaluate(direction._replace(log_det=False).apply, state)
    subject.require_close(found, expected, f"the state of {method}", state)
    if log_det.shape != (batch,):
        subject.fail(f"{method} returned one of shape {tuple(log_det.shape)}, expected ({batch},).")
    if subject.differentiable and log_det.dtype != torch.promote_types(
        log_det.dtype, subject.dtype
    ):
        subject.fail(
            f"{method} returned one of {log_det.dtype}, expected {subject.dtype} or a wider dtype."
        )
    result_log_det: Tensor = log_det
    return result_log_det


def _compare_with_jacobian(
    subject: Subject, name: str, direction: Direction, state: State, log_det: Tensor
) -> None:
    batch = subject.batch
    given = detached(state, requires_grad=True)
    size = by_example(given).shape[1]
    if not size:
        return
    if size > JACOBIAN_LIMIT:
        _compare_with_estimate(subject, name, direction, state, log_det)
        return
    with torch.enable_grad():
        output, _ = subject.evaluate(direction._replace(log_det=False).apply, given)
        outputs = by_example(output)
    if outputs.shape[1] != size:
        subject.fail(f"the Jacobian of {name} is not square.")
    leaves = list(tensors(given))
    if _couples_examples(outputs, leaves):
        if batch * size > JACOBIAN_LIMIT:
            _compare_with_estimate(subject, name, direction, state, log_det)
            return
        ones = torch.eye(batch * size, dtype=outputs.dtype, device=outputs.device)
        rows = _rows(outputs, leaves, ones.view(-1, batch, size))
        jacobian = rows.reshape(batch * size, batch * size)
        expected, found = jacobian.slogdet().logabsdet[None], log_det.double().sum()[None]
    else:  # a row of each example at once
        ones = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
        rows = _rows(outputs, leaves, ones[:, None].expand(-1, batch, -1))
        expected, found = rows.transpose(0, 1).slogdet().logabsdet, log_det.double()
    require_same_log_det(subject, found, expected, state, f"that of {name}", "the Jacobian's")


def _compare_with_estimate(
    subject: Subject, name: str, direction: Direction, state: State, log_det: Tensor
) -> None:
    # Finite differences tell too little in a narrow dtype, and nothing where a layer rounds.
    if subject.dtype != torch.float64 or subject.rounds or direction.inverted:
        return
    value, uncertainty = estimate_log_det(subject, direction, state)
    found = log_det.double().sum().item()
    allowed = uncertainty + 1e-6 * sum(part.numel() for part in tensors(state))
    if not abs(found - value) <= allowed < float("inf"):
        subject.fail(
            f"those of {name} add up to {found:.6g} over the batch, and that of its Jacobian is "
            f"about {value:.6g}; allowed is a difference of {allowed:.3g}."
        )


def _couples_examples(outputs: Tensor, leaves: list[Tensor]) -> bool:
    """Whether an example depends on another one here, as behind batch statistics."""
    if len(outputs) == 1 or not outputs.requires_grad:
        return False
    gradients = torch.autograd.grad(
        outputs[0], leaves, weights([outputs[0]]), retain_graph=True, allow_unused=True
    )
    return any(bool(g[1:].any()) for g in gradients if g is not None)


def _rows(outputs: Tensor, leaves: list[Tensor], ones: Tensor) -> Tensor:
    """Rows of the Jacobian, each for all examples: ``(rows, N, L)``."""
    if not outputs.requires_grad:
        return ones.new_zeros(ones.shape)

    def gradients(ones: Tensor, batched: bool) -> Tensor:
        found = torch.autograd.grad(
            outputs, leaves, ones, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        start = ones.shape[: int(batched)]
        parts = [
            leaf.new_zeros(start + leaf.shape) if g is None else g
            for leaf, g in zip(leaves, found, strict=True)
        ]
        return torch.cat([part.flatten(len(start) + 1) for part in parts], -1).double()

    try:
        return torch.cat([gradients(some, True) for some in torch.split(ones, ROWS_AT_ONCE)])
    except RuntimeError:  # not all that runs in a backward pass can be vectorized
        return torch.stack([gradients(row, False) for row in ones])
