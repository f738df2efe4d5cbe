"""What a layer finds in its buffers, and where it may write when it runs again."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..state import has_values, version

Buffers = dict[str, Tensor | None]  # of a module, by name

# Of smaller buffers a copy is kept, since those that steer a layer may change between the passes.
_SMALL = 2**15  # bytes
_STATISTICS = "running_mean", "running_var"
# Layers that change large buffers uncounted.
_write_uncounted: WeakSet[nn.Module] = WeakSet()


class Buffer(NamedTuple):
    """A buffer that a layer found, and what was in it, unless it should still be."""

    buffer: Tensor
    version: int
    copy: Tensor | None

    def if_needed(self, layer: nn.Module, is_first: bool) -> Buffer:
        """Without the copy, if it is large and the layer left the buffer alone."""
        buffer, before, copy = self
        if copy is None or copy.nbytes <= _SMALL or version(buffer) != before:
            return self
        if is_first and differ(copy, buffer):
            _write_uncounted.add(layer)
        return self if layer in _write_uncounted else Buffer(buffer, before, None)


class Statistics(NamedTuple):
    """What a BatchNorm in eval mode found in its buffers, and what was in them."""

    place: Buffers
    buffers: dict[str, Tensor]
    copies: dict[str, Tensor]

    @classmethod
    def of(cls, norm: nn.Module) -> Statistics:
        buffers = {name: b for name, b in norm._buffers.items() if b is not None}
        copies = {name: buffers[name].clone() for name in _STATISTICS if name in buffers}
        return cls(norm._buffers, buffers, copies)


def copy_buffers(places: list[tuple[Buffers, Buffers]]) -> list[Buffer]:
    """What is in the buffers of modules, each kept once."""
    buffers = {id(b): b for _, held in places for b in held.values() if b is not None}
    return [Buffer(b, version(b), b.detach().clone()) for b in buffers.values()]


def cloned(buffers: Buffers) -> dict[str, Tensor]:
    """Other buffers with the same content."""
    return {name: b.detach().clone() for name, b in buffers.items() if b is not None}


def differ(copy: Tensor, now: Tensor) -> bool:
    """Whether something was written since the copy was made."""
    return has_values(copy) and not torch.equal(copy, now)


# Running statistics that BatchNorm may write to in a second run, and nobody reads, and the true
# mean that they were made for.
_scratches: WeakKeyDictionary[nn.Module, tuple[Tensor, Buffers]] = WeakKeyDictionary()


def scratch(norm: nn.Module) -> Buffers:
    """Buffers of a BatchNorm in train mode for a run that nobody may see."""
    mean, var = norm._buffers["running_mean"], norm._buffers["running_var"]
    if mean is None or var is None:
        return {}
    found = _scratches.get(norm)
    if found is None or found[0] is not mean:  # moved to another device, for instance
        new = {"running_mean": mean.clone(), "running_var": var.clone()}
        found = _scratches[norm] = mean, {**new, "num_batches_tracked": None}
    return found[1]
