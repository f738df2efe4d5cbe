"""The Jacobian of a function of images at one image, and its singular values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor
from torch.func import vjp, vmap

BATCH = 32  # directions at once


class Jacobian(LinearOperator):  # type: ignore[misc]
    r"""The matrix :math:`J = \partial f / \partial x` at one point, known by its products alone.

    It is a linear operator of SciPy's of shape ``(y.numel(), x.numel())``: ``J @ v`` and
    ``J.T @ u`` take arrays.

    Args:
        function: Maps float64 tensors of a batch of one, and treats each example by itself.
        x: The point :math:`x`, of shape :math:`(1, *)`.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.x = x.detach()
        y, self._pull = vjp(function, self.x)  # type: ignore[misc]
        self.y = y.detach()
        # The derivative of the linear u -> J.T u is J. At a time one direction is faster so than by
        # forward mode, which warns that torch.jit is deprecated besides (torch 2.13).
        _, self._push = vjp(  # type: ignore[misc]
            lambda u: self._pull(u)[0], torch.zeros_like(self.y)
        )
        super().__init__(np.float64, (y.numel(), x.numel()))

    def push(self, tangents: Tensor) -> Tensor:
        """:math:`J v` for each row ``v``."""
        each = vmap(lambda v: self._push(v.view_as(self.x))[0].flatten(), chunk_size=BATCH)
        return each(tangents).detach()

    def pull(self, cotangents: Tensor) -> Tensor:
        r""":math:`J^\top u` for each row ``u``."""
        each = vmap(lambda u: self._pull(u.view_as(self.y))[0].flatten(), chunk_size=BATCH)
        return each(cotangents).detach()

    def matrix(self) -> Tensor:
        """In full, row by row or column by column: for few inputs."""
        rows, columns = self.shape
        by_rows = rows <= 4 * columns  # going back costs a fourth of going forward, or less
        units = torch.eye(rows if by_rows else columns).to(self.x)
        return self.pull(units) if by_rows else self.push(units).T

    def _matmat(self, array: np.ndarray) -> np.ndarray:
        return self._by(self.push, array)

    def _rmatmat(self, array: np.ndarray) -> np.ndarray:
        return self._by(self.pull, array)

    def _by(self, product: Callable[[Tensor], Tensor], array: np.ndarray) -> np.ndarray:
        columns = array.reshape(len(array), -1)
        rows = torch.from_numpy(np.ascontiguousarray(columns.T)).to(self.x)
        return product(rows).T.cpu().numpy()

    _matvec, _rmatvec = _matmat, _rmatmat


def leading(
    jacobian: Jacobian, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``count`` largest singular values by the Lanczos method (ARPACK), the largest first.

    Returns:
        The values; the residual ``||J.T u - s v||`` or ``||J v - s u||`` of each, whichever is
        larger: so far at most is a singular value of the Jacobian; and the right singular vectors,
        in columns.
    """
    start = rng.standard_normal(min(jacobian.shape))
    left, values, right = svds(jacobian, count, v0=start)
    order = np.argsort(values)[::-1]
    u, s, v = left[:, order], values[order], right[order].T
    residuals = np.maximum(
        np.linalg.norm(jacobian @ v - u * s, axis=0),
        np.linalg.norm(jacobian.T @ u - v * s, axis=0),
    )
    return s, residuals, v


def energies(
    jacobian: Jacobian, samples: int, rng: np.random.Generator, without: np.ndarray | None = None
) -> np.ndarray:
    r"""Independent estimates of the energy :math:`\|J\|_F^2`, the sum of squared singular values.

    Each is :math:`\|J z\|^2` with random signs :math:`z`: Hutchinson's estimator of the trace of
    :math:`J^\top J`.

    Args:
        jacobian: The matrix.
        samples: How many.
        rng: Draws the signs.
        without: Orthonormal columns, whose energy is left out: with the leading singular vectors
            the estimates of the rest vary less.
    """
    signs = rng.choice([-1.0, 1.0], size=(jacobian.shape[1], samples))
    if without is not None:
        signs -= without @ (without.T @ signs)
    return np.square(jacobian @ signs).sum(0)
