"""One tensor to several streams and back, and streams in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from .._support.checks import describe, expect_streams, expect_tensor, name_of, rank_for
from ..module import InvertibleModule
from ..state import Pair, State, streams_of


class _Partition(InvertibleModule):
    """Cuts a tensor into streams along one dimension, and joins them again."""

    volume_preserving = True
    moves_only = True

    def __init__(self, sizes: Sequence[int] | None = None, dim: int | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if sizes is not None and not isinstance(sizes, Sequence):
            raise TypeError(
                f"{name} takes the sizes of all streams, for instance sizes=(1, 2), got {sizes!r}. "
                "Leave sizes out for two halves."
            )
        if sizes is not None and (len(sizes) < 2 or any(size < 1 for size in sizes)):
            raise ValueError(
                f"{name} takes two or more sizes of at least 1, got sizes={tuple(sizes)}. "
                "Leave sizes out for two halves. A stream of size 0 would carry nothing."
            )
        if dim == 0:
            raise ValueError(
                f"{name} cannot take dim=0, the batch: streams are made of channels (dim=1) or "
                "another later dimension."
            )
        self.sizes = None if sizes is None else tuple(sizes)
        self.dim = 1 if dim is None else dim
        self._dim_is_said = dim is not None

    @override
    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, dim={self.dim}"

    def _expect(self, x: Tensor, inverse: bool) -> Tensor:
        x = expect_tensor(self, x, min_dim=rank_for(self.dim), inverse=inverse)
        if x.dim() == 3 and not self._dim_is_said:
            raise ValueError(
                f"{name_of(self, inverse)} must be told the dimension of the channels where there "
                f"are three, got {describe(x)}: {type(self).__name__}(dim=-1) for tokens "
                f"(N, T, D), {type(self).__name__}(dim=1) for signals (N, C, L)."
            )
        return x

    def _cut(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, ...]:
        x = self._expect(x, inverse)
        size = x.shape[self.dim]
        if self.sizes is None and size % 2:
            raise ValueError(
                f"{name_of(self, inverse)} halves dimension {self.dim}, whose size is odd: {size} "
                f"(input shape {tuple(x.shape)}). Give sizes, for instance "
                f"sizes=({size // 2}, {size - size // 2}), or put InjectivePad before it."
            )
        sizes = self.sizes or (size // 2, size // 2)
        if sum(sizes) != size or size == 0:
            raise ValueError(
                f"{name_of(self, inverse)} cuts dimension {self.dim} into sizes {sizes}, "
                f"{sum(sizes)} in all, got size {size} (input shape {tuple(x.shape)}). Give "
                "sizes that add up to it."
            )
        return torch.split(x, list(sizes), self.dim)

    def _join(self, streams: tuple[Tensor, ...], inverse: bool = False) -> Tensor:
        count = 2 if self.sizes is None else len(self.sizes)
        streams = expect_streams(self, streams, count, inverse=inverse)
        first = self._expect(streams[0], inverse)
        expected = self.sizes or (first.shape[self.dim],) * 2
        alike = _alike_but_for(self.dim, streams)
        found = tuple(stream.shape[self.dim] for stream in streams) if alike else None
        if found != expected:
            hint = (
                f"For these give sizes={found}."
                if alike
                else "Make the other dimensions equal before it."
            )
            raise ValueError(
                f"{name_of(self, inverse)} joins streams of sizes {expected} along dimension "
                f"{self.dim}, alike in all other dimensions, got shapes "
                f"{', '.join(str(tuple(stream.shape)) for stream in streams)}. {hint}"
            )
        return torch.cat(streams, self.dim)


def _alike_but_for(dim: int, streams: tuple[Tensor, ...]) -> bool:
    """Whether shapes differ in one dimension only, if at all."""
    if len({stream.dim() for stream in streams}) > 1:
        return False
    # Compared, not hashed: sizes that torch.export leaves open have no hash.
    first, *others = (stream.transpose(0, dim).shape[1:] for stream in streams)
    return all(other == first for other in others)


class Split(_Partition):
    r"""Cuts a tensor into a tuple of streams; the inverse joins them.

    .. math:: x \mapsto (x_1, \dots, x_k), \qquad x = [x_1 | \dots | x_k]

    The streams are views of the input, as those of :func:`torch.split` are.

    Args:
        sizes: Sizes of the streams along ``dim``, at least 1 each; two halves by default.
        dim: Dimension that is cut, not 0; counted from the end if negative. By default 1, the
            channels of images and vectors; for three dimensions it must be said, since those of
            tokens :math:`(N, T, D)` are the last.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: a tuple of :math:`(N, C_i, *)` with :math:`\sum_i C_i = C`.

    Raises:
        TypeError: When called on anything but a tensor.
        ValueError: If a size or ``dim`` is out of range; when called, if the sizes do not add
            up to the tensor's, halves are asked of an odd size, or the tensor has three dimensions
            and no ``dim`` was given.

    Example:
        >>> x1, x2 = Split(sizes=(1, 2))(torch.randn(4, 3, 8, 8))
        >>> x1.shape, x2.shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4, 2, 8, 8]))
    """

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._cut(x)

    @override
    def inverse(self, y: tuple[Tensor, ...]) -> Tensor:
        return self._join(y, inverse=True)


class Merge(_Partition):
    r"""Joins a tuple of streams to one tensor; the inverse cuts it again.

    .. math:: (x_1, \dots, x_k) \mapsto [x_1 | \dots | x_k]

    Args:
        sizes: Sizes of the streams along ``dim``, at least 1 each; two equal ones by default.
        dim: Dimension along which they are joined, not 0; counted from the end if negative. By
            default 1; for three dimensions it must be said, as in :class:`Split`.

    Shape:
        - Input: a tuple of :math:`(N, C_i, *)`.
        - Output: :math:`(N, C, *)` with :math:`C = \sum_i C_i`.

    Raises:
        TypeError: When called on anything but a tuple of tensors.
        ValueError: If a size or ``dim`` is out of range; when called, if the streams have other
            sizes than those, differ in another dimension, in dtype or in device, or have three
            dimensions and no ``dim`` was given.

    Example:
        >>> Merge()((torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8))).shape
        torch.Size([4, 4, 8, 8])
    """

    @override
    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return self._join(x)

    @override
    def inverse(self, y: Tensor) -> tuple[Tensor, ...]:
        return self._cut(y, inverse=True)


class FactorOut(_Partition):
    r"""Puts the second part of the first stream behind the others: it is done, the first goes on.

    .. math:: (x, z_1, \dots, z_k) \mapsto (x_a, z_1, \dots, z_k, x_b), \qquad x = [x_a | x_b]

    A tensor becomes a pair :math:`(x_a, x_b)`. With the next layers on the first stream alone, by
    :class:`OnStreams`, and the next :class:`FactorOut` behind them, this makes an architecture of
    several scales, whose state ends as :math:`(x, z_1, \dots, z_k)`, the part that left first being
    :math:`z_1`. A learned prior of the part that left last, given what goes on, is a coupling of
    these two: ``OnStreams((-1, 0), AffineCoupling(f))``.

    The parts are views of the input, as those of :func:`torch.split` are; the other streams are
    handed through.

    Args:
        sizes: Sizes along ``dim`` of the part that goes on and of the one that is factored out, at
            least 1 each; two halves by default.
        dim: Dimension that is cut, not 0; counted from the end if negative. By default 1, the
            channels of images and vectors; for three dimensions it must be said, since those of
            tokens :math:`(N, T, D)` are the last.

    Shape:
        - Input: :math:`(N, C, *)`, or a tuple of such a tensor and others of any shape.
        - Output: a tuple of :math:`(N, C_a, *)`, the others and :math:`(N, C_b, *)`, with
          :math:`C_a + C_b = C`.

    Raises:
        TypeError: When called on anything but a tensor or a tuple of tensors.
        ValueError: If ``sizes`` are not two, or a size or ``dim`` is out of range; when called on a
            tuple of one, or if the sizes do not add up to the first stream's, halves are asked
            of an odd size, or the first stream has three dimensions and no ``dim`` was given.

    References:
        Dinh et al., *Density Estimation using Real NVP* (2017), section 3.6,
        https://arxiv.org/abs/1605.08803.

    Example:
        >>> layer = InvertibleSequential(
        ...     PixelUnshuffle(2), FactorOut(), OnStreams(0, PixelUnshuffle(2)), FactorOut()
        ... )
        >>> x, z1, z2 = layer(torch.randn(1, 2, 8, 8))
        >>> x.shape, z1.shape, z2.shape
        (torch.Size([1, 8, 2, 2]), torch.Size([1, 4, 4, 4]), torch.Size([1, 8, 2, 2]))
    """

    def __init__(self, sizes: Sequence[int] | None = None, dim: int | None = None) -> None:
        super().__init__(sizes, dim)
        if self.sizes is not None and len(self.sizes) != 2:
            raise ValueError(
                "FactorOut takes the sizes of two parts, of the one that goes on and of the one "
                f"that is factored out, got sizes={self.sizes}. Leave sizes out for two halves."
            )

    @override
    def forward(self, x: State) -> tuple[Tensor, ...]:
        if isinstance(x, tuple):
            self._require_others(x)
        first, *others = streams_of(x)
        kept, factored = self._cut(first)
        return kept, *others, factored

    @override
    def inverse(self, y: tuple[Tensor, ...]) -> State:
        if not isinstance(y, tuple) or len(y) < 2:
            expect_streams(self, y, 2, inverse=True)
        kept, *others, factored = expect_streams(self, y, None, inverse=True)
        first = self._join((kept, factored), inverse=True)
        return (first, *others) if others else first

    def _require_others(self, x: tuple[Tensor, ...]) -> None:
        """Raises for a tuple of one, which would come back as a tensor."""
        if len(expect_streams(self, x, None)) == 1:
            raise ValueError(
                f"FactorOut takes a tensor or a tuple of two or more, got {describe(x)}. Hand that "
                "tensor over by itself."
            )


class Swap(InvertibleModule):
    r"""Exchanges the two streams of a pair.

    .. math:: (x_1, x_2) \mapsto (x_2, x_1)

    Shape:
        - Input: a pair of tensors.
        - Output: the same pair in the other order.

    Raises:
        TypeError: When called on anything but a tuple of tensors.
        ValueError: When called on a tuple of another length than 2.

    Example:
        >>> y1, y2 = Swap()((torch.zeros(1, 2), torch.ones(1, 2)))
        >>> y1
        tensor([[1., 1.]])
    """

    volume_preserving = True
    moves_only = True
    _hands_through = True

    @override
    def forward(self, x: Pair) -> Pair:
        x1, x2 = expect_streams(self, x, 2)
        return x2, x1

    @override
    def inverse(self, y: Pair) -> Pair:
        y1, y2 = expect_streams(self, y, 2)
        return y2, y1
