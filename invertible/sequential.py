"""The composition of layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn

from ._checks import check_context
from .module import (
    InvertibleModule,
    Step,
    call,
    call_inverse,
    collecting_inverse_log_dets,
    collecting_log_dets,
)

Placed = tuple[int, InvertibleModule]


class InvertibleSequential(InvertibleModule):
    r"""Runs layers one after the other, and back.

    .. math:: y = (f_n \circ \dots \circ f_1)(x), \qquad
              x = (f_1^{-1} \circ \dots \circ f_n^{-1})(y)

    It is indexed, sliced, iterated over and appended to as :class:`torch.nn.Sequential` is; a
    slice is invertible too and shares the layers. It is bijective, volume preserving and
    so on when all its layers are. A context reaches every layer that takes one.

    Args:
        *layers: Invertible layers in the order of :meth:`forward`, or one ``OrderedDict`` of
            named ones.

    Shape:
        - Input: whatever the first layer takes.
        - Output: whatever the last layer returns.

    Raises:
        TypeError: If a layer is not an :class:`InvertibleModule`; when called, if a context is
            missing or nothing would use it.
        ValueError: When called, if there are no layers.

    An error inside a layer is noted with the layer's position and class.

    Example:
        >>> network = InvertibleSequential(PixelUnshuffle(2), Split(), Swap())
        >>> y1, y2 = network(torch.randn(1, 3, 8, 8))
        >>> y1.shape
        torch.Size([1, 6, 4, 4])
        >>> network[:1].inverse(torch.randn(1, 12, 4, 4)).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(self, *layers: InvertibleModule | OrderedDict[str, InvertibleModule]) -> None:
        super().__init__()
        named = layers[0] if len(layers) == 1 and isinstance(layers[0], OrderedDict) else None
        for name, layer in (named or dict(enumerate(layers))).items():
            self.add_module(str(name), layer)  # type: ignore[arg-type]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Adds a layer at the end, under a name of its own."""
        if name in self._modules:
            raise ValueError(f"InvertibleSequential already has a layer named {name!r}.")
        _require_invertible(name, module)
        super().add_module(name, module)

    def __setattr__(self, name: str, value: Any) -> None:
        # An attribute that is a module becomes a layer, as in nn.Sequential.
        if isinstance(value, nn.Module):
            _require_invertible(name, value)
        super().__setattr__(name, value)

    def append(self, layer: InvertibleModule) -> InvertibleSequential:
        """Adds a layer at the end, and returns the sequence."""
        self.add_module(str(len(self)), layer)
        return self

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[InvertibleModule]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    @overload
    def __getitem__(self, index: int) -> InvertibleModule: ...
    @overload
    def __getitem__(self, index: slice) -> InvertibleSequential: ...
    def __getitem__(self, index: int | slice) -> InvertibleModule:
        if not isinstance(index, slice):
            return list(self)[index]
        layers = list(self._modules.items())[index]
        # Numbered layers are numbered anew, so that append finds the next number free.
        if all(name.isdigit() for name, _ in layers):
            return InvertibleSequential(*(layer for _, layer in layers))  # type: ignore[arg-type]
        return InvertibleSequential(OrderedDict(layers))  # type: ignore[arg-type]

    @property
    def bijective(self) -> bool:
        return all(layer.bijective for layer in self)

    @property
    def volume_preserving(self) -> bool:
        return all(layer.volume_preserving for layer in self)

    @property
    def conditional(self) -> bool:
        return any(layer.conditional for layer in self)

    def forward(self, x: Any, context: Any = None) -> Any:
        return self._run(call, list(enumerate(self)), x, context)

    def inverse(self, y: Any, context: Any = None) -> Any:
        return self._run(call_inverse, list(enumerate(self))[::-1], y, context)

    def forward_and_log_det(self, x: Any, context: Any = None) -> tuple[Any, Tensor]:
        log_dets: list[Tensor] = []
        y = self._run(collecting_log_dets(log_dets), list(enumerate(self)), x, context)
        return y, torch.stack(log_dets).sum(0)

    def inverse_and_log_det(self, y: Any, context: Any = None) -> tuple[Any, Tensor]:
        log_dets: list[Tensor] = []
        step = collecting_inverse_log_dets(log_dets)
        x = self._run(step, list(enumerate(self))[::-1], y, context)
        return x, torch.stack(log_dets).sum(0)

    def _run(self, step: Step, layers: list[Placed], state: Any, context: Any) -> Any:
        if not layers:
            raise ValueError("InvertibleSequential has no layers to run: append some first.")
        check_context(self, self.conditional, context)
        for position, layer in layers:
            try:
                state = step(layer, state, context)
            except Exception as error:
                name = type(layer).__name__
                error.add_note(f"In layer {position} ({name}) of an InvertibleSequential.")
                raise
        return state


def _require_invertible(name: str, layer: object) -> None:
    if not isinstance(layer, InvertibleModule):
        raise TypeError(
            f"InvertibleSequential takes invertible layers, got a {type(layer).__name__} as layer "
            f"{name!r}. Put it into a coupling, AdditiveCoupling(f), or give it an inverse by "
            "subclassing InvertibleModule."
        )
