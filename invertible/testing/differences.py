"""Gradients compared with finite differences, which know nothing of autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from ..direction import Direction
from ..module import InvertibleModule
from ..state import State, tensors
from .states import mapped, weights
from .subject import Subject

# By dtype: the step relative to the size of what is moved, the error allowed relative to the
# gradient, and by how much a layer may magnify rounding. Other dtypes are too coarse.
SETTINGS = {torch.float64: (2.0**-17, 1e-6, 1e3), torch.float32: (2.0**-6, 2e-2, 50.0)}
# Where a layer rounds, a step must cross many multiples of its quantum.
ROUNDING_STEP = 2.0**-4


def require_derivative(subject: Subject, direction: Direction, start: State, what: str) -> None:
    """Fails unless the gradients of a method are what finite differences make of it.

    State, parameters and context are moved one after the other, each in a random direction, and
    a weighted sum of what the method returns is looked at. Where it bends too much to tell,
    nothing is said: the differences to the left and to the right disagree, as at the kink of a
    ReLU.
    """
    if subject.dtype not in SETTINGS:
        return
    step, relative, magnified = SETTINGS[subject.dtype]
    given, context, others = subject.sources(start)
    groups = {"the input": list(tensors(given)), "the parameters": [], "the context": []}
    for name, leaf in others.items():
        groups["the parameters" if name.startswith("parameter") else "the context"].append(leaf)
    with torch.enable_grad():
        outputs = _run(subject, direction, given, context, {})
    factors = weights(outputs)
    gradients = _gradients(
        outputs, factors, [leaf for leaves in groups.values() for leaf in leaves]
    )
    noise = magnified * torch.finfo(subject.dtype).eps * _norm(outputs, factors)
    if subject.rounds:
        step, relative = ROUNDING_STEP, 0.1
        noise += 4 * subject.rounds * _norm(factors)
    for group, leaves in groups.items():
        moves = {id(leaf): move for leaf, move in zip(leaves, _moves(leaves), strict=True)}
        slopes = [(gradients[id(leaf)] * moves[id(leaf)]).double() for leaf in leaves]
        slope = sum(part.sum().item() for part in slopes)
        try:
            with torch.no_grad():
                behind, ahead = (
                    _run(
                        subject,
                        direction,
                        given,
                        context,
                        {key: sign * step * move for key, move in moves.items()},
                    )
                    for sign in (-1, 1)
                )
        except Exception:  # the edge of what the layer takes
            continue
        left = _weighted_sum(outputs, behind, factors) / -step
        right = _weighted_sum(outputs, ahead, factors) / step
        allowed = abs(right - left) + relative * _norm(slopes) + noise / step
        error = abs((left + right) / 2 - slope)
        if math.isfinite(allowed) and math.isfinite(left + right) and not error <= allowed:
            subject.fail(
                f"the gradient of {what} with respect to {group} is not its derivative: along a "
                f"random direction it is {slope:.6g}, and finite differences give "
                f"{(left + right) / 2:.6g}; allowed is a difference of {allowed:.3g}."
            )


def _run(
    subject: Subject, direction: Direction, state: State, context: Any, moves: dict[int, Tensor]
) -> list[Tensor]:
    """What a method returns for leaves that are moved, by their ids."""

    def moved(leaf: Tensor) -> Tensor:
        return leaf + moves[id(leaf)] if id(leaf) in moves else leaf

    def run(layer: InvertibleModule, state: Any, context: Any) -> Any:
        for part in subject.modules:
            if isinstance(part, ParametrizationList):  # no gradient follows a power iteration
                part.eval()
        for parameter in layer.parameters():
            if id(parameter) in moves:
                parameter.data.add_(moves[id(parameter)])
        return direction.run(layer, state, context)

    results = subject.evaluate(run, mapped(moved, state), mapped(moved, context))
    return [part for part in tensors(results) if part.is_floating_point()]


def _moves(leaves: list[Tensor]) -> list[Tensor]:
    """Random directions, as long as what they move; what is zero may move by about one."""
    sizes = [leaf.detach().square().mean().sqrt() for leaf in leaves]
    return [
        move * size.where(size > 0, 1.0)
        for move, size in zip(weights(leaves, seed=1998), sizes, strict=True)
    ]


def _gradients(
    outputs: list[Tensor], factors: list[Tensor], leaves: list[Tensor]
) -> dict[int, Tensor]:
    """The gradients of the weighted sum, by the ids of the leaves."""
    tied = [pair for pair in zip(outputs, factors, strict=True) if pair[0].requires_grad]
    if not tied:
        return {id(leaf): torch.zeros_like(leaf) for leaf in leaves}
    parts, upstream = zip(*tied, strict=True)
    found = torch.autograd.grad(parts, leaves, upstream, materialize_grads=True)
    return {id(leaf): g.to_dense() for leaf, g in zip(leaves, found, strict=True)}


def _weighted_sum(base: list[Tensor], ends: list[Tensor], factors: list[Tensor]) -> float:
    """The weighted sum of what changed."""
    changes = zip(base, ends, factors, strict=True)
    return sum(((end - one.detach()) * w).double().sum().item() for one, end, w in changes)


def _norm(parts: list[Tensor], factors: list[Tensor] | None = None) -> float:
    products = (
        parts if factors is None else [a.detach() * b for a, b in zip(parts, factors, strict=True)]
    )
    return math.sqrt(sum(part.double().square().sum().item() for part in products))
