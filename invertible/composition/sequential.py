"""The composition of layers."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn

from .._support.checks import check_context, describe
from ..checkpointing import checkpoint
from ..checkpointing.plan import NO_LAYERS, steps
from ..direction import Direction
from ..exact.grid import check_entrance, check_exit, check_layer
from ..module import InvertibleModule, Member, finest, located


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
        checkpoint: Whether training stores no activations: they are rebuilt by inversion in the
            backward pass (see :func:`reversible_checkpoint`). It changes the rounding of
            gradients, and so is asked for.
        anchor_every: With ``checkpoint``, how many layers share one stored state, from which
            rebuilding starts afresh; by default only the output is stored.
        check_layers: For an exact composition, whether the range is checked behind every
            layer, to find the one that leaves it; by default at both ends only.

    Shape:
        - Input: whatever the first layer takes.
        - Output: whatever the last layer returns.

    Raises:
        TypeError: If a layer is not an :class:`InvertibleModule`; when called, if a context is
            missing or nothing would use it.
        ValueError: When called, if there are no layers; for an exact composition, if the input is
            not on the grid, or a state is not finite or out of the range in which sums are exact.
            While training on an accelerator, which is not made to wait for the answer, the output
            becomes NaN instead, unless ``check_layers`` is set.

    An error inside a layer is noted with the layer's position and class.

    Example:
        >>> network = InvertibleSequential(PixelUnshuffle(2), Split(), Swap())
        >>> y1, y2 = network(torch.randn(1, 3, 8, 8))
        >>> y1.shape
        torch.Size([1, 6, 4, 4])
        >>> network[:1].inverse(torch.randn(1, 12, 4, 4)).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        *layers: InvertibleModule | OrderedDict[str, InvertibleModule],
        checkpoint: bool = False,
        anchor_every: int | None = None,
        check_layers: bool = False,
    ) -> None:
        super().__init__()
        if anchor_every is not None and anchor_every < 1:
            raise ValueError(
                f"InvertibleSequential takes anchor_every of at least 1, got {anchor_every}."
            )
        self.checkpoint = checkpoint
        self.anchor_every = anchor_every
        self.check_layers = check_layers
        named = layers[0] if len(layers) == 1 and isinstance(layers[0], OrderedDict) else None
        for name, layer in (dict(enumerate(layers)) if named is None else named).items():
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
            layers = [(str(i), layer) for i, (_, layer) in enumerate(layers)]
        return InvertibleSequential(
            OrderedDict(layers),  # type: ignore[arg-type]
            checkpoint=self.checkpoint,
            anchor_every=self.anchor_every,
            check_layers=self.check_layers,
        )

    @property
    def bijective(self) -> bool:
        return all(layer.bijective for layer in self)

    @property
    def volume_preserving(self) -> bool:
        return all(layer.volume_preserving for layer in self)

    @property
    def conditional(self) -> bool:
        return any(layer.conditional for layer in self)

    @property
    def quantum(self) -> float | None:
        return finest(self)

    @property
    def _puts_on_grid(self) -> bool:
        rounding = (layer for layer in self if layer.quantum != math.inf)
        first = next(rounding, None)
        return first is not None and first._puts_on_grid

    @property
    def inexact_layers(self) -> dict[str, InvertibleModule]:
        """The layers that keep no grid, by name, and so keep the composition from being exact."""
        return {step.name: step.layer for step in steps(self, Direction()) if not step.layer.exact}

    def forward(self, x: Any, context: Any = None) -> Any:
        return self._run(Direction(), x, context)[0]

    def inverse(self, y: Any, context: Any = None) -> Any:
        return self._run(Direction(inverted=True), y, context)[0]

    def forward_and_log_det(self, x: Any, context: Any = None) -> tuple[Any, Tensor]:
        y, log_dets = self._run(Direction(log_det=True), x, context)
        return y, torch.stack(log_dets).sum(0)

    def inverse_and_log_det(self, y: Any, context: Any = None) -> tuple[Any, Tensor]:
        x, log_dets = self._run(Direction(inverted=True, log_det=True), y, context)
        return x, torch.stack(log_dets).sum(0)

    def _members(self, inverted: bool) -> list[Member]:
        members: list[Any] = [(name, layer, inverted) for name, layer in self._modules.items()]
        return members[::-1] if inverted else members

    def _run(self, direction: Direction, state: Any, context: Any) -> tuple[Any, list[Tensor]]:
        if not len(self):
            raise ValueError(NO_LAYERS)
        check_context(self, self.conditional, context)
        check_entrance(self, direction, state)
        if checkpoint.applies(self.checkpoint):
            state, log_dets = checkpoint.run(
                self, direction, state, context, self.anchor_every, self.check_layers
            )
        else:
            state, log_dets = self._run_plainly(direction, state, context)
        return check_exit(self, direction, state), log_dets

    def _run_plainly(
        self, direction: Direction, state: Any, context: Any
    ) -> tuple[Any, list[Tensor]]:
        log_dets = []
        for name, layer, _ in self._members(direction.inverted):
            try:
                state, log_det = direction.run(layer, state, context)
                if self.check_layers:
                    check_layer(self, f"layer {name} ({type(layer).__name__})", state)
            except Exception as error:
                error.add_note(located(name, layer))
                raise
            if log_det is not None:
                log_dets.append(log_det)
        return state, log_dets


def _require_invertible(name: str, layer: object) -> None:
    if isinstance(layer, InvertibleModule):
        return
    hint = (
        "Hand the layers over one by one: InvertibleSequential(*layers)."
        if isinstance(layer, list | tuple)
        else "Put it into a coupling, AdditiveCoupling(f), or give it an inverse by subclassing "
        "InvertibleModule."
    )
    raise TypeError(
        f"InvertibleSequential takes invertible layers, got {describe(layer)} as layer {name!r}. "
        f"{hint}"
    )
