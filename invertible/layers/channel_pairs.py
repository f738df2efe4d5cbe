"""Scalings and rotations of channel pairs, by shears where they are to be exact."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._support.checks import expect_numbers, expect_tensor, name_of
from .._support.memory_format import memory_format
from ..exact.grid import Grid, positive_zeros
from ..module import InvertibleModule
from ..state import Pair, State

# A shear adds a multiple of one half of the channels to the other: the half that is changed,
# and the factor, one number a pair.
Shears = list[tuple[int, Tensor]]


class _ChannelPairs(InvertibleModule):
    """A linear map of determinant 1 on each pair of channels: channel c and c + C/2."""

    volume_preserving = True

    def __init__(self, channels: int, *, quantum: float | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if channels < 2 or channels % 2:
            raise ValueError(
                f"{name} takes an even number of channels of at least 2, got {channels}. Put "
                "InjectivePad before it, or Split and Parallel to leave a channel out."
            )
        self.channels = channels
        self._grid = Grid.of(self, quantum)

    @property
    @override
    def quantum(self) -> float | None:
        return self._grid.quantum if self._grid else None

    @override
    def extra_repr(self) -> str:
        return f"channels={self.channels}, quantum={self.quantum}"

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._map(x, inverse=False)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return self._map(y, inverse=True)

    @abstractmethod
    def _matrix(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The map of each pair: a, b, c, d of ``y1 = a x1 + b x2``, ``y2 = c x1 + d x2``."""

    @abstractmethod
    def _shears(self) -> tuple[Tensor, Shears]:
        """The same map as a sign and then shears, in running order."""

    def _map(self, x: Tensor, inverse: bool) -> Tensor:
        x = expect_numbers(self, expect_tensor(self, x, inverse=inverse), inverse=inverse)
        if x.shape[1] != self.channels:
            raise ValueError(
                f"{name_of(self, inverse)} takes {self.channels} channels, got {x.shape[1]} (input "
                f"shape {tuple(x.shape)})."
            )
        if self._grid is None:
            pair = self._plain(x, inverse)
        else:
            pair = self._exact(x, inverse, self._grid)
        return torch.cat(pair, 1).contiguous(memory_format=memory_format(x))

    def _plain(self, x: Tensor, inverse: bool) -> Pair:
        x1, x2 = x.chunk(2, dim=1)
        a, b, c, d = (self._broadcast(entry, x1) for entry in self._matrix())
        if inverse:  # the determinant is 1
            a, b, c, d = d, -b, -c, a
        return a * x1 + b * x2, c * x1 + d * x2

    def _exact(
        self, x: Tensor, inverse: bool, grid: Grid, inside: list[State] | None = None
    ) -> Pair:
        """The map by shears; the halves after each are appended to ``inside``."""
        grid.require_dtype(self, x)
        sign, shears = self._shears()
        sign = self._broadcast(sign, x)
        x1, x2 = x.chunk(2, dim=1)
        halves = [x1, x2] if inverse else [sign * x1, sign * x2]
        for changed, factor in reversed(shears) if inverse else shears:
            shift = grid.round(self._broadcast(factor, x) * halves[1 - changed]).to(x.dtype)
            halves[changed] = halves[changed] - shift if inverse else halves[changed] + shift
            if inside is not None:
                inside.append((halves[0], halves[1]))
        if inverse:
            # What is turned may be -0.0. Forward, the shears have seen to that.
            halves = [positive_zeros(sign * half) for half in halves]
        return halves[0], halves[1]

    @override
    def _states_inside(self, x: Tensor, inverted: bool) -> Sequence[State]:
        inside: list[State] = []
        if self._grid is not None:
            self._exact(x, inverted, self._grid, inside)
        return inside

    @staticmethod
    def _broadcast(entry: Tensor, x: Tensor) -> Tensor:
        """One number a pair, shaped to meet ``(N, C/2, *)``."""
        return entry.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))


