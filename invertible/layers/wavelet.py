"""Wavelets by lifting."""

from __future__ import annotations

import torch
from torch import Tensor

from .._support.checks import describe, expect_tensor
from .._support.memory_format import memory_format
from ..exact.grid import Grid
from ..module import InvertibleModule
from .pixel_shuffle import Order, PixelUnshuffle


class HaarWavelet(InvertibleModule):
    r"""Splits an image into averages and differences of neighbours at half the size.

    Along each spatial dimension, neighbours :math:`(a, b)` become a difference and an average,
    in two lifting steps:

    .. math:: d = b - a, \qquad s = a + d / 2

    The inverse undoes the steps in the other order. The determinant of a step is 1, so volume
    is preserved (the orthonormal Haar transform has the factors :math:`\sqrt 2` and
    :math:`1/\sqrt 2` besides). With a ``quantum``, :math:`d / 2` is rounded to the grid, and the
    inverse is bit for bit, as that of the integer wavelets of JPEG 2000.

    Args:
        order: Which index of the output channels is slowest, as in :class:`PixelUnshuffle`; the
            place in the block is the band: averages first.
        quantum: The grid to stay on, a power of two; None computes in floating point.

    Shape:
        - Input: :math:`(N, C, *)` with :math:`d \ge 1` spatial dimensions, all even.
        - Output: :math:`(N, 2^d C, */2)`.

    Raises:
        TypeError: When called on anything but a tensor; with a quantum, on another dtype than
            float32 or float64.
        ValueError: If ``order`` is unknown or ``quantum`` no power of two; when called, if a
            side is odd or there is no spatial dimension.

    References:
        Calderbank et al., *Wavelet Transforms That Map Integers to Integers* (1998), section 3,
        where it is the S transform.

    Example:
        >>> layer = HaarWavelet()
        >>> layer(torch.ones(1, 1, 2, 2)).flatten()
        tensor([1., 0., 0., 0.])
    """

    volume_preserving = True

    def __init__(self, *, order: Order = "channel-major", quantum: float | None = None) -> None:
        super().__init__()
        self.unshuffle = PixelUnshuffle(2, order=order)
        self._grid = Grid.of(self, quantum)

    @property
    def quantum(self) -> float | None:
        return self._grid.quantum if self._grid else None

    def extra_repr(self) -> str:
        return f"quantum={self.quantum}"

    def forward(self, x: Tensor) -> Tensor:
        y = self.unshuffle.forward(x)
        blocks, axes = self._blocks(y)
        for axis in axes:
            a, b = blocks.unbind(axis)
            d = b - a
            blocks = torch.stack((a + self._half(d), d), axis)
        return self._flat(blocks, y)

    def inverse(self, y: Tensor) -> Tensor:
        blocks, axes = self._blocks(expect_tensor(self, y, min_dim=3))
        for axis in reversed(axes):
            s, d = blocks.unbind(axis)
            a = s - self._half(d)
            blocks = torch.stack((a, a + d), axis)
        return self.unshuffle.inverse(self._flat(blocks, y))

    def _blocks(self, y: Tensor) -> tuple[Tensor, range]:
        """The channels as blocks of 2 x ... x 2, and the dimensions of these."""
        rank = y.dim() - 2
        if y.shape[1] % 2**rank:
            raise ValueError(
                f"HaarWavelet's inverse takes a multiple of {2**rank} channels, got {describe(y)}."
            )
        if self._grid is not None:
            self._grid.require_dtype(self, y)
        if self.unshuffle.order == "channel-major":
            return torch.unflatten(y, 1, (-1, *[2] * rank)), range(2, 2 + rank)
        return torch.unflatten(y, 1, (*[2] * rank, -1)), range(1, 1 + rank)

    def _flat(self, blocks: Tensor, like: Tensor) -> Tensor:
        y = blocks.flatten(1, like.dim() - 1)
        return y.contiguous(memory_format=memory_format(like))

    def _half(self, d: Tensor) -> Tensor:
        return d / 2 if self._grid is None else self._grid.round(d / 2)
