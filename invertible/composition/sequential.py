"""The composition of layers."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, Self, overload

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

    It is indexed, sliced, iterated over and edited as :class:`torch.nn.Sequential` is, also by
    ``network[i] = layer``, ``del network[i]`` and ``+``; slices and sums are invertible too, share
    the layers, and have the options of the (left) original. Layers without a name are numbered
    by their place, also in the keys of the ``state_dict``; those with one keep it, and what is
    inserted or added gets numbers. It is bijective, volume preserving and so on when all its layers
    are. A context reaches every layer that takes one.

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
        if isinstance(value, nn.Module) or name in self.__dict__.get("_modules", ()):
            _require_invertible(name, value)
        super().__setattr__(name, value)

    def append(self, layer: InvertibleModule) -> Self:
        """Adds a layer at the end, and returns the sequence."""
        self.add_module(str(len(self)), layer)
        return self

    def extend(self, layers: Iterable[InvertibleModule]) -> Self:
        """Adds layers at the end, all or, if one is refused, none; returns the sequence."""
        added = list(layers)
        for i, layer in enumerate(added):
            _require_invertible(str(len(self) + i), layer)
        for layer in added:
            self.append(layer)
        return self

    def insert(self, index: int, layer: InvertibleModule) -> Self:
        """Puts a layer before the one at ``index``, and returns the sequence."""
        if not -len(self) <= operator.index(index) <= len(self):
            raise IndexError(_out_of_range(self, index))
        _require_invertible(str(index), layer)
        layers = list(self._modules.items())
        layers.insert(index, ("0", layer))
        return self._renumber(layers)

    def pop(self, index: int | slice = -1) -> InvertibleModule:
        """Takes out the layer at ``index``, by default the last, and returns it."""
        layer = self[index]
        del self[index]
        return layer

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
            return self._modules[self._name(index)]  # type: ignore[return-value]
        part = InvertibleSequential(
            checkpoint=self.checkpoint,
            anchor_every=self.anchor_every,
            check_layers=self.check_layers,
        )
        return part._renumber(list(self._modules.items())[index])

    def __setitem__(self, index: int, layer: InvertibleModule) -> None:
        setattr(self, self._name(index), layer)

    def __delitem__(self, index: int | slice) -> None:
        names = list(self._modules)
        gone = names[index] if isinstance(index, slice) else [self._name(index)]
        self._renumber([item for item in self._modules.items() if item[0] not in gone])

    def __add__(self, other: InvertibleSequential) -> InvertibleSequential:
        whole = self[:]
        whole += other
        return whole

    def __iadd__(self, other: InvertibleSequential) -> Self:
        if not isinstance(other, InvertibleSequential):
            raise TypeError(
                f"An InvertibleSequential is added to another one, got {describe(other)}. For "
                "single layers there are append(layer) and extend(layers)."
            )
        return self.extend(other)

    def __mul__(self, times: int) -> InvertibleSequential:
        whole = self[:]
        whole *= times
        return whole

    __rmul__ = __mul__

    def __imul__(self, times: int) -> Self:
        if operator.index(times) < 1:
            raise ValueError(f"An InvertibleSequential is repeated at least once, got {times}.")
        return self.extend(list(self) * (times - 1))

    def _name(self, index: int) -> str:
        """The name of the layer at an index."""
        if not -len(self) <= operator.index(index) < len(self):
            raise IndexError(_out_of_range(self, index))
        return list(self._modules)[index]

    def _renumber(self, layers: list[tuple[str, nn.Module | None]]) -> Self:
        """Takes these layers as its own, numbered by their place where a number is the name."""
        self._modules.clear()
        for i, (name, layer) in enumerate(layers):
            # So that append finds the next number free.
            self._modules[str(i) if name.isdigit() else name] = layer
        return self

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


def _out_of_range(network: InvertibleSequential, index: int) -> str:
    return f"The InvertibleSequential has {len(network)} layers: index {index} is out of range."


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
