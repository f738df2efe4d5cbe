"""Couplings: one stream is changed by a function of the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._support.checks import check_context, describe, expect_streams
from .._support.memory_format import canonical
from .._support.no_trace import no_trace
from ..exact.grid import check_dtype, check_quantum, round_to_grid
from ..module import InvertibleModule, Restore
from ..state import Pair, version


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
            or float64 state on the grid (put :class:`Quantize` first). None rounds nothing.
        conditional: Whether ``f`` takes a context, ``f(x2, context)``: the coupling is then
            called as ``layer(x, context)``.

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
        check_quantum(self, quantum)
        self.f = f
        self._conditional = conditional
        self._quantum = quantum

    @property
    def conditional(self) -> bool:
        return self._conditional

    @property
    def quantum(self) -> float | None:
        return self._quantum

    def extra_repr(self) -> str:
        options = {"conditional": self.conditional or None, "quantum": self.quantum}
        return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)

    def forward(self, x: Pair, context: Any = None) -> Pair:
        x1, x2 = expect_streams(self, x, 2)
        return x1 + self._shift(x1, x2, context), x2

    def inverse(self, y: Pair, context: Any = None) -> Pair:
        y1, x2 = expect_streams(self, y, 2)
        with no_trace(self.f, y):
            shift = self._shift(y1, x2, context)
        return y1 - shift, x2

    def rebuild_forward(self, y: Pair, restore: Restore, context: Any = None) -> Pair:
        y1, x2 = y
        x2 = restore(x2, 1)
        shift = self._shift(y1, x2, context)
        with torch.no_grad():
            return restore(y1 - shift, 0), x2

    def rebuild_inverse(self, x: Pair, restore: Restore, context: Any = None) -> Pair:
        x1, x2 = x
        x2 = restore(x2, 1)
        with no_trace(self.f, x):
            shift = self._shift(x1, x2, context)
        with torch.no_grad():
            return restore(x1 + shift, 0), x2

    def _shift(self, x1: Tensor, x2: Tensor, context: Any) -> Tensor:
        check_context(self, self.conditional, context)
        if self.quantum is not None:
            check_dtype(self, x1)
            x2 = canonical(x2, self.f)  # backward as forward, whatever made the stream
        before = version(x2)
        try:
            shift = self.f(x2, context) if self.conditional else self.f(x2)
        except Exception as error:
            error.add_note(
                f"In AdditiveCoupling's f ({type(self.f).__name__}), given a second stream of "
                f"shape {tuple(x2.shape)}, {x2.dtype} on {x2.device}."
            )
            raise
        if version(x2) != before:
            raise RuntimeError(
                f"AdditiveCoupling's f ({type(self.f).__name__}) changed its input in place, and "
                "the stream with it. Let its first operation be out of place, for instance "
                "ReLU(inplace=False)."
            )
        if not isinstance(shift, Tensor) or shift.shape != x1.shape:
            hint = (
                "Check its channels, stride and padding."
                if isinstance(shift, Tensor)
                else "Wrap it in a module that returns that tensor alone."
            )
            raise ValueError(
                f"AdditiveCoupling's f ({type(self.f).__name__}) must return a tensor of the first "
                f"stream's shape {tuple(x1.shape)}, got {describe(shift)} from a second stream of "
                f"shape {tuple(x2.shape)}. {hint}"
            )
        if shift.dtype != x1.dtype and torch.promote_types(x1.dtype, shift.dtype) != x1.dtype:
            raise ValueError(
                f"AdditiveCoupling's f ({type(self.f).__name__}) returned {shift.dtype}, which "
                f"would change the dtype of the stream, {x1.dtype}. Cast f or the state."
            )
        if self.quantum is None:
            return shift
        return round_to_grid(shift.to(x1.dtype), self.quantum)
