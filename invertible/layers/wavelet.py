"""Wavelets by lifting."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, sin, tan

import torch
from torch import Tensor
from typing_extensions import override

from .._support.checks import describe, expect_numbers, expect_tensor
from .._support.memory_format import memory_format
from ..exact.grid import Grid
from ..module import InvertibleModule
from ..state import Pair, State
from .pixel_shuffle import Order, PixelUnshuffle

# The shears of a rotation by 45 degrees.
_TAN, _SIN = tan(pi / 8), sin(pi / 4)


class HaarWavelet(InvertibleModule):
    r"""Splits an image into averages and differences of neighbours at half the size.

    Along each spatial dimension, neighbours :math:`(a, b)` become a difference and an average,
    in two lifting steps:

    .. math:: d = b - a, \qquad s = a + d / 2

    The inverse undoes the steps in the other order. The determinant of a step is 1, so volume
    is preserved. With ``orthonormal=True`` the norm is, too, and the inverse is the adjoint:

    .. math:: d = (b - a) / \sqrt 2, \qquad s = (a + b) / \sqrt 2

    With a ``quantum``, what a step adds is rounded to the grid, and the inverse is bit for bit:
    :math:`d / 2`, as in the integer wavelets of JPEG 2000, or the three shears of
    :class:`PairRotation` by :math:`-\pi / 4`, which is what the orthonormal step is. These keep
    the norm up to the rounding. Between the steps numbers can be larger than at both ends; the
    range has to have room for them, and ``check_layers`` of a composition looks at them.

    A difference is right minus left, and lower minus upper; PyWavelets has the other sign.

    Args:
        orthonormal: Whether averages are larger by :math:`\sqrt 2` and differences smaller by it,
            which makes the transform orthonormal.
        order: Which index of the output channels is slowest, as in :class:`PixelUnshuffle`; the
            place in the block is the band: averages first.
        quantum: The grid to stay on, a power of two; None computes in floating point.

    Shape:
        - Input: :math:`(N, C, *)` with :math:`d \ge 1` spatial dimensions, all even.
        - Output: :math:`(N, 2^d C, */2)`.

    Raises:
        TypeError: When called on anything but a tensor of floating-point numbers; with a
            quantum, on another dtype than float32 or float64.
        ValueError: If ``order`` is unknown or ``quantum`` no power of two; when called, if a
            side is odd or there is no spatial dimension.

    References:
        Calderbank et al., *Wavelet Transforms That Map Integers to Integers* (1998), section 3,
        where it is the S transform; Daubechies and Sweldens, *Factoring Wavelet Transforms into
        Lifting Steps* (1998), for the orthonormal one in shears.

    Example:
        >>> layer = HaarWavelet()
        >>> layer(torch.ones(1, 1, 2, 2)).flatten()
        tensor([1., 0., 0., 0.])
        >>> x = torch.randn(1, 1, 2, 2)
        >>> torch.testing.assert_close(HaarWavelet(orthonormal=True)(x).norm(), x.norm())
    """

    volume_preserving = True

    def __init__(
        self,
        *,
        orthonormal: bool = False,
        order: Order = "channel-major",
        quantum: float | None = None,
    ) -> None:
        super().__init__()
        self.orthonormal = orthonormal
        self.unshuffle = PixelUnshuffle(2, order=order)
        self._grid = Grid.of(self, quantum)

    @property
    @override
    def quantum(self) -> float | None:
        return self._grid.quantum if self._grid else None

    @override
    def extra_repr(self) -> str:
        return f"orthonormal={self.orthonormal}, quantum={self.quantum}"

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = expect_numbers(self, expect_tensor(self, x, min_dim=3))
        if any(side % 2 for side in x.shape[2:]):
            raise ValueError(
                f"HaarWavelet takes sides that are multiples of its factor 2, got {describe(x)}. "
                "Crop or pad the sides first."
            )
        y = self.unshuffle.forward(x)
        return self._steps(y, None)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        y = expect_numbers(self, expect_tensor(self, y, min_dim=3, inverse=True), inverse=True)
        return self.unshuffle.inverse(self._steps_back(y, None))

    @override
    def _states_inside(self, x: Tensor, inverted: bool) -> Sequence[State]:
        inside: list[State] = []
        if inverted:
            self._steps_back(x, inside)
        else:
            self._steps(self.unshuffle.forward(x), inside)
        return inside

    def _steps(self, y: Tensor, inside: list[State] | None) -> Tensor:
        """The steps of all dimensions; what is between them is appended to ``inside``."""
        blocks, axes = self._blocks(y)
        for axis in axes:
            a, b = blocks.unbind(axis)
            blocks = torch.stack(self._step(a, b, inside), axis)
        return self._flat(blocks, y)

    def _steps_back(self, y: Tensor, inside: list[State] | None) -> Tensor:
        blocks, axes = self._blocks(y)
        for axis in reversed(axes):
            s, d = blocks.unbind(axis)
            blocks = torch.stack(self._step_back(s, d, inside), axis)
        return self._flat(blocks, y)

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

    def _step(self, a: Tensor, b: Tensor, inside: list[State] | None) -> Pair:
        if not self.orthonormal:
            d = b - a
            s = a + self._round(d / 2)
        elif self.quantum is None:
            s, d = (a + b) * _SIN, (b - a) * _SIN
        else:
            a = a + self._round(_TAN * b)
            d = b - self._round(_SIN * a)
            s = a + self._round(_TAN * d)
        if inside is not None:
            inside += [(a, b), (s, d)]
        return s, d

    def _step_back(self, s: Tensor, d: Tensor, inside: list[State] | None) -> Pair:
        if not self.orthonormal:
            a = s - self._round(d / 2)
            b = a + d
        elif self.quantum is None:
            a, b = (s - d) * _SIN, (s + d) * _SIN
        else:
            s = s - self._round(_TAN * d)
            b = d + self._round(_SIN * s)
            a = s - self._round(_TAN * b)
        if inside is not None:
            inside += [(s, d), (a, b)]
        return a, b

    def _round(self, x: Tensor) -> Tensor:
        return x if self._grid is None else self._grid.round(x)
