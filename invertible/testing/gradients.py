"""The laws of gradients: of both directions in a row, of each, and of rebuilt activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..composition import InvertibleSequential
from ..direction import Direction, call, call_inverse
from ..module import InvertibleModule
from ..state import Context, State, tensors
from .differences import require_derivative
from .states import detached, magnitude, weights
from .subject import Run, Subject


def differentiable(subject: Subject) -> None:
    """Takes the gradients of both directions in a row, which are those of the identity."""
    if not subject.differentiable:
        return
    _require_identity(subject, "inverse(forward(x))", (call, call_inverse), subject.x)
    if subject.layer.surjective:
        start = subject.other_y
        _require_identity(subject, "forward(inverse(y))", (call_inverse, call), start)


def derivative(subject: Subject) -> None:
    """Compares the gradients of forward with finite differences.

    Those of inverse follow, as the identity has the right ones.
    """
    if subject.differentiable:
        require_derivative(subject, Direction(), subject.x, "forward")


def _require_identity(
    subject: Subject, what: str, directions: tuple[Callable[..., Any], ...], start: State
) -> None:
    there, back = directions
    given, context, others = subject.sources(start)
    leaves, extra = list(tensors(given)), list(others.values())
    with torch.enable_grad():
        # In two pieces, so that the terms that must cancel are seen: they tell their size.
        middle = subject.evaluate(there, given, context)
        cut = detached(middle, requires_grad=True)
        end = subject.evaluate(back, cut, context)
    subject.require_close(end, given, f"with grad, {what}", middle)
    ends = list(tensors(end))
    if not all(part.requires_grad for part in ends):
        subject.fail(f"no gradient flows through {what}.")
    upstream = weights(ends)
    last = _gradients(ends, [*tensors(cut), *extra], upstream)
    joints = [
        (part, gradient)
        for part, gradient in zip(tensors(middle), last, strict=False)
        if part.requires_grad and gradient is not None
    ]
    parts, inner = [part for part, _ in joints], [gradient for _, gradient in joints]
    first = _gradients(parts, [*leaves, *extra], inner)
    _require_weights(subject, what, given, first[: len(leaves)], upstream)
    found = zip(others, first[len(leaves) :], last[-len(extra) or len(last) :], strict=True)
    terms = {name: pair for name, *pair in found}
    _require_cancelled(subject, what, terms, upstream, (given, middle))


def _gradients(
    outputs: list[Tensor], inputs: list[Tensor], upstream: list[Tensor]
) -> list[Tensor | None]:
    if not outputs or not inputs:
        return [None] * len(inputs)
    gradients = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return [None if g is None else g.to_dense() for g in gradients]


def _require_weights(
    subject: Subject,
    what: str,
    given: State,
    gradients: list[Tensor | None],
    upstream: list[Tensor],
) -> None:
    allowed = _tolerance(subject)
    for stream, (gradient, weight) in enumerate(zip(gradients, upstream, strict=True)):
        of = f" stream {stream} of" if isinstance(given, tuple) else ""
        if gradient is None:
            subject.fail(f"no gradient reaches{of} the input through {what}.")
        error = ((gradient - weight).norm() / weight.norm().clamp_min(1e-30)).item()
        if not error <= allowed:
            subject.fail(
                f"the gradient of {what} with respect to{of} the input is wrong by {error:.3g} of "
                f"its norm; allowed is {allowed:g}."
            )


def _require_cancelled(
    subject: Subject, what: str, terms: dict[str, Any], upstream: list[Tensor], ends: Any
) -> None:
    """Fails unless what goes through forward and what goes through inverse cancel."""
    present = {name: [g for g in pair if g is not None] for name, pair in terms.items()}
    largest = max((g.norm().item() for pair in present.values() for g in pair), default=0.0)
    # A gradient of nothing but rounding errors, such as a bias's in front of BatchNorm.
    size = max([1.0, *(magnitude(part) for part in tensors(ends))])
    rounding = 1e3 * torch.finfo(subject.dtype).eps * size
    rounding *= sum(weight.norm().item() for weight in upstream)
    allowed = _tolerance(subject) * largest + rounding
    for name, pair in present.items():
        error = torch.stack(pair).sum(0).norm().item() if pair else 0.0
        if not error <= allowed:
            subject.fail(
                f"{what} does not depend on {name}, and its gradient is {error:.3g}, where the "
                f"gradients of the two directions are up to {largest:.3g}; allowed is "
                f"{allowed:.3g}."
            )


def _tolerance(subject: Subject) -> float:
    """Largest error of a gradient, relative to its norm."""
    return 1e-6 if subject.dtype == torch.float64 else 0.1


def rebuilding(subject: Subject) -> None:
    """Compares the gradients of reversible checkpointing with those of stored activations."""
    if not subject.differentiable:
        return
    container = InvertibleSequential(subject.layer, checkpoint=True)
    for run in subject.runs:
        if run.direction.inverted and not subject.layer.surjective:
            continue
        expected = _weighted(subject, run, subject.layer)
        try:
            found = _weighted(subject, run, container)
        except Exception as error:
            subject.fail(f"{run.name} cannot be rebuilt: {error}", cause=error)
        norm = max((gradient.norm().item() for gradient in expected.values()), default=0.0)
        allowed = _tolerance(subject) * norm
        for what, gradient in expected.items():
            difference = (found[what] - gradient).norm().item()
            if not difference <= allowed:
                subject.fail(
                    f"reversible checkpointing of {run.name} makes the gradient of {what} wrong by "
                    f"{difference:.3g}; allowed is {allowed:.3g}. Check how the layer is rebuilt."
                )


def _weighted(subject: Subject, run: Run, module: InvertibleModule) -> dict[str, Tensor]:
    """Gradients of a weighted sum of what a method returns, by what they are of."""
    given, context, others = subject.sources(run.given)
    sources = {f"stream {i} of the input": leaf for i, leaf in enumerate(tensors(given))} | others

    def gradients(_: InvertibleModule, state: State, context: Context) -> tuple[Tensor, ...]:
        results = tensors(run.direction.apply(module, state, context))
        outputs = [part for part in results if part.requires_grad]
        return torch.autograd.grad(
            outputs, list(sources.values()), weights(outputs), materialize_grads=True
        )

    with torch.enable_grad():
        return dict(zip(sources, subject.evaluate(gradients, given, context), strict=True))
