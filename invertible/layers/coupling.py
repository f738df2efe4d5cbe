"""Couplings: one stream is changed by a function of the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._support.checks import check_context, describe, expect_numbers, expect_streams
from .._support.memory_format import canonical
from .._support.no_trace import inverting
from ..checkpointing.replay import Replay
from ..composition.composite import Composite
from ..exact.grid import Grid
from ..module import InvertibleModule, Member
from ..state import Context, Pair
from .streams import Swap
from .subnetwork import evaluate, may_lack_context, name_of_f


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

    def __init__(
        self, f: nn.Module, *, conditional: bool = False, quantum: float | None = None
    ) -> None:
        super().__init__()
        if not isinstance(f, nn.Module):
            raise TypeError(
                f"AdditiveCoupling takes a torch.nn.Module, got {describe(f)}. A plain function "
                "becomes one as the forward method of a module."
            )
        self.f = f
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
        shift = self._shift(y1, x2, replay.context).detach()
        return replay.restore(y1 + shift if replay.inverted else y1 - shift, 0), x2

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
        return shift if self._grid is None else self._grid.round(shift.to(x1.dtype))


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
