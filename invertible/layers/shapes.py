"""The same numbers, as they are or in another shape."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor
from typing_extensions import override

from .._support.checks import describe, expect_state, expect_tensor, name_of
from .._support.memory_format import memory_format
from ..module import InvertibleModule


class Identity(InvertibleModule):
    r"""Returns its state as it is.

    .. math:: y = x

    For the place of a layer that is left out, or of a stream that :class:`Parallel` leaves alone.

    Shape:
        - Input: a state of any shapes.
        - Output: the same state.

    Raises:
        TypeError: When called on anything but a tensor or a tuple of tensors.

    Example:
        >>> layer = Parallel(Identity(), Permute([1, 0]))
        >>> layer((torch.tensor([[1, 2]]), torch.tensor([[3, 4]])))
        (tensor([[1, 2]]), tensor([[4, 3]]))
    """

    volume_preserving = True
    moves_only = True
    _hands_through = True

    @override
    def forward(self, x: Any) -> Any:
        return expect_state(self, x)

    @override
    def inverse(self, y: Any) -> Any:
        return expect_state(self, y, inverse=True)


class Reshape(InvertibleModule):
    """Gives each example another shape, the numbers in the same order.

    Args:
        input_shape: Shape of one example, without the batch.
        output_shape: Its new shape, of as many numbers.

    Shape:
        - Input: :math:`(N, *)` with ``*`` the ``input_shape``.
        - Output: :math:`(N, *)` with ``*`` the ``output_shape``.

    Raises:
        TypeError: When called on anything but a tensor.
        ValueError: If the shapes hold different counts of numbers; when called on a tensor of
            another shape.

    Example:
        >>> Reshape((3, 4, 4), (12, 2, 2))(torch.randn(5, 3, 4, 4)).shape
        torch.Size([5, 12, 2, 2])
    """

    volume_preserving = True
    moves_only = True

    def __init__(self, input_shape: Sequence[int], output_shape: Sequence[int]) -> None:
        super().__init__()
        self.input_shape = self._shape(input_shape)
        self.output_shape = self._shape(output_shape)
        sizes = self.input_shape + self.output_shape
        if min(sizes, default=1) < 1 or prod(self.input_shape) != prod(self.output_shape):
            raise ValueError(
                f"{type(self).__name__} takes two shapes of as many numbers, got "
                f"{self.input_shape} ({prod(self.input_shape)} numbers) and {self.output_shape} "
                f"({prod(self.output_shape)}). Leave the batch out, and give every size; the "
                "smallest is 1."
            )

    def _shape(self, sizes: Sequence[int]) -> tuple[int, ...]:
        if not isinstance(sizes, Sequence):
            raise TypeError(
                f"{type(self).__name__} takes the shape of an example as a tuple, got {sizes!r}. "
                f"Write ({sizes},)."
            )
        return tuple(sizes)

    @override
    def extra_repr(self) -> str:
        return f"{self.input_shape} -> {self.output_shape}"

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._reshape(x, self.input_shape, self.output_shape)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return self._reshape(y, self.output_shape, self.input_shape, inverse=True)

    def _reshape(
        self, x: Tensor, old: tuple[int, ...], new: tuple[int, ...], inverse: bool = False
    ) -> Tensor:
        x = expect_tensor(self, x, min_dim=1, inverse=inverse)
        if x.shape[1:] != old:
            hint = "Give it a batch dimension: x.unsqueeze(0)." if x.shape == old else ""
            raise ValueError(
                f"{name_of(self, inverse)} takes examples of shape {old} behind the batch, got "
                f"{describe(x)}. {hint or 'Make the layer for its shape.'}"
            )
        y = x.reshape(x.shape[0], *new)
        return y.contiguous(memory_format=memory_format(x)) if y.dim() == x.dim() else y


class Flatten(Reshape):
    """Makes each example a vector; the inverse gives it its shape back.

    Args:
        input_shape: Shape of one example, without the batch: the inverse needs it.

    Shape:
        - Input: :math:`(N, *)` with ``*`` the ``input_shape``.
        - Output: :math:`(N, L)` with :math:`L` the product of ``input_shape``.

    Raises:
        TypeError: When called on anything but a tensor.
        ValueError: When called on a tensor of another shape.

    Example:
        >>> Flatten((3, 4, 4))(torch.randn(5, 3, 4, 4)).shape
        torch.Size([5, 48])
    """

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__(input_shape, (prod(self._shape(input_shape)),))
