"""One layer a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_context, describe, expect_streams
from ..module import (
    InvertibleModule,
    Step,
    call,
    call_inverse,
    collecting_inverse_log_dets,
    collecting_log_dets,
)


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
            raise ValueError("Parallel takes one layer a stream, got none.")
        for position, layer in enumerate(layers):
            if not isinstance(layer, InvertibleModule):
                raise TypeError(
                    f"Parallel takes invertible layers, got a {type(layer).__name__} as layer "
                    f"{position}."
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

    def forward(self, x: tuple[Tensor, ...], context: Any = None) -> tuple[Tensor, ...]:
        return self._each(call, x, context)

    def inverse(self, y: tuple[Tensor, ...], context: Any = None) -> tuple[Tensor, ...]:
        return self._each(call_inverse, y, context)

    def forward_and_log_det(
        self, x: tuple[Tensor, ...], context: Any = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        log_dets: list[Tensor] = []
        return self._each(collecting_log_dets(log_dets), x, context), torch.stack(log_dets).sum(0)

    def inverse_and_log_det(
        self, y: tuple[Tensor, ...], context: Any = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        log_dets: list[Tensor] = []
        step = collecting_inverse_log_dets(log_dets)
        return self._each(step, y, context), torch.stack(log_dets).sum(0)

    def _each(self, step: Step, streams: Any, context: Any) -> tuple[Tensor, ...]:
        check_context(self, self.conditional, context)
        streams = expect_streams(self, streams, len(self.layers))
        results = []
        for position, (layer, stream) in enumerate(zip(self.layers, streams, strict=True)):
            result = step(layer, stream, context)
            if not isinstance(result, Tensor):
                raise TypeError(
                    f"Parallel takes layers from a tensor to a tensor, and layer {position} "
                    f"({type(layer).__name__}) returned {describe(result)}."
                )
            results.append(result)
        return tuple(results)
