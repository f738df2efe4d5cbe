"""One layer a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._support.checks import check_context, describe, expect_streams
from ..direction import Direction
from ..module import InvertibleModule, Restore, finest


class Parallel(InvertibleModule):
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

    An error inside a layer is noted with the layer's position and class.

    Example:
        >>> y1, y2 = Parallel(PixelUnshuffle(2), PixelUnshuffle(2))(
        ...     (torch.randn(1, 3, 8, 8), torch.randn(1, 5, 8, 8))
        ... )
        >>> y1.shape, y2.shape
        (torch.Size([1, 12, 4, 4]), torch.Size([1, 20, 4, 4]))
    """

    def __init__(self, *layers: InvertibleModule) -> None:
        super().__init__()
        if not layers:
            raise ValueError(
                "Parallel takes one layer a stream, got none. PixelUnshuffle(1) leaves a stream as "
                "it is."
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
    def bijective(self) -> bool:
        return all(layer.bijective for layer in self.layers)

    @property
    def volume_preserving(self) -> bool:
        return all(layer.volume_preserving for layer in self.layers)

    @property
    def conditional(self) -> bool:
        return any(layer.conditional for layer in self.layers)

    @property
    def quantum(self) -> float | None:
        return finest(self.layers)

    @property
    def _puts_on_grid(self) -> bool:
        return all(layer._puts_on_grid for layer in self.layers)

    def forward(self, x: tuple[Tensor, ...], context: Any = None) -> tuple[Tensor, ...]:
        return self._each(Direction(), x, context)[0]

    def inverse(self, y: tuple[Tensor, ...], context: Any = None) -> tuple[Tensor, ...]:
        return self._each(Direction(inverted=True), y, context)[0]

    def forward_and_log_det(
        self, x: tuple[Tensor, ...], context: Any = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        y, log_dets = self._each(Direction(log_det=True), x, context)
        return y, torch.stack(log_dets).sum(0)

    def inverse_and_log_det(
        self, y: tuple[Tensor, ...], context: Any = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        x, log_dets = self._each(Direction(inverted=True, log_det=True), y, context)
        return x, torch.stack(log_dets).sum(0)

    def rebuild_forward(
        self, y: tuple[Tensor, ...], restore: Restore, context: Any = None
    ) -> tuple[Tensor, ...]:
        return self._rebuild("rebuild_forward", y, restore, context)

    def rebuild_inverse(
        self, x: tuple[Tensor, ...], restore: Restore, context: Any = None
    ) -> tuple[Tensor, ...]:
        return self._rebuild("rebuild_inverse", x, restore, context)

    def _rebuild(
        self, method: str, streams: tuple[Tensor, ...], restore: Restore, context: Any
    ) -> tuple[Tensor, ...]:
        rebuilt = []
        for i, (layer, stream) in enumerate(zip(self.layers, streams, strict=True)):
            given = [context] if layer.conditional else []
            rebuilt.append(getattr(layer, method)(stream, lambda x, _, i=i: restore(x, i), *given))
        return tuple(rebuilt)

    def _each(
        self, direction: Direction, streams: Any, context: Any
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        check_context(self, self.conditional, context)
        streams = expect_streams(self, streams, len(self.layers))
        results, log_dets = [], []
        for position, (layer, stream) in enumerate(zip(self.layers, streams, strict=True)):
            try:
                result, log_det = direction.run(layer, stream, context)
            except Exception as error:
                error.add_note(f"In layer {position} ({type(layer).__name__}) of a Parallel.")
                raise
            if not isinstance(result, Tensor):
                raise TypeError(
                    f"Parallel takes layers from a tensor to a tensor, and layer {position} "
                    f"({type(layer).__name__}) returned {describe(result)}."
                )
            results.append(result)
            if log_det is not None:
                log_dets.append(log_det)
        return tuple(results), log_dets
