"""Gradients compared with finite differences, which know nothing of autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from ..direction import Direction
from ..module import InvertibleModule
from ..state import Context, State, tensors
from .states import mapped, weights
from .subject import Subject

# The step, relative to the size of what is moved, and the error allowed, relative to the gradient.
STEP, RELATIVE = 2.0**-17, 1e-6
# Where a layer rounds, a step must cross many multiples of its quantum, and only tells whether
# the gradient is there at all.
ROUNDING_STEP, ROUNDING_RELATIVE = 2.0**-4, 0.5
# By how much a layer may magnify rounding.
MAGNIFIED = 1e3


def require_derivative(subject: Subject, direction: Direction, start: State, what: str) -> None:
    """Fails unless the gradients of a method are what finite differences make of it.

    State, parameters and context are moved one after the other, each in a random direction, and
    a weighted sum of what the method returns is looked at. Where it bends too much to tell,
    nothing is said: the differences to the left and to the right disagree, as at the kink of a
    ReLU.
    """
    if subject.dtype != torch.float64:  # too coarse
        wide = subject.in_float64(start)
        if wide is not None:
            require_derivative(wide, direction, wide.x, what)
        return
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
    step, relative = (ROUNDING_STEP, ROUNDING_RELATIVE) if subject.rounds else (STEP, RELATIVE)
    noise = MAGNIFIED * torch.finfo(subject.dtype).eps * _norm(_products(outputs, factors))
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
        both = _products([a - b for a, b in zip(ahead, behind, strict=True)], factors)
        bent = _products(
            [a + b - 2 * y.detach() for a, b, y in zip(ahead, behind, outputs, strict=True)],
            factors,
        )
        found = sum(part.sum().item() for part in both) / (2 * step)
        # The sum of what bends cancels by chance, its norm does not.
        allowed = (3 * _norm(bent) + noise) / step + relative * _norm(slopes)
        if math.isfinite(allowed) and math.isfinite(found) and not abs(found - slope) <= allowed:
            subject.fail(
                f"the gradient of {what} with respect to {group} is not its derivative: along a "
                f"random direction it is {slope:.6g}, and finite differences give {found:.6g}; "
                f"allowed is a difference of {allowed:.3g}."
            )


def _run(
    subject: Subject, direction: Direction, state: State, context: Context, moves: dict[int, Tensor]
) -> list[Tensor]:
    """What a method returns for leaves that are moved, by their ids."""

    def moved(leaf: Tensor) -> Tensor:
        return leaf + moves[id(leaf)] if id(leaf) in moves else leaf

    def run(layer: InvertibleModule, state: Any, context: Context) -> Any:
        for part in subject.modules:
            if isinstance(part, ParametrizationList):  # no gradient follows a power iteration
                part.eval()
        for parameter in layer.parameters():
            if id(parameter) in moves:
                parameter.data.add_(moves[id(parameter)])
        return direction.apply(layer, state, context)

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


def _products(parts: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
    return [(part.detach() * w).double() for part, w in zip(parts, factors, strict=True)]


def _norm(parts: list[Tensor]) -> float:
    return math.sqrt(sum(part.double().square().sum().item() for part in parts))
