"""Layers on some of the streams of a state."""

from __future__ import annotations

from typing_extensions import override

from .._support.checks import describe
from ..module import InvertibleModule, Member
from .composite import Composite


class OnStreams(Composite):
    r"""Runs a layer on some of the streams, and leaves the others as they are.

    .. math:: (x_1, \dots, x_k) \mapsto (x_1, \dots, f(x_i), \dots, x_k)

    Args:
        streams: Which: a number hands over a bare tensor and takes one back, a tuple of numbers
            hands over a tuple and takes as many tensors back, for the same places. Streams are
            counted from 0, or from the end if negative.
        layer: What is run on them.

    Shape:
        - Input: a tuple of tensors, with all the streams that are named.
        - Output: a tuple of as many tensors.

    Raises:
        TypeError: If ``streams`` is neither a whole number nor a tuple of them, or ``layer`` no
            :class:`InvertibleModule`; when called on anything but a tuple of tensors, or if the
            layer returns a tensor in place of a tuple, or the reverse.
        ValueError: If ``streams`` is empty or names a stream twice; when called, if there is no
            such stream, two numbers are those of one, or the layer returns another number of
            streams than it took.

    Example:
        >>> layer = OnStreams(0, PixelUnshuffle(2))
        >>> y1, y2 = layer((torch.randn(1, 3, 8, 8), torch.randn(1, 5, 8, 8)))
        >>> y1.shape, y2.shape
        (torch.Size([1, 12, 4, 4]), torch.Size([1, 5, 8, 8]))
        >>> coupling = OnStreams((0, -1), AdditiveCoupling(nn.Linear(2, 2)))
        >>> _, y2, _ = coupling((torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2)))
        >>> y2
        tensor([[1., 1.]])
    """

    def __init__(self, streams: int | tuple[int, ...], layer: InvertibleModule) -> None:
        super().__init__()
        numbers = streams if isinstance(streams, tuple) else (streams,)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in numbers):
            raise TypeError(
                f"OnStreams takes the number of a stream or a tuple of such, got {streams!r}."
            )
        if not numbers or len(set(numbers)) != len(numbers):
            raise ValueError(
                f"OnStreams takes each stream once, and at least one, got {streams!r}."
            )
        if not isinstance(layer, InvertibleModule):
            raise TypeError(
                f"OnStreams takes an invertible layer behind the streams, got {describe(layer)}. "
                "Put it into a coupling, AdditiveCoupling(f), or subclass InvertibleModule."
            )
        self.streams = streams
        self.layer = layer

    @override
    def members(self) -> list[Member]:
        return [Member("layer", self.layer, streams=self.streams)]

    @override
    def extra_repr(self) -> str:
        return f"streams={self.streams}"


class Parallel(Composite):
    r"""Runs one layer on each stream.

    .. math:: (x_1, \dots, x_k) \mapsto (f_1(x_1), \dots, f_k(x_k))

    Args:
        *layers: As many layers as streams, each from a tensor to a tensor. The same layer may
            stand more than once, and then shares its parameters.

    Shape:
        - Input: a tuple of as many tensors as layers.
        - Output: a tuple of as many tensors.

    Raises:
        TypeError: If a layer is not an :class:`InvertibleModule`; when called on anything but a
            tuple of tensors, or if a layer does not return a tensor.
        ValueError: If there are no layers; when called on another number of streams.

    Example:
        >>> y1, y2 = Parallel(PixelUnshuffle(2), Identity())(
        ...     (torch.randn(1, 3, 8, 8), torch.randn(1, 5, 8, 8))
        ... )
        >>> y1.shape, y2.shape
        (torch.Size([1, 12, 4, 4]), torch.Size([1, 5, 8, 8]))
    """

    def __init__(self, *layers: InvertibleModule) -> None:
        super().__init__()
        if not layers:
            raise ValueError(
                "Parallel takes one layer a stream, got none. Identity() leaves a stream as it is."
            )
        for position, layer in enumerate(layers):
            if not isinstance(layer, InvertibleModule):
                raise TypeError(
                    f"Parallel takes invertible layers, and layer {position} is {describe(layer)}. "
                    "Put it into a coupling, AdditiveCoupling(f), or subclass InvertibleModule."
                )
            self.add_module(str(position), layer)

    @property
    def layers(self) -> tuple[InvertibleModule, ...]:
        return tuple(self._modules.values())  # type: ignore[arg-type]

    @property
    @override
    def stream_count(self) -> int:  # type: ignore[override]
        return len(self._modules)

    @override
    def members(self) -> list[Member]:
        return [Member(str(i), layer, streams=i) for i, layer in enumerate(self.layers)]
