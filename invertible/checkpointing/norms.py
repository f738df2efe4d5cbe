"""Normalizations that divide rounding errors by next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# The numbers of which a variance is taken, in the last dimension.
Grouping = Callable[[Any, Tensor], Tensor]


class Call(NamedTuple):
    """What a normalization was given, as it groups it."""

    norm: Any
    groups: Tensor


class NormWatch:
    """Collects what normalizations are given while layers run."""

    def __init__(self) -> None:
        self._hooks: dict[nn.Module, RemovableHandle] = {}
        self._calls: list[Call] = []

    def follow(self, layer: nn.Module) -> None:
        """Watches all normalizations in a layer from now on."""
        self._calls.clear()
        for part in layer.modules():
            grouping = _grouping_of(part)
            if grouping is not None and part not in self._hooks:
                self._hooks[part] = part.register_forward_pre_hook(self._noting(grouping))

    def take(self) -> list[Call]:
        """What was collected, and is forgotten here."""
        calls, self._calls = self._calls, []
        return calls

    def end(self) -> None:
        """Takes all hooks away."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def _noting(self, grouping: Grouping) -> Callable[[Any, Any], None]:
        def note(norm: Any, inputs: Any) -> None:
            if inputs and (norm.training or getattr(norm, "running_mean", None) is None):
                self._calls.append(Call(norm, grouping(norm, inputs[0].detach())))

        return note


def near_constant(calls: list[Call]) -> list[Call]:
    """The calls of normalizations that met a variance below their ``eps``."""
    norms = {call.norm for call in calls if _is_small(call).any()}
    return [call for call in calls if call.norm in norms]


def count_spoiled(calls: list[Call], again: list[Call]) -> dict[nn.Module, int]:
    """How many variances below ``eps`` are of numbers that are not the same the second time."""
    counts = {}
    for norm in dict.fromkeys(call.norm for call in calls):
        # From the last: what runs first the second time may have inverted the layer.
        first, second = ([c for c in some[::-1] if c.norm is norm] for some in (calls, again))
        counts[norm] = sum(
            int((_is_small(one) & (one.groups != other.groups).any(-1)).sum())
            for one, other in zip(first, second, strict=False)
        )
    return counts


def _is_small(call: Call) -> Tensor:
    eps: float = call.norm.eps
    return call.groups.var(-1, correction=0) < eps


def _grouping_of(part: nn.Module) -> Grouping | None:
    """How a normalization by statistics of its input groups it; None for any other module."""
    for kind, grouping in _GROUPINGS.items():
        if isinstance(part, kind):
            return grouping
    return None


def _by_channel(_: Any, x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


_GROUPINGS: dict[type[nn.Module], Grouping] = {
    nn.InstanceNorm1d: lambda _, x: x,
    nn.InstanceNorm2d: lambda _, x: x.flatten(-2),
    nn.InstanceNorm3d: lambda _, x: x.flatten(-3),
    nn.modules.batchnorm._BatchNorm: _by_channel,
    nn.GroupNorm: lambda norm, x: x.reshape(len(x), norm.num_groups, -1),
    nn.LayerNorm: lambda norm, x: x.flatten(-len(norm.normalized_shape)),
}
