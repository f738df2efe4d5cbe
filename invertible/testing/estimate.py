"""The log-determinant of a Jacobian that is too large to be computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..direction import Direction
from ..state import State, tensors
from .differences import STEP
from .states import detached
from .subject import Subject

# Each step of each probe evaluates the layer three times.
PROBES, STEPS = 8, 10
# Standard errors that are allowed, and how much of the last steps' gain.
DEVIATIONS, GAIN = 10, 3

Matrix = Callable[[Tensor], Tensor]


class Estimate(NamedTuple):
    """The sum of the log-determinants of all examples, and how wrong it may be."""

    value: float
    uncertainty: float


def estimate_log_det(subject: Subject, direction: Direction, state: State) -> Estimate:
    r"""Estimates :math:`\frac{1}{2} \operatorname{tr} \log J^T J` by stochastic Lanczos quadrature.

    References:
        Ubaru, Chen, Saad, *Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature* (2017),
        https://doi.org/10.1137/16M1104974.
    """
    gram, size = _gram(subject, direction, state)
    generator = torch.Generator().manual_seed(2017)
    probes = [_signs(size, generator).to(next(tensors(state))) for _ in range(PROBES)]
    found = torch.tensor([_quadratures(gram, probe) for probe in probes], dtype=torch.float64)
    coarse, fine = found.mean(0).tolist()
    deviation = found[:, 1].std().item() / math.sqrt(PROBES)
    return Estimate(fine, DEVIATIONS * deviation + GAIN * abs(fine - coarse))


def _gram(subject: Subject, direction: Direction, state: State) -> tuple[Matrix, int]:
    r"""The product of :math:`J^T J` with a vector, and the length of that.

    :math:`J v` is a finite difference, since not every layer can be differentiated twice.
    """
    given = detached(state, requires_grad=True)
    leaves = list(tensors(given))
    sizes = [leaf.numel() for leaf in leaves]
    flat = _flat(leaves).detach()
    with torch.enable_grad():
        output = _flat(list(tensors(_run(subject, direction, given))))

    def moved(by: Tensor) -> Tensor:
        parts = torch.split(flat + by, sizes)
        pieces = [part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        start = tuple(pieces) if isinstance(state, tuple) else pieces[0]
        with torch.no_grad():
            return _flat(list(tensors(_run(subject, direction, start))))

    # As far as other finite differences go, on an average number.
    step = STEP * max(flat.norm().item(), 1.0)

    def product(v: Tensor) -> Tensor:
        ahead = (moved(step * v) - moved(-step * v)) / (2 * step)
        gradients = torch.autograd.grad(
            output, leaves, ahead, retain_graph=True, materialize_grads=True
        )
        return _flat(list(gradients))

    return product, len(flat)


def _run(subject: Subject, direction: Direction, state: State) -> State:
    result: State = subject.evaluate(direction._replace(log_det=False).apply, state)[0]
    return result


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0


def _quadratures(gram: Matrix, probe: Tensor) -> tuple[float, float]:
    """Half of ``z^T log(G) z`` for a probe, after half of the steps and after all."""
    diagonal, beside = _lanczos(gram, probe)
    half = STEPS // 2 if len(diagonal) == STEPS else len(diagonal)  # fewer are all there are
    return (
        _quadrature(diagonal[:half], beside[: half - 1]) * len(probe),
        _quadrature(diagonal, beside) * len(probe),
    )


def _lanczos(gram: Matrix, probe: Tensor) -> tuple[list[float], list[float]]:
    """The diagonal of the tridiagonal matrix that Lanczos' method finds, and that beside it."""
    basis = [probe / probe.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        rest = gram(basis[-1])
        diagonal.append(torch.dot(rest, basis[-1]).item())
        for vector in basis:
            rest = rest - torch.dot(rest, vector) * vector
        length = rest.norm().item()
        # What is left of a space that is exhausted is the error of finite differences.
        if len(diagonal) == STEPS or not length > 1e-7 * abs(diagonal[0]):
            return diagonal, beside
        beside.append(length)
        basis.append(rest / length)


def _quadrature(diagonal: list[float], beside: list[float]) -> float:
    matrix = torch.tensor(diagonal, dtype=torch.float64).diag()
    for i, value in enumerate(beside):
        matrix[i, i + 1] = matrix[i + 1, i] = value
    values, vectors = torch.linalg.eigh(matrix)
    logs = values.clamp_min(torch.finfo(values.dtype).tiny).log() / 2
    return float((vectors[0].square() * logs).sum())
