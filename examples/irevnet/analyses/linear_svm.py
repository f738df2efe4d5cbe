"""Linear support vector machines, quick on many samples of many features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

COSTS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
PATIENCE = 2  # costs in a row that may fail to help before the choice ends
FOLDS = 3
TOLERANCE = 1e-8  # of the objective, in units of its value at 0


@dataclass(frozen=True)
class LinearSVM:
    """One hyperplane for each class against all others.

    Args:
        weights: :math:`(d + 1, K)`, the intercepts in the last row.
        converged: Whether it was left off because the objective no longer fell.
    """

    weights: Tensor
    converged: bool

    def predict(self, x: Tensor) -> Tensor:
        """The class on whose side of its hyperplane each row of ``x`` lies farthest."""
        return (x @ self.weights[:-1] + self.weights[-1]).argmax(1)


def fit_svm(
    x: Tensor, labels: Tensor, classes: int, cost: float, *, max_iterations: int = 500
) -> LinearSVM:
    r"""Finds the minimum of LIBLINEAR's objective, that of scikit-learn's ``LinearSVC``.

    .. math:: \tfrac12 \|w\|^2 + C \sum_i \max(0, 1 - s_i\, w^\top x_i)^2

    for each class, where :math:`s_i` is 1 for a member and -1 for others, and each :math:`x_i`
    has a 1 appended for the intercept. All classes are fitted at once by L-BFGS. It is
    preconditioned with the Hessian at 0, where every sample is within the margin: that takes
    tens of iterations where plain L-BFGS takes hundreds.

    Args:
        x: Features of shape :math:`(N, d)`, float32, of about unit scale.
        labels: Classes from 0, of shape :math:`(N,)`.
        classes: How many there are, :math:`K`.
        cost: The factor :math:`C` of the loss, above 0.
        max_iterations: Of L-BFGS.

    References:
        Fan et al., *LIBLINEAR: A library for large linear classification* (JMLR 2008), section 2.
    """
    x = F.pad(x, (0, 1), value=1.0)
    sides = 2.0 * F.one_hot(labels, classes) - 1
    hessian = (2 * cost * (x.T @ x)).cpu().double()
    # Where features are nearly dependent, float32's rounding can make it indefinite.
    hessian.diagonal().add_(1 + 1e-6 * hessian.trace())
    root = torch.linalg.cholesky(hessian)
    scale = cost * sides.numel()  # the objective at 0
    v = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS(
        [v],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=0,
        tolerance_change=TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def weights() -> Tensor:
        return scale**0.5 * torch.linalg.solve_triangular(root.T, v, upper=True)

    def objective() -> Tensor:
        lbfgs.zero_grad()
        w = weights()
        loss = (1 - sides * (x @ w.to(x))).clamp(min=0).square().sum().cpu().double()
        value = (w.square().sum() / 2 + cost * loss) / scale
        value.backward()
        return value.detach()

    lbfgs.step(objective)
    return LinearSVM(weights().detach().to(x), lbfgs.state[v]["n_iter"] < max_iterations)


def choose_cost(
    x: Tensor, labels: Tensor, classes: int, *, costs: Sequence[float] = COSTS, seed: int = 0
) -> float:
    """The cost of the best accuracy in cross-validation.

    Costs are raised for as long as that helps: on separable classes, higher ones take ever longer.

    Args:
        x: Features of shape :math:`(N, d)`, of at least as many samples as there are folds.
        labels: Classes from 0, of shape :math:`(N,)`.
        classes: How many there are.
        costs: Those to choose from, in rising order.
        seed: Of the division into folds.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    folds = [fold.to(x.device) for fold in order.chunk(FOLDS)]
    best, most, failures = costs[0], -1, 0
    for cost in costs:
        correct = _cross_validated(x, labels, classes, cost, folds)
        if correct > most:
            best, most, failures = cost, correct, 0
        else:
            failures += 1
        if correct == len(x) or failures == PATIENCE:
            break
    return best


def _cross_validated(
    x: Tensor, labels: Tensor, classes: int, cost: float, folds: Sequence[Tensor]
) -> int:
    """How many samples are right when each fold is held out in turn."""
    correct = 0
    for index, held_out in enumerate(folds):
        rest = torch.cat([*folds[:index], *folds[index + 1 :]])
        svm = fit_svm(x[rest], labels[rest], classes, cost)
        correct += int((svm.predict(x[held_out]) == labels[held_out]).sum())
    return correct
