"""The composition of layers."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, Self, overload

from torch import nn
from typing_extensions import override

from .._support.checks import describe
from ..checkpointing.settings import Rebuild
from ..module import InvertibleModule, Member
from .composite import Composite


class InvertibleSequential(Composite):
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
            gradients, and so is asked for. A :class:`Rebuild` has settings.
        check_layers: For an exact composition, whether the range is checked behind every
            layer, and between the steps of lifting layers, to find the one that leaves it; by
            default at both ends only.

    Shape:
        - Input: whatever the first layer takes.
        - Output: whatever the last layer returns.

    Raises:
        TypeError: If a layer is not an :class:`InvertibleModule`; when called, if a context is
            missing or nothing would use it.
        ValueError: When called, if there are no layers; for an exact composition, if the input is
            not on the grid (:meth:`inverse` rounds it), or a state is not finite or out of the
            range in which sums are exact. While training on an accelerator, which is not made to
            wait for the answer, the output becomes NaN instead, unless ``check_layers`` is set, and
            always in what is compiled, exported or transformed by ``torch.func``.

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
        checkpoint: bool | Rebuild = False,
        check_layers: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(checkpoint, bool | Rebuild):
            raise TypeError(
                "InvertibleSequential takes checkpoint as a bool or as settings, for instance "
                f"Rebuild(anchor_every=4), got {checkpoint!r}."
            )
        self.checkpoint = checkpoint
        self.check_layers = check_layers
        named = layers[0] if len(layers) == 1 and isinstance(layers[0], OrderedDict) else None
        for name, layer in (dict(enumerate(layers)) if named is None else named).items():
            self.add_module(str(name), layer)  # type: ignore[arg-type]

    @override
    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Adds a layer at the end, under a name of its own."""
        if name in self._modules:
            raise ValueError(f"InvertibleSequential already has a layer named {name!r}.")
        _require_invertible(name, module)
        super().add_module(name, module)

    @override
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

    @override
    def members(self) -> list[Member]:
        named: Any = self._modules.items()
        return [Member(name, layer) for name, layer in named]


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
