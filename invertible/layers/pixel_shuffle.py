"""Space to channels, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from typing_extensions import override

from .._support.checks import FROM_FORWARD, describe, expect_tensor, name_of
from .._support.memory_format import is_channels_last
from ..module import InvertibleModule

Order = Literal["channel-major", "offset-major"]


class _PixelShuffling(InvertibleModule):
    """Moves blocks of pixels to channels, and back, in either order of channels."""

    volume_preserving = True
    moves_only = True

    def __init__(self, factor: int | Sequence[int], *, order: Order = "channel-major") -> None:
        super().__init__()
        name = type(self).__name__
        factors = tuple(factor) if isinstance(factor, Sequence) else (factor,)
        if not factors or any(not isinstance(r, int) or r < 1 for r in factors):
            raise ValueError(
                f"{name} takes a whole factor of at least 1, or one for each spatial dimension, "
                f"got {factor!r}."
            )
        if order not in ("channel-major", "offset-major"):
            raise ValueError(
                f"{name} takes order='channel-major' (as torch.nn.PixelUnshuffle) or "
                f"'offset-major' (as the released i-RevNet), got {order!r}."
            )
        self.factor = factor if isinstance(factor, int) else factors
        self.order = order

    @override
    def extra_repr(self) -> str:
        return f"factor={self.factor}, order={self.order!r}"

    def _to_channels(self, x: Tensor, inverse: bool = False) -> Tensor:
        x = expect_tensor(self, x, min_dim=3, inverse=inverse)
        n, c, *sides = x.shape
        factors = self._factors(x, inverse)
        c_out = c * math.prod(factors)  # not -1: a batch may be empty
        if any(side % r for side, r in zip(sides, factors, strict=True)):
            raise ValueError(
                f"{name_of(self, inverse)} takes sides that are multiples of its factor "
                f"{self.factor}, got {describe(x)}. "
                f"{FROM_FORWARD if inverse else 'Crop or pad the sides first.'}"
            )
        rank = len(sides)
        pixels = [2 + 2 * i for i in range(rank)]
        offsets = [3 + 2 * i for i in range(rank)]
        inner = [1, *offsets] if self.order == "channel-major" else [*offsets, 1]
        small = [side // r for side, r in zip(sides, factors, strict=True)]
        sizes = [size for pair in zip(small, factors, strict=True) for size in pair]
        blocks = x.reshape(n, c, *sizes)
        if is_channels_last(x):
            return blocks.permute(0, *pixels, *inner).reshape(n, *small, c_out).movedim(-1, 1)
        # Reshaping can return a view; of one pixel it would have the strides of channels_last.
        return blocks.permute(0, *inner, *pixels).reshape(n, c_out, *small).contiguous()

    def _to_pixels(self, y: Tensor, inverse: bool = False) -> Tensor:
        y = expect_tensor(self, y, min_dim=3, inverse=inverse)
        n, c, *sides = y.shape
        factors = self._factors(y, inverse)
        rank, block = len(sides), math.prod(factors)
        if c % block:
            hint = FROM_FORWARD if inverse else "Put InjectivePad before it."
            raise ValueError(
                f"{name_of(self, inverse)} takes a number of channels that is a multiple of "
                f"{block}, the pixels of a block ({' x '.join(map(str, factors))}), got "
                f"{describe(y)}. {hint}"
            )
        c //= block
        if self.order == "channel-major":
            channel, offsets = 1, list(range(2, 2 + rank))
            blocks = y.reshape(n, c, *factors, *sides)
        else:
            channel, offsets = 1 + rank, list(range(1, 1 + rank))
            blocks = y.reshape(n, *factors, c, *sides)
        pixels = range(2 + rank, 2 + 2 * rank)
        space = [dim for pair in zip(pixels, offsets, strict=True) for dim in pair]
        large = [side * r for side, r in zip(sides, factors, strict=True)]
        if is_channels_last(y):
            return blocks.permute(0, *space, channel).reshape(n, *large, c).movedim(-1, 1)
        return blocks.permute(0, channel, *space).reshape(n, c, *large).contiguous()

    def _factors(self, x: Tensor, inverse: bool) -> tuple[int, ...]:
        """A factor for each spatial dimension."""
        rank = x.dim() - 2
        if isinstance(self.factor, int):
            return (self.factor,) * rank
        if len(self.factor) != rank:
            raise ValueError(
                f"{name_of(self, inverse)} has factors {self.factor} for {len(self.factor)} "
                f"spatial dimensions, got {describe(x)}. Give it one for each, or a single number "
                "for all."
            )
        return self.factor


class PixelUnshuffle(_PixelShuffling):
    r"""Moves each block of :math:`r \times r` pixels to channels; also in 1 and 3 dimensions.

    .. math:: y_{n,\,c r^2 + i r + j,\,h,\,w} = x_{n,\,c,\,h r + i,\,w r + j}

    That is ``order="channel-major"``, the order of :class:`torch.nn.PixelUnshuffle`. With
    ``order="offset-major"`` the output channel is :math:`(i r + j) C + c`, as in the released
    i-RevNet and in TensorFlow's ``space_to_depth``.

    Args:
        factor: :math:`r`, at least 1; or one for each spatial dimension.
        order: Which index of the new channels is slowest: ``"channel-major"`` the input channel,
            ``"offset-major"`` the place in the block.

    Shape:
        - Input: :math:`(N, C, *)` with one or more spatial dimensions, multiples of :math:`r`.
        - Output: :math:`(N, C r^d, */r)` for :math:`d` spatial dimensions, with the product of the
          factors in place of :math:`r^d` if they differ.

    Raises:
        TypeError: When called on anything but a tensor.
        ValueError: If an argument is out of range; when called, if a side is no multiple of
            ``factor``, there is no spatial dimension, or not as many as factors.

    References:
        Shi et al., *Real-Time Single Image and Video Super-Resolution* (2016), section 3.2, for
        the inverse, https://arxiv.org/abs/1609.05158; Jacobsen et al., *i-RevNet* (2018),
        section 3.1, https://arxiv.org/abs/1802.07088.

    Example:
        >>> layer = PixelUnshuffle(2)
        >>> layer(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 12, 4, 4])
        >>> layer(torch.randn(1, 3, 8)).shape
        torch.Size([1, 6, 4])
        >>> PixelUnshuffle((1, 2))(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 6, 8, 4])
    """

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._to_channels(x)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return self._to_pixels(y, inverse=True)


class PixelShuffle(_PixelShuffling):
    r"""Moves channels to blocks of pixels: the inverse of :class:`PixelUnshuffle`.

    Args:
        factor: :math:`r`, at least 1; or one for each spatial dimension.
        order: Which index of the input channels is slowest, as in :class:`PixelUnshuffle`.

    Shape:
        - Input: :math:`(N, C r^d, *)` with :math:`d \ge 1` spatial dimensions.
        - Output: :math:`(N, C, r *)`.

    Raises:
        TypeError: When called on anything but a tensor.
        ValueError: If an argument is out of range; when called, if the channels are no multiple
            of :math:`r^d`, there is no spatial dimension, or not as many as factors.

    References:
        Shi et al., *Real-Time Single Image and Video Super-Resolution* (2016), section 3.2,
        https://arxiv.org/abs/1609.05158.

    Example:
        >>> PixelShuffle(2)(torch.randn(1, 12, 4, 4)).shape
        torch.Size([1, 3, 8, 8])
    """

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._to_pixels(x)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return self._to_channels(y, inverse=True)
