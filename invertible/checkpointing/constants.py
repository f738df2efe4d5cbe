"""Constants behind an injective layer, followed until layers have made something else of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .plan import Step


class Constants:
    """Finds the states to store because parts of them are constant and would come back with noise.

    An :class:`~invertible.InjectivePad` appends zeros. Of a constant channel BatchNorm makes its
    bias; of one that is off by a rounding error, the bias and that error over ``sqrt(eps)``. With a
    bias of zero this decides on which side of a ReLU's kink the channel is, and gradients are wrong
    by as much as they are long, however small the error.

    A slice that is constant in front of a layer and behind it comes back as it was if it was zero,
    since ``(0 + f) - f`` is zero, or if the layer left it alone. So the states to store are those
    in front of a layer that does more to a constant. In practice these are one or two; zeros that
    no layer ever fills ask for none, however deep the network.
    """

    def __init__(self) -> None:
        # By number of tensors that may have constant slices: their values, None before anyone
        # looked.
        self._found: dict[int, Tensor | None] = {}

    def suspect(self, numbers: Iterable[int]) -> None:
        """Takes note of tensors that may have constant slices."""
        for number in numbers:
            self._found.setdefault(number, None)

    def concern(self, step: Step, numbers: Iterable[int]) -> bool:
        """Whether a layer appends constants, or takes tensors that may have some."""
        return _appends(step) or any(number in self._found for number in numbers)

    def are_spoiled(self, step: Step, consumed: dict[int, Tensor], made: dict[int, Tensor]) -> bool:
        """Whether undoing a layer could return constants with rounding errors.

        Args:
            step: The layer, which has run.
            consumed: The streams that it took and did not hand through, by number.
            made: Those that it made of them.
        """
        before = [self._look(number, stream) for number, stream in consumed.items()]
        for number in consumed:
            self._found.pop(number, None)
        if _appends(step):
            self.suspect(made)
            return False
        if all(values is None for values in before):
            return False
        self.suspect(made)
        if step.moves_only:
            return False
        after = [self._look(number, stream) for number, stream in made.items()]
        return len(before) != len(after) or not all(map(_comes_back, before, after))

    def _look(self, number: int, stream: Tensor) -> Tensor | None:
        """The constant slices of a tensor, which is forgotten if it has none."""
        if number not in self._found:
            return None
        values = self._found.pop(number)
        if values is None:
            values = _constant_slices(stream.detach())
        if values is not None:
            self._found[number] = values
        return values


def _appends(step: Step) -> bool:
    return not (step.direction.inverted or step.layer.surjective)


def _comes_back(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None:
        return True
    if after is None or after.shape != before.shape:
        return False
    as_it_was = (before == after) | ((before == 0) & ~after.isnan())
    return bool((as_it_was | before.isnan()).all())


def _constant_slices(x: Tensor) -> Tensor | None:
    """The value of each slice along each dimension but the batch, NaN where it has several.

    None if none is constant; a slice of a single number counts if it is zero. Waits for the device.
    """
    if x.is_complex():
        x = torch.view_as_real(x)
    if not (x.is_floating_point() and x.numel() and x.dim() > 1) or x.is_meta or is_fake(x):
        return None
    lows, highs = x.aminmax(dim=0)  # the one pass over all numbers
    found = []
    for dim, size in enumerate(lows.shape):
        low, high = (part.movedim(dim, 0).reshape(size, -1) for part in (lows, highs))
        value = high.amax(1)
        is_constant = low.amin(1) == (value if x.numel() > size else 0)
        found.append(value.where(is_constant, torch.nan))
    values = torch.cat(found)
    return None if bool(values.isnan().all()) else values
