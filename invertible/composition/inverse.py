"""A layer with its directions swapped."""

from __future__ import annotations

from typing_extensions import override

from .._support.checks import describe
from ..module import InvertibleModule, Member
from .composite import Composite


class Inverse(Composite):
    r"""A layer with its directions swapped; parameters are shared with the layer.

    .. math:: y = f^{-1}(x), \qquad x = f(y)

    Args:
        layer: A layer whose ``forward`` undoes its ``inverse`` (see
            :attr:`InvertibleModule.surjective`): any bijective one, and :class:`Quantize`.

    Shape:
        - Input: the output of ``layer``.
        - Output: the input of ``layer``.

    Raises:
        TypeError: If ``layer`` is not an :class:`InvertibleModule`.
        ValueError: If the inverse of ``layer`` has no inverse, as it throws numbers away.

    Example:
        >>> layer = Inverse(PixelUnshuffle(2))
        >>> layer(torch.randn(1, 12, 4, 4)).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(self, layer: InvertibleModule) -> None:
        super().__init__()
        if not isinstance(layer, InvertibleModule):
            raise TypeError(f"Inverse takes an invertible layer, got {describe(layer)}.")
        if not layer.surjective:
            raise ValueError(
                "Inverse takes a layer whose inverse can be undone, and "
                f"{type(layer).__name__} has a left inverse only: use its inverse method."
            )
        self.layer = layer

    @override
    def members(self) -> list[Member]:
        return [Member("layer", self.layer, inverted=True)]
