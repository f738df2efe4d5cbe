"""The one loop over the steps of a plan, whether activations are stored or rebuilt."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._support.checks import describe, expect_returned, expect_streams
from .._support.no_trace import no_trace
from ..exact.grid import Grid
from ..exact.ranges import stay_in_range
from ..module import InvertibleModule
from ..state import Context, State
from .allocations import current_allocations
from .chain import Chain
from .hooks import record_within_hooks
from .plan import Branches, Step, Steps
from .settings import Rebuild


class Follower:
    """Runs the steps of one plan."""

    def __init__(
        self, module: InvertibleModule, context: Context, exact: bool, has_constants: bool
    ) -> None:
        self.module = module
        self.context = context
        self.exact = exact
        self.has_constants = has_constants
        self.log_dets: list[Tensor] = []
        self.chain: Chain | None = None
        self.allocations = current_allocations()

    def follow(self, steps: Steps, state: State) -> State:
        """Runs all steps, and stores what the rebuilt ones are rebuilt from."""
        state = self._steps(steps, state)
        self._end_chain()
        if self.allocations:
            self.allocations.layer = "elsewhere"
        return state

    def _steps(self, steps: Steps, state: State) -> State:
        for step in steps:
            if isinstance(step, Branches):
                state = self._branch(step, state)
                continue
            before = state
            if self.allocations:
                self.allocations.enter(step.layer, self.module, step.name)
            try:
                if step.hands_through:
                    state, log_det = step.apply(state, None)
                elif step.rebuild is None or step.is_whole:
                    state, log_det = self._store(step, state)
                else:
                    state, log_det = self._record(step, state)
                if not step.is_ours:
                    expect_returned(step.layer, state)
                if step.grid is not None:
                    state = _in_range(step, before, state, step.grid)
            except Exception as error:
                if step.layer is not self.module:
                    error.add_note(f"In {step.place} of {type(self.module).__name__}.")
                raise
            if log_det is not None:
                self.log_dets.append(log_det)
        return state

    def _branch(self, fork: Branches, state: State) -> tuple[Tensor, ...]:
        """Runs branches, and notes their place where they fail by themselves."""
        try:
            return self._fork(fork, state)
        except Exception as error:
            # An error of a layer has its note already.
            if fork.name and not hasattr(error, "__notes__"):
                error.add_note(
                    f"In layer {fork.name} ({fork.owner}) of {type(self.module).__name__}."
                )
            raise

    def _fork(self, fork: Branches, state: State) -> tuple[Tensor, ...]:
        """Runs layers on some streams each, one after the other."""
        owner = fork.owner
        streams = list(expect_streams(owner, state, fork.stream_count))
        for member, steps in fork.members:
            if isinstance(member.streams, int):
                place = _position(owner, member.streams, streams)
                found = self._steps(steps, streams[place])
                if not isinstance(found, Tensor):
                    raise TypeError(
                        f"{owner} hands one stream to layer {member.name} "
                        f"({type(member.layer).__name__}) and takes one tensor back, got "
                        f"{describe(found)}."
                    )
                streams[place] = found
                continue
            places = [_position(owner, i, streams) for i in member.streams or ()]
            if len(set(places)) != len(places):
                raise ValueError(
                    f"{owner} takes each stream once, got {member.streams} and a state of "
                    f"{len(streams)}, in which some of these are the same."
                )
            found = self._steps(steps, tuple(streams[place] for place in places))
            if not isinstance(found, tuple) or len(found) != len(places):
                error = ValueError if isinstance(found, tuple) else TypeError
                raise error(
                    f"{owner} hands {len(places)} streams to layer {member.name} "
                    f"({type(member.layer).__name__}) and takes as many back, got "
                    f"{describe(found)}."
                )
            for place, stream in zip(places, found, strict=True):
                streams[place] = stream
        return tuple(streams)

    def _record(self, step: Step, state: State) -> tuple[Any, Tensor | None]:
        """Runs a layer that is rebuilt in the backward pass."""
        if self.chain is None:
            self.chain = Chain(self.context, exact=self.exact, has_constants=self.has_constants)
        record = record_within_hooks if step.has_hooks else Chain.record
        return record(self.chain, step, state)

    def _store(self, step: Step, state: State) -> tuple[Any, Tensor | None]:
        """Runs a layer that stores its activations, or a composition that sees to them itself."""
        self._end_chain()
        if step.untraced:
            with no_trace(step.layer, (state, self.context)):
                return step.apply(state, self.context)
        if step.is_whole:
            with asking(step.rebuild, self.has_constants):
                return step.apply(state, self.context)
        return step.apply(state, self.context)

    def _end_chain(self) -> None:
        if self.chain is not None:
            self.chain.end()
            self.chain = None


def _in_range(step: Step, x: State, y: State, grid: Grid) -> State:
    """What a layer made of a state, if sums were exact between its steps as well."""
    with torch.no_grad():
        inside = step.layer._states_inside(x, step.direction.inverted)
    for state in inside:
        y = stay_in_range(f"a state inside {step.place}", y, grid, waits=True, of=state)
    return stay_in_range(f"the output of {step.place}", y, grid, waits=True)


class Around(threading.local):
    """What the call around a composition asks of it, in this thread."""

    rebuild: Rebuild | None = None
    has_constants: bool = False


around = Around()


@contextmanager
def asking(rebuild: Rebuild | None, has_constants: bool = False) -> Iterator[None]:
    """Compositions that are called inside rebuild their activations so; None asks for nothing.

    Their states may have constants that a layer in front of them appended.
    """
    before = around.rebuild, around.has_constants
    around.rebuild, around.has_constants = rebuild, has_constants
    try:
        yield
    finally:
        around.rebuild, around.has_constants = before


def _position(owner: str, stream: int, streams: list[Tensor]) -> int:
    """The place of a stream, counted from the front."""
    if not -len(streams) <= stream < len(streams):
        raise ValueError(
            f"{owner} runs a layer on stream {stream}, got a state of "
            f"{len(streams)} (numbered from 0, or from the end by negative numbers)."
        )
    return stream % len(streams)
