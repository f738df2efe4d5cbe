"""A layer with its directions swapped."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._support.checks import check_context, describe
from .._support.no_trace import no_trace
from ..module import InvertibleModule, Member, call, call_inverse


class Inverse(InvertibleModule):
    r"""A layer with its directions swapped; parameters are shared with the layer.

    .. math:: y = f^{-1}(x), \qquad x = f(y)

    ``Inverse(Inverse(layer))`` is ``layer`` itself.

    Args:
        layer: A bijective layer.

    Shape:
        - Input: the output of ``layer``.
        - Output: the input of ``layer``.

    Raises:
        TypeError: If ``layer`` is not an :class:`InvertibleModule`.
        ValueError: If ``layer`` is not bijective: its inverse has no inverse.

    Example:
        >>> layer = Inverse(PixelUnshuffle(2))
        >>> layer(torch.randn(1, 12, 4, 4)).shape
        torch.Size([1, 3, 8, 8])
    """

    # Without arguments when a copy or a pickle is made.
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        layer = args[0] if args else kwargs.get("layer")
        return layer.layer if isinstance(layer, Inverse) else super().__new__(cls)

    def __init__(self, layer: InvertibleModule) -> None:
        super().__init__()
        if not isinstance(layer, InvertibleModule):
            raise TypeError(f"Inverse takes an invertible layer, got {describe(layer)}.")
        if not layer.bijective:
            raise ValueError(
                f"Inverse takes a bijective layer, and {type(layer).__name__} has a left inverse "
                "only: use its inverse method."
            )
        self.layer = layer

    @property
    def volume_preserving(self) -> bool:
        return self.layer.volume_preserving

    @property
    def conditional(self) -> bool:
        return self.layer.conditional

    @property
    def quantum(self) -> float | None:
        return self.layer.quantum

    def forward(self, x: Any, context: Any = None) -> Any:
        check_context(self, self.conditional, context)
        return call_inverse(self.layer, x, context)

    def inverse(self, y: Any, context: Any = None) -> Any:
        check_context(self, self.conditional, context)
        with no_trace(self.layer, y):
            return call(self.layer, y, context)

    def forward_and_log_det(self, x: Any, context: Any = None) -> tuple[Any, Tensor]:
        check_context(self, self.conditional, context)
        method: Any = self.layer.inverse_and_log_det
        return method(x, context) if self.conditional else method(x)  # type: ignore[no-any-return]

    def inverse_and_log_det(self, y: Any, context: Any = None) -> tuple[Any, Tensor]:
        check_context(self, self.conditional, context)
        method: Any = self.layer.forward_and_log_det
        with no_trace(self.layer, y):
            return method(y, context) if self.conditional else method(y)  # type: ignore[no-any-return]

    def _members(self, inverted: bool) -> list[Member]:
        return [("layer", self.layer, not inverted)]
