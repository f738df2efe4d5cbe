"""The entrance to bit-exact networks."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from .._support.checks import expect_state
from ..module import InvertibleModule
from ..state import map_streams, streams_of
from .grid import Grid, positive_zeros
from .ranges import stay_in_range


class Quantize(InvertibleModule):
    r"""Puts a state on the grid of multiples of a quantum; the inverse leaves it as it is.

    .. math:: y = q \cdot \operatorname{round}(x / q)

    Behind it, layers that keep the grid are inverted bit for bit (see
    :attr:`InvertibleModule.exact`). What is on the grid passes unchanged: 8-bit images divided by
    256 with any quantum up to :math:`2^{-8}`. Other values move by up to :math:`q / 2`, which
    ``inverse`` does not give back. So the layer is not injective, nor bijective: ``forward`` undoes
    ``inverse`` for every state on the grid, and ``inverse`` undoes ``forward`` for these only.
    The gradient goes straight through, and the log-determinant is 0, as on the grid.

    Zeros are 0.0, never -0.0, in both directions: sums would not give back the sign.

    Args:
        quantum: :math:`q`, a power of two from :math:`2^{-100}` to :math:`2^{100}`.

    Shape:
        - Input: a state of any shapes, float32 or float64, smaller than :math:`2^{24} q` in
          float32 and :math:`2^{53} q` in float64.
        - Output: a state of the same shapes.

    Raises:
        TypeError: When called on another dtype.
        ValueError: If ``quantum`` is no such power of two; when called, if the state is out of
            range or not finite.

    Example:
        >>> Quantize(2**-8)(torch.tensor([[3 / 256, 0.1]])) * 256
        tensor([[ 3., 26.]])
    """

    volume_preserving = True
    bijective = False
    injective = False
    surjective = True

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
        self._expect(x)
        x = stay_in_range("the input of Quantize", x, self._grid)
        return map_streams(self._grid.round, x)

    @override
    def inverse(self, y: Any) -> Any:
        return map_streams(positive_zeros, self._expect(y, inverse=True))

    def _expect(self, x: Any, inverse: bool = False) -> Any:
        for stream in streams_of(expect_state(self, x, inverse=inverse)):
            self._grid.require_dtype(self, stream)
        return x
