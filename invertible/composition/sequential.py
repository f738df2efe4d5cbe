"""The composition of layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, overload

from torch import nn

from .._support.checks import describe
from ..checkpointing.settings import Rebuild
from ..module import InvertibleModule, Member
from .composite import Composite


class InvertibleSequential(Composite):
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
            gradients, and so is asked for. A :class:`Rebuild` has settings.
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
        checkpoint: bool | Rebuild = False,
        check_layers: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
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
            check_layers=self.check_layers,
        )

    def members(self) -> list[Member]:
        named: Any = self._modules.items()
        return [Member(name, layer) for name, layer in named]


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
