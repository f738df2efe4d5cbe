"""The grid that a composition keeps, found by following a state through its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..module import InvertibleModule, Member
from .grid import Grid


class Composed(NamedTuple):
    """What exact layers are together."""

    grid: Grid | None
    """The finest of the layers' grids. None if a layer keeps none, if all only move numbers and
    keep any, or if one throws away what it is given."""
    takes_any: bool = False
    """Whether ``forward`` takes states beside the grid: each stream meets a Quantize first."""
    coarser: Sequence[InvertibleModule] = ()
    """The layers that throw away digits: a Quantize that a state on a finer grid goes through."""


def composed(module: InvertibleModule) -> Composed:
    """Looks at all layers of a composition, or at a layer by itself."""
    quanta = [layer.quantum for layer in _layers(module) if not layer.moves_only]
    known = [quantum for quantum in quanta if quantum is not None]
    if not known or len(known) < len(quanta):
        return Composed(None)
    walk = _Walk(min(known))
    walk.through(module, False, None)
    return Composed(None if walk.coarser else Grid(walk.finest), walk.takes_any, walk.coarser)


def _layers(module: InvertibleModule) -> Iterator[InvertibleModule]:
    members = module.members()
    if members is None:
        yield module
    else:
        for member in members:
            yield from _layers(member.layer)


class _Walk:
    """Follows a state in the order of ``forward``.

    A state is known by the quantum whose multiples it holds, None for one as it was given. The
    inverse meets the same states from the other end, so that a Quantize throws away the same under
    :class:`Inverse`.
    """

    def __init__(self, finest: float) -> None:
        self.finest = finest
        self.takes_any = True
        self.coarser: list[InvertibleModule] = []

    def through(
        self, module: InvertibleModule, inverted: bool, state: float | None
    ) -> float | None:
        """The state behind a module that is run forward, or backward."""
        members = module.members()
        if members is not None:
            return self._through_members(module, members, inverted, state)
        if module.moves_only:
            return state
        quantum = module.quantum
        assert quantum is not None
        if module.injective:
            return min(self._entered(state), quantum)
        if state is None and not inverted:
            return quantum
        state = self._entered(state)
        if quantum > state:
            self.coarser.append(module)
        return state

    def _through_members(
        self,
        module: InvertibleModule,
        members: Sequence[Member],
        inverted: bool,
        state: float | None,
    ) -> float | None:
        streams: dict[int, float | None] = {}  # those that layers have changed by themselves
        for member in reversed(members) if inverted else members:
            way = inverted is not member.inverted
            if member.streams is None:
                state = self.through(member.layer, way, self._joined(module, state, streams))
                streams = {}
                continue
            some = member.streams if isinstance(member.streams, tuple) else (member.streams,)
            given = self._meeting(streams.get(stream, state) for stream in some)
            streams.update(dict.fromkeys(some, self.through(member.layer, way, given)))
        return self._joined(module, state, streams)

    def _joined(
        self, module: InvertibleModule, state: float | None, streams: dict[int, float | None]
    ) -> float | None:
        """The whole state, of the streams that were changed and those that were not."""
        is_all = bool(streams) and getattr(module, "stream_count", None) == len(streams)
        return self._meeting([*streams.values(), *([] if is_all else [state])])

    def _meeting(self, states: Iterable[float | None]) -> float | None:
        """What streams are together; those as given only if all are."""
        found = list(states)
        if all(state is None for state in found):
            return None
        return min(map(self._entered, found))

    def _entered(self, state: float | None) -> float:
        """The state at a layer that takes it on the grid only."""
        if state is not None:
            return state
        self.takes_any = False
        return self.finest