class PairScaling(_ChannelPairs):
    r"""Scales one channel of each pair up and the other down: volume is preserved.

    .. math:: y_c = s_c\, x_c, \qquad y_{c + C/2} = x_{c + C/2} / s_c, \qquad 0 \le c < C/2

    With a ``quantum`` it is four shears, each rounded to the grid and so undone bit for bit:

    .. math::

        \begin{pmatrix} s & 0 \\ 0 & 1/s \end{pmatrix} =
        \begin{pmatrix} 1 & s - s^2 \\ 0 & 1 \end{pmatrix}
        \begin{pmatrix} 1 & 0 \\ -1/s & 1 \end{pmatrix}
        \begin{pmatrix} 1 & s - 1 \\ 0 & 1 \end{pmatrix}
        \begin{pmatrix} 1 & 0 \\ 1 & 1 \end{pmatrix}

    Between the shears numbers are up to :math:`|x_c| + |x_{c + C/2}|` or
    :math:`s\,|x_c| + |s - 1|\,|x_{c + C/2}|`, which the range has to have room for, also where both
    ends are smaller. ``check_layers`` of a composition looks at them.

    :math:`\log s` is learned, 0 at the beginning.

    Args:
        channels: :math:`C`, even.
        quantum: The grid to stay on, a power of two; None computes in floating point.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: :math:`(N, C, *)`.

    Raises:
        TypeError: When called on anything but a tensor of floating-point numbers; with a
            quantum, on another dtype than float32 or float64.
        ValueError: If ``channels`` is odd or ``quantum`` no power of two; when called on another
            number of channels.

    References:
        Daubechies and Sweldens, *Factoring Wavelet Transforms into Lifting Steps* (1998),
        section 7.

    Example:
        >>> layer = PairScaling(4)
        >>> nn.init.normal_(layer.log_scale)  # doctest: +ELLIPSIS
        Parameter containing:...
        >>> x = torch.randn(2, 4, 8, 8)
        >>> torch.testing.assert_close(layer.inverse(layer(x)), x)
    """

    def __init__(self, channels: int, *, quantum: float | None = None) -> None:
        super().__init__(channels, quantum=quantum)
        self.log_scale = nn.Parameter(torch.zeros(channels // 2))

    @override
    def _matrix(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        zero = torch.zeros_like(self.log_scale)
        return self.log_scale.exp(), zero, zero, (-self.log_scale).exp()

    @override
    def _shears(self) -> tuple[Tensor, Shears]:
        s = self.log_scale.exp()
        one = torch.ones_like(s)
        return one, [(1, one), (0, s - 1), (1, -1 / s), (0, s - s * s)]


class PairRotation(_ChannelPairs):
    r"""Rotates each pair of channels by an angle.

    .. math::

        y_c = \cos\theta_c\, x_c - \sin\theta_c\, x_{c + C/2}, \qquad
        y_{c + C/2} = \sin\theta_c\, x_c + \cos\theta_c\, x_{c + C/2}, \qquad 0 \le c < C/2

    With a ``quantum`` it is three shears, each rounded to the grid and so undone bit for bit;
    an angle beyond :math:`\pm \pi/2` is first turned by :math:`\pi`, which only changes signs, so
    that no shear is larger than 1:

    .. math::

        \begin{pmatrix} \cos\theta & -\sin\theta \\ \sin\theta & \cos\theta \end{pmatrix} =
        \begin{pmatrix} 1 & -\tan\frac\theta2 \\ 0 & 1 \end{pmatrix}
        \begin{pmatrix} 1 & 0 \\ \sin\theta & 1 \end{pmatrix}
        \begin{pmatrix} 1 & -\tan\frac\theta2 \\ 0 & 1 \end{pmatrix}

    Between the shears numbers are up to :math:`|x_c| + |x_{c + C/2}|`, which the range has to have
    room for. ``check_layers`` of a composition looks at them.

    The angle is learned, 0 at the beginning.

    Args:
        channels: :math:`C`, even.
        quantum: The grid to stay on, a power of two; None computes in floating point.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: :math:`(N, C, *)`.

    Raises:
        TypeError: When called on anything but a tensor of floating-point numbers; with a
            quantum, on another dtype than float32 or float64.
        ValueError: If ``channels`` is odd or ``quantum`` no power of two; when called on another
            number of channels.

    References:
        Paeth, *A Fast Algorithm for General Raster Rotation* (1986).

    Example:
        >>> layer = PairRotation(2)
        >>> nn.init.constant_(layer.angle, torch.pi / 2)  # doctest: +ELLIPSIS
        Parameter containing:...
        >>> layer(torch.tensor([[1.0, 0.0]])).round().abs()
        tensor([[0., 1.]], grad_fn=<AbsBackward0>)
    """

    def __init__(self, channels: int, *, quantum: float | None = None) -> None:
        super().__init__(channels, quantum=quantum)
        self.angle = nn.Parameter(torch.zeros(channels // 2))

    @override
    def _matrix(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin = self.angle.cos(), self.angle.sin()
        return cos, -sin, sin, cos

    @override
    def _shears(self) -> tuple[Tensor, Shears]:
        turns = (self.angle.detach() / pi).round()
        rest = self.angle - turns * pi
        slope = -(rest / 2).tan()
        return 1 - 2 * (turns % 2), [(0, slope), (1, rest.sin()), (0, slope)]
