"""Couplings: one stream is changed by a function of the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._support.checks import check_context, describe, expect_numbers, expect_real, expect_streams
from .._support.memory_format import canonical
from .._support.no_trace import inverting
from ..checkpointing.replay import Replay
from ..composition.composite import Composite
from ..exact.grid import Grid
from ..module import InvertibleModule, Member, zeros_for
from ..state import Context, Pair
from .mapping import apply_map, expect_dim, expect_map, in_blocks, require_finite, total
from .maps import Affine, ElementwiseMap, ScaleName
from .spline import RationalQuadraticSpline
from .streams import Swap
from .subnetwork import evaluate, expect_module, may_lack_context, name_of_f


class AdditiveCoupling(InvertibleModule):
    r"""Shifts one stream by a function of the other.

    .. math:: y_1 = x_1 + f(x_2), \qquad y_2 = x_2

    The inverse subtracts the same shift, so :math:`f` need not be invertible itself: any
    module will do, with BatchNorm, dropout, attention or hooks of its own. Alternate with
    :class:`Swap` to change both streams. In train mode with dropout, the inverse undoes the
    forward only from the random state that the forward started from.

    Args:
        f: Any module whose output has the shape of the first stream.
        quantum: The grid to stay on, a power of two such as ``2**-16``: the shift is rounded to
            it, the gradient goes straight through, and the inverse is bit for bit for a float32
            or float64 state on the grid, whose zeros are 0.0 (put :class:`Quantize` first). None
            rounds nothing.
        conditional: Whether ``f`` takes a context, ``f(x2, context)``: the coupling is then
            called as ``layer(x, context)``. The context may be left out if ``f`` has a default.

    Shape:
        - Input: a pair :math:`(N, C_1, *)`, :math:`(N, C_2, *)`.
        - Output: a pair of the same shapes.

    Raises:
        TypeError: If ``f`` is no module; when called on a tensor instead of a pair (put
            :class:`Split` before), or with a missing or a superfluous context.
        ValueError: When called, if :math:`f(x_2)` has another shape than :math:`x_1`, or a
            dtype that would change the stream's, or if the streams differ in dtype or device.
        RuntimeError: When called, if ``f`` changes its input in place.

    References:
        Dinh et al., *NICE* (2014), section 3.2, https://arxiv.org/abs/1410.8516.

    Example:
        >>> layer = AdditiveCoupling(nn.Conv2d(2, 2, kernel_size=3, padding=1))
        >>> x = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8)
        >>> torch.testing.assert_close(layer.inverse(layer(x)), x)
    """

    volume_preserving = True
    _factor = 1.0  # of the shift, see Leapfrog

    def __init__(
        self, f: nn.Module, *, conditional: bool = False, quantum: float | None = None
    ) -> None:
        super().__init__()
        self.f = expect_module(self, f)
        self._conditional = conditional
        self._grid = Grid.of(self, quantum)

    @property
    @override
    def conditional(self) -> bool:
        return self._conditional

    @property
    @override
    def requires_context(self) -> bool:
        return self.conditional and not may_lack_context(self.f)

    @property
    @override
    def quantum(self) -> float | None:
        return self._grid.quantum if self._grid else None

    @override
    def extra_repr(self) -> str:
        options = {"conditional": self.conditional or None, "quantum": self.quantum}
        return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)

    @override
    def forward(self, x: Pair, context: Context = None) -> Pair:
        x1, x2 = expect_streams(self, x, 2)
        return x1 + self._shift(x1, x2, context), x2

    @override
    def inverse(self, y: Pair, context: Context = None) -> Pair:
        y1, x2 = expect_streams(self, y, 2)
        with inverting(self.f, y):
            shift = self._shift(y1, x2, context)
        return y1 - shift, x2

    @override
    def rebuild(self, y: Pair, replay: Replay) -> Pair:
        y1, x2 = y
        x2 = replay.restore(x2, 1)
        with replay.again:
            shift = self._shift(y1, x2, replay.context)
        fixed = shift.detach()
        x1 = replay.restore(y1 + fixed if replay.inverted else y1 - fixed, 0)
        if replay.wants_result:
            found = x1 - shift if replay.inverted else x1 + shift
            replay.returned((found, x2), zeros_for(x1) if replay.log_det else None)
        return x1, x2

    def _shift(self, x1: Tensor, x2: Tensor, context: Context) -> Tensor:
        if (context is None) is self._conditional:
            check_context(self, context)
        if x1.dtype is torch.bool:
            expect_numbers(self, x1)
        if self._grid is not None:
            self._grid.require_dtype(self, x1)
            x2 = canonical(x2, self.f)  # backward as forward, whatever made the stream
        f = self.f
        shift = evaluate(self, f, x2, context)
        if not isinstance(shift, Tensor) or shift.shape != x1.shape:
            hint = (
                "Check its channels, stride and padding."
                if isinstance(shift, Tensor)
                else "Wrap it in a module that returns that tensor alone."
            )
            raise ValueError(
                f"{name_of_f(self, f)} must return a tensor of the first stream's shape "
                f"{tuple(x1.shape)}, got {describe(shift)} from a second stream of shape "
                f"{tuple(x2.shape)}. {hint}"
            )
        if shift.dtype != x1.dtype and torch.promote_types(x1.dtype, shift.dtype) != x1.dtype:
            raise ValueError(
                f"{name_of_f(self, f)} returned {shift.dtype}, which would change the dtype "
                f"of the stream, {x1.dtype}. Cast f or the state."
            )
        if self._factor != 1:
            shift = self._factor * shift.to(x1.dtype)
        return shift if self._grid is None else self._grid.round(shift.to(x1.dtype))


class Coupling(InvertibleModule):
    r"""Changes one stream value by value, with parameters that are a function of the other.

    .. math:: y_1 = m(x_1;\, f(x_2)), \qquad y_2 = x_2

    The elementwise map :math:`m` is invertible for any parameters, so :math:`f` need not be: any
    module will do, as in :class:`AdditiveCoupling`. It is evaluated once in each direction, and
    once more where activations are rebuilt. Alternate with :class:`Swap` to change both streams.

    :math:`f` returns ``map.parameters_per_value`` numbers for each value of the first stream, in
    blocks along the channels: with an affine map and three channels, first the three shifts and
    then the three raw scales. Where it returns 0, most maps are the identity: a network whose last
    layers are zero begins as one.

    The map and the log-determinant are computed in float32 or wider, also under autocast.

    Args:
        f: Any module from the second stream to the parameters.
        map: What is done to each value, such as :class:`Affine`.
        conditional: Whether ``f`` takes a context, ``f(x2, context)``, as in
            :class:`AdditiveCoupling`.
        dim: The dimension of the channels, not 0; -1 for tokens :math:`(N, T, C)`.

    Shape:
        - Input: a pair :math:`(N, C_1, *)`, :math:`(N, C_2, *)`.
        - Output: a pair of the same shapes.
        - ``f``: from :math:`(N, C_2, *)` to :math:`(N, P\, C_1, *)`, with :math:`P` parameters a
          value.

    Raises:
        TypeError: If ``f`` is no module or ``map`` no :class:`ElementwiseMap`; when called on
            anything but a pair of tensors of floating-point numbers, or with a missing or a
            superfluous context.
        ValueError: If ``dim`` is 0; when called, if what ``f`` returns has another shape than
            :math:`(N, P\, C_1, *)`, or a wider dtype than the map computes in.
        RuntimeError: When called, if ``f`` changes its input in place.
        OverflowError: When inverted on a CPU without grad, if values overflow or become NaN.

    References:
        Dinh et al., *Density Estimation using Real NVP* (2017), section 3.2,
        https://arxiv.org/abs/1605.08803; Durkan et al., *Neural Spline Flows* (2019), section 3.2,
        https://arxiv.org/abs/1906.04032.

    Example:
        >>> layer = Coupling(nn.Conv2d(3, 2 * 2, kernel_size=3, padding=1), Affine())
        >>> x = torch.randn(1, 2, 8, 8), torch.randn(1, 3, 8, 8)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> log_det.shape
        torch.Size([1])
        >>> torch.testing.assert_close(layer.inverse(y), x, rtol=1e-4, atol=1e-4)
    """

    def __init__(
        self,
        f: nn.Module,
        map: ElementwiseMap,  # noqa: A002 - it is one
        *,
        conditional: bool = False,
        dim: int = 1,
    ) -> None:
        super().__init__()
        self.f = expect_module(self, f)
        self.map = expect_map(self, map)
        self.dim = expect_dim(self, dim)
        self._conditional = conditional

    @property
    @override
    def volume_preserving(self) -> bool:
        return self.map.volume_preserving

    @property
    @override
    def conditional(self) -> bool:
        return self._conditional

    @property
    @override
    def requires_context(self) -> bool:
        return self.conditional and not may_lack_context(self.f)

    @override
    def extra_repr(self) -> str:
        options = {
            "conditional": self.conditional or None,
            "dim": None if self.dim == 1 else self.dim,
        }
        return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)

    @override
    def forward(self, x: Pair, context: Context = None) -> Pair:
        x1, x2 = expect_streams(self, x, 2)
        y1, _ = apply_map(self.map, x1, self._parameters_for(x1, x2, context))
        return y1, x2

    @override
    def inverse(self, y: Pair, context: Context = None) -> Pair:
        y1, x2 = expect_streams(self, y, 2, inverse=True)
        with inverting(self.f, y):
            parameters = self._parameters_for(y1, x2, context)
        x1, _ = apply_map(self.map, y1, parameters, inverse=True)
        require_finite(self, x1, y1)
        return x1, x2

    @override
    def forward_and_log_det(self, x: Pair, context: Context = None) -> tuple[Pair, Tensor]:
        x1, x2 = expect_streams(self, x, 2)
        y1, log_slope = apply_map(self.map, x1, self._parameters_for(x1, x2, context))
        return (y1, x2), total(log_slope, y1)

    @override
    def inverse_and_log_det(self, y: Pair, context: Context = None) -> tuple[Pair, Tensor]:
        y1, x2 = expect_streams(self, y, 2, inverse=True)
        with inverting(self.f, y):
            parameters = self._parameters_for(y1, x2, context)
        x1, log_slope = apply_map(self.map, y1, parameters, inverse=True)
        require_finite(self, x1, y1)
        return (x1, x2), total(log_slope, x1)

    @override
    def rebuild(self, y: Pair, replay: Replay) -> Pair:
        y1, x2 = y
        x2 = replay.restore(x2, 1)
        with replay.again:
            parameters = self._parameters_for(y1, x2, replay.context)
        with torch.no_grad():
            x1, _ = apply_map(self.map, y1, parameters, inverse=not replay.inverted)
        x1 = replay.restore(x1, 0)
        found, log_slope = apply_map(self.map, x1, parameters, inverse=replay.inverted)
        if replay.wants_result:
            replay.returned((found, x2), total(log_slope, x1) if replay.log_det else None)
        return x1, x2

    def _parameters_for(self, x1: Tensor, x2: Tensor, context: Context) -> Tensor:
        if (context is None) is self._conditional:
            check_context(self, context)
        expect_real(self, x1)
        return in_blocks(self, self.f, self.map, evaluate(self, self.f, x2, context), x1, self.dim)


class AffineCoupling(Coupling):
    r"""Scales and shifts one stream by functions of the other.

    .. math:: y_1 = s(r) \odot x_1 + t, \qquad y_2 = x_2, \qquad (t, r) = f(x_2)

    A :class:`Coupling` with the map :class:`Affine`, whose page has the scales.

    Args:
        f: Any module from the second stream to twice the channels of the first: the shifts, then
            the raw scales.
        scale: Name of the scale.
        shift_first: Whether the shift comes before the scale.
        conditional: Whether ``f`` takes a context.
        dim: The dimension of the channels.

    Shape:
        - Input: a pair :math:`(N, C_1, *)`, :math:`(N, C_2, *)`.
        - Output: a pair of the same shapes.

    Raises:
        TypeError: As :class:`Coupling` does.
        ValueError: As :class:`Coupling` and :class:`Affine` do.

    References:
        Dinh et al., *Density Estimation using Real NVP* (2017), section 3.2,
        https://arxiv.org/abs/1605.08803.

    Example:
        >>> layer = AffineCoupling(nn.Linear(3, 2 * 2))
        >>> y, log_det = layer.forward_and_log_det((torch.randn(5, 2), torch.randn(5, 3)))
        >>> log_det.shape
        torch.Size([5])
    """

    def __init__(
        self,
        f: nn.Module,
        *,
        scale: ScaleName = "soft-clamp",
        shift_first: bool = False,
        conditional: bool = False,
        dim: int = 1,
    ) -> None:
        super().__init__(
            f, Affine(scale, shift_first=shift_first), conditional=conditional, dim=dim
        )


class SplineCoupling(Coupling):
    r"""Bends each value of one stream by a spline that is a function of the other.

    .. math:: y_1 = \operatorname{spline}(x_1;\, f(x_2)), \qquad y_2 = x_2

    A :class:`Coupling` with the map :class:`RationalQuadraticSpline`, whose page has the formula
    and its options; for these make the two yourself.

    Args:
        f: Any module from the second stream to :math:`3 K - 1` times the channels of the first.
        bins: :math:`K`, at least 2.
        bound: The spline bends values between ``-bound`` and ``bound``, and leaves the others.
        conditional: Whether ``f`` takes a context.
        dim: The dimension of the channels.

    Shape:
        - Input: a pair :math:`(N, C_1, *)`, :math:`(N, C_2, *)`.
        - Output: a pair of the same shapes.

    Raises:
        TypeError: As :class:`Coupling` does.
        ValueError: As :class:`Coupling` and :class:`RationalQuadraticSpline` do.

    References:
        Durkan et al., *Neural Spline Flows* (2019), section 3,
        https://arxiv.org/abs/1906.04032.

    Example:
        >>> layer = SplineCoupling(nn.Linear(3, 2 * 23))
        >>> x = torch.randn(5, 2), torch.randn(5, 3)
        >>> torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=1e-3, atol=1e-3)
    """

    def __init__(
        self,
        f: nn.Module,
        bins: int = 8,
        bound: float = 3.0,
        *,
        conditional: bool = False,
        dim: int = 1,
    ) -> None:
        super().__init__(f, RationalQuadraticSpline(bins, bound), conditional=conditional, dim=dim)


class ReversibleBlock(Composite):
    r"""Changes both streams, each by a function of the other: two couplings.

    .. math:: y_1 = x_1 + f(x_2), \qquad y_2 = x_2 + g(y_1)

    The block of RevNets and Reformers. The inverse needs neither :math:`f^{-1}` nor
    :math:`g^{-1}`: any modules will do.

    Args:
        f: Any module from the second stream to a tensor of the first's shape.
        g: Any module from the first stream to a tensor of the second's shape.
        conditional: Whether both take a context, ``f(x2, context)``; or a pair, for each of them.
        quantum: The grid to stay on, as in :class:`AdditiveCoupling`.

    Shape:
        - Input: a pair :math:`(N, C_1, *)`, :math:`(N, C_2, *)`.
        - Output: a pair of the same shapes.

    Raises:
        TypeError: If ``f`` or ``g`` is no module; when called as :class:`AdditiveCoupling`.
        ValueError: When called, as :class:`AdditiveCoupling`.

    References:
        Gomez et al., *The Reversible Residual Network* (2017), section 3.1,
        https://arxiv.org/abs/1707.04585; Kitaev et al., *Reformer* (2020), section 3,
        https://arxiv.org/abs/2001.04451.

    Example:
        >>> blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(8)]
        >>> network = InvertibleSequential(Split(), *blocks, Merge(), checkpoint=True)
        >>> network(torch.randn(8, 4)).sum().backward()
    """

    def __init__(
        self,
        f: nn.Module,
        g: nn.Module,
        *,
        conditional: bool | tuple[bool, bool] = False,
        quantum: float | None = None,
    ) -> None:
        super().__init__()
        pair = conditional if isinstance(conditional, tuple) else (conditional, conditional)
        if len(pair) != 2:
            raise ValueError(
                f"ReversibleBlock takes conditional as a bool or a pair of them, got {conditional}."
            )
        for name, module in {"f": f, "g": g}.items():
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"ReversibleBlock takes a torch.nn.Module as {name}, got {describe(module)}."
                )
        self.f = f
        self.g = g
        self._conditional = pair
        self._quantum = quantum
        self._couple()

    def _couple(self) -> None:
        # Not registered: parameters are named f.… and g.…, and each is there once.
        self._couplings = [
            AdditiveCoupling(part, conditional=conditional, quantum=self._quantum)
            for part, conditional in zip((self.f, self.g), self._conditional, strict=True)
        ]

    @override
    def members(self) -> list[Member]:
        first, second = self._couplings
        if first.f is not self.f or second.f is not self.g:  # replaced by others since
            self._couple()
            first, second = self._couplings
        return [
            Member("f", first),
            Member("swap", _SWAP),
            Member("g", second),
            Member("swap", _SWAP),
        ]


_SWAP = Swap()
