"""One tensor to several streams of interleaved places: checkerboards and stripes."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from .._support.checks import expect_streams, expect_tensor, rank_for
from .._support.memory_format import memory_format
from ..module import InvertibleModule
from ..state import Pair


class CheckerboardSplit(InvertibleModule):
    r"""Cuts an image into the black and the white squares of a checkerboard, and joins them again.

    .. math::

        x_1[2c + k, i, j] = x[c, 2i + k, 2j + k], \qquad
        x_2[2c + k, i, j] = x[c, 2i + k, 2j + 1 - k], \qquad k \in \{0, 1\}

    The two numbers on a diagonal of each 2x2 patch become two channels. So both streams are whole
    images of half the size, and a convolution in a coupling sees right neighbours.

    Shape:
        - Input: :math:`(N, C, H, W)` with even :math:`H` and :math:`W`.
        - Output: a pair of :math:`(N, 2 C, H/2, W/2)`.

    Raises:
        TypeError: When called on anything but a tensor.
        ValueError: When called, if there are not two spatial dimensions, or a side is odd.

    References:
        Dinh et al., *Density Estimation using Real NVP* (2017), section 3.4,
        https://arxiv.org/abs/1605.08803.

    Example:
        >>> black, white = CheckerboardSplit()(torch.arange(4).view(1, 1, 2, 2))
        >>> black.flatten(), white.flatten()
        (tensor([0, 3]), tensor([1, 2]))
    """

    volume_preserving = True
    moves_only = True

    @override
    def forward(self, x: Tensor) -> Pair:
        x = expect_tensor(self, x)
        if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                "CheckerboardSplit takes images (N, C, H, W) of even height and width, got shape "
                f"{tuple(x.shape)}. Pad them before it: InjectivePad(1, dim=2)."
            )
        corners = [[x[:, :, i::2, j::2] for j in (0, 1)] for i in (0, 1)]
        black = _alternating(corners[0][0], corners[1][1])
        white = _alternating(corners[0][1], corners[1][0])
        form = memory_format(x)
        return black.contiguous(memory_format=form), white.contiguous(memory_format=form)

    @override
    def inverse(self, y: Pair) -> Tensor:
        black, white = expect_streams(self, y, 2, inverse=True)
        if black.dim() != 4 or black.shape != white.shape or black.shape[1] % 2:
            raise ValueError(
                "CheckerboardSplit's inverse takes two streams (N, 2 C, H, W) of one shape, got "
                f"shapes {tuple(black.shape)} and {tuple(white.shape)}."
            )
        n, c, h, w = black.shape
        upper = torch.stack([black[:, ::2], white[:, ::2]], -1)
        lower = torch.stack([white[:, 1::2], black[:, 1::2]], -1)
        x = torch.stack([upper, lower], 3).reshape(n, c // 2, 2 * h, 2 * w)
        return x.contiguous(memory_format=memory_format(black))


def _alternating(one: Tensor, other: Tensor) -> Tensor:
    """The channels of two tensors by turns."""
    return torch.stack([one, other], 2).flatten(1, 2)


class StripeSplit(InvertibleModule):
    r"""Deals the places along a dimension out to streams, in turn; the inverse joins them.

    .. math:: x_s[:, i] = x[:, k\, i + s], \qquad 0 \le s < k

    For tokens :math:`(N, T, C)` it gives each stream every k-th token, with ``dim=2`` it cuts an
    image into rows. Where :class:`Split` with the same ``dim`` gives halves, which are neighbours
    of themselves, stripes have their neighbours in the other streams. For tokens dealt out at
    random put ``Permute.random(T, dim=1)`` before :class:`Split`.

    The streams are views of the input.

    Args:
        count: :math:`k`, how many streams, at least 2.
        dim: Dimension that is dealt out, not 0; counted from the end if negative.

    Shape:
        - Input: :math:`(N, T, *)` with :math:`T` a multiple of :math:`k`.
        - Output: a tuple of :math:`k` tensors :math:`(N, T/k, *)`.

    Raises:
        TypeError: When called on anything but a tensor.
        ValueError: If ``count`` or ``dim`` is out of range; when called, if the size is no multiple
            of ``count``.

    Example:
        >>> StripeSplit()(torch.arange(6).view(1, 6))
        (tensor([[0, 2, 4]]), tensor([[1, 3, 5]]))
    """

    volume_preserving = True
    moves_only = True

    def __init__(self, count: int = 2, dim: int = 1) -> None:
        super().__init__()
        if count < 2:
            raise ValueError(f"StripeSplit takes a count of at least 2 streams, got {count}.")
        if dim == 0:
            raise ValueError("StripeSplit cannot take dim=0, the batch; tokens are dim=1.")
        self.count = count
        self.dim = dim

    @override
    def extra_repr(self) -> str:
        return f"count={self.count}, dim={self.dim}"

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = expect_tensor(self, x, min_dim=rank_for(self.dim))
        size = x.shape[self.dim]
        if size % self.count:
            raise ValueError(
                f"StripeSplit deals dimension {self.dim} out to {self.count} streams, whose sizes "
                f"must be equal, got size {size} (input shape {tuple(x.shape)}). Put InjectivePad "
                "before it."
            )
        place = self.dim % x.dim()
        index = [slice(None)] * place
        return tuple(x[(*index, slice(s, None, self.count))] for s in range(self.count))

    @override
    def inverse(self, y: tuple[Tensor, ...]) -> Tensor:
        streams = expect_streams(self, y, self.count, inverse=True)
        first = expect_tensor(self, streams[0], min_dim=rank_for(self.dim), inverse=True)
        if any(stream.shape != first.shape for stream in streams):
            raise ValueError(
                "StripeSplit's inverse takes streams of one shape, got shapes "
                f"{', '.join(str(tuple(stream.shape)) for stream in streams)}."
            )
        place = self.dim % first.dim()
        x = torch.stack(streams, place + 1).flatten(place, place + 1)
        return x.contiguous(memory_format=memory_format(first))
