"""The entrance to bit-exact networks."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from .._support.checks import expect_state
from ..module import InvertibleModule
from ..state import map_streams, streams_of
from .grid import Grid
from .ranges import stay_in_range


class Quantize(InvertibleModule):
    r"""Puts a state on the grid of multiples of a quantum; the inverse leaves it as it is.

    .. math:: y = q \cdot \operatorname{round}(x / q)

    Behind it, layers that keep the grid are inverted bit for bit (see
    :attr:`InvertibleModule.exact`). What is on the grid passes unchanged: 8-bit images divided by
    256 with any quantum up to :math:`2^{-8}`. Other values move by up to :math:`q / 2`, and that
    is the one thing that ``inverse`` does not give back. The gradient goes straight through.

    Args:
        quantum: :math:`q`, a power of two.

    Shape:
        - Input: a state of any shapes, float32 or float64, smaller than :math:`2^{24} q` in
          float32 and :math:`2^{53} q` in float64.
        - Output: a state of the same shapes.

    Raises:
        TypeError: When called on another dtype.
        ValueError: If ``quantum`` is no power of two; when called, if the state is out of range
            or not finite.

    Example:
        >>> Quantize(2**-8)(torch.tensor([[3 / 256, 0.1]])) * 256
        tensor([[ 3., 26.]])
    """

    volume_preserving = True
    _puts_on_grid = True

    def __init__(self, quantum: float = 2**-16) -> None:
        super().__init__()
        grid = Grid.of(self, quantum)
        assert grid is not None
        self._grid = grid

    @property
    @override
    def quantum(self) -> float:
        return self._grid.quantum

    @override
    def extra_repr(self) -> str:
        return f"quantum={self.quantum}"

    @override
    def forward(self, x: Any) -> Any:
        for stream in streams_of(expect_state(self, x)):
            self._grid.require_dtype(self, stream)
        x = stay_in_range("the input of Quantize", x, self._grid)
        return map_streams(self._grid.round, x)

    @override
    def inverse(self, y: Any) -> Any:
        return expect_state(self, y, inverse=True)
