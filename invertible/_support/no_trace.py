"""Evaluating a module without leaving a trace in its buffers or in the random generators."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .generators import (
    RNGStates,
    Watch,
    accelerators,
    can_watch,
    get_rng_states,
    note_drawing,
    same_rng_states,
    seen_to_draw,
    set_rng_states,
    was_just_seeded,
)
from .survey import Survey, survey


class _Turns(threading.local):
    """Whether this thread holds the lock, once for each block that it is in."""

    def __init__(self) -> None:
        self.held: list[bool] = []


class _Lock:
    """A lock that may be taken again by its thread, and by threads that this one waits for.

    A sub-network may run parts of itself in threads, and these may invert something.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._turns = _Turns()
        self._owner = 0

    def __enter__(self) -> None:
        held = self._lock.acquire(blocking=False) or self._wait()
        if held:
            self._owner = threading.get_ident()
        self._turns.held.append(held)

    def __exit__(self, *_: object) -> None:
        if self._turns.held.pop():
            self._lock.release()

    def _wait(self) -> bool:
        """Returns whether the lock is held at last; it need not be if its owner waits, too."""
        while not self._lock.acquire(timeout=0.01):
            frame = sys._current_frames().get(self._owner)
            if frame is not None and frame.f_code.co_filename == threading.__file__:
                return False
        return True


# Buffers and the default generators belong to the whole process: whoever swaps them out for
# a while holds this lock, so that two threads inverting one network cannot mix them up.
lock = _Lock()


def no_trace(module: nn.Module, state: Any) -> AbstractContextManager[None]:
    """Context in which a module can be evaluated without a trace.

    Inside it, the module's buffers are copies and the random generators run on; afterwards
    the buffers and the generators of the CPU and of the state's devices are what they were. A
    layer's ``inverse`` evaluates its sub-networks in it, so that inverting in train mode
    neither counts a batch twice in BatchNorm's running statistics nor shifts what dropout
    draws next.

    The layers of this library do so by themselves; it is for your own. Threads take turns in
    it, since the generators are shared by the process.

    Args:
        module: What will be evaluated.
        state: The state that it will be evaluated on, which tells the devices.

    Example:
        >>> norm = nn.BatchNorm1d(3).train()
        >>> x = torch.randn(8, 3)
        >>> with no_trace(norm, x):
        ...     y = norm(x)
        >>> norm.num_batches_tracked.item()
        0
    """
    block: Any = ()
    if not torch.compiler.is_compiling():
        caller = sys._getframe(1)  # whose block may draw by itself
        block = caller.f_code, caller.f_lineno
    return untraced(survey(module), accelerators(state), block)


def inverting(f: nn.Module, state: Any) -> AbstractContextManager[None]:
    """As :func:`no_trace`, for nothing but a call of ``f``: generators rest where it can't draw."""
    found = survey(f)
    return untraced(found, accelerators(state) if found.may_draw else [], None)


@contextmanager
def untraced(found: Survey, devices: list[torch.device], block: Any) -> Iterator[None]:
    """Swaps a module's buffers for copies, and puts them and the generators back afterwards.

    ``block`` stands for the code inside, if that may draw by itself.
    """
    compiling = torch.compiler.is_compiling()
    draws = found.may_draw or block is not None
    if compiling and not any(part.training for part in found.modules):
        draws = False  # next to nothing draws in eval mode
    # The compiler takes no locks; what it makes swaps nothing when it runs.
    with nullcontext() if compiling else lock:
        # Swapped and not written back: BatchNorm changes its running statistics without
        # counting up their version, and comparing values would wait for the device.
        parts = found.with_buffers if compiling else found.modules
        originals = [(part._buffers, dict(part._buffers)) for part in parts]
        copies: dict[int, Tensor] = {}
        for place, buffers in originals:
            for name, buffer in buffers.items():
                if buffer is not None:
                    place[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        own = [(generator, generator.get_state()) for generator in found.generators]
        try:
            with _undrawn(found, devices, block) if draws else nullcontext():
                yield
        finally:
            put_back(originals)
            for generator, state in own:
                generator.set_state(state)


def _undrawn(
    found: Survey, devices: list[torch.device], block: Any
) -> AbstractContextManager[None]:
    """Leaves the default generators as they were."""
    if torch.compiler.is_dynamo_compiling():
        from .looking import without_drawing  # which takes a second to import

        return without_drawing()
    return _rewound(found, devices, block)


@contextmanager
def _rewound(found: Survey, devices: list[torch.device], block: Any) -> Iterator[None]:
    """Puts the default generators back if something inside drew, and not another thread."""
    module, key = found.modules[0], (found.modes, block)
    alone = threading.active_count() == 1
    before = get_rng_states(devices)
    if alone or found.may_be_compiled or not can_watch() or seen_to_draw(module, key):
        try:
            yield
        finally:
            if not same_rng_states(before, get_rng_states(devices)):
                _put_generators_back(devices, before)
        return
    at_first: list[RNGStates] = []

    def remember() -> None:
        now = get_rng_states(devices)
        # What seeds the generators itself has done so by then.
        at_first.append(before if was_just_seeded(now) else now)

    watch = Watch(remember)
    try:
        with watch:
            yield
    finally:
        note_drawing(module, key, watch.drew)
        if watch.drew:
            _put_generators_back(devices, at_first[0])


def _put_generators_back(devices: list[torch.device], states: RNGStates) -> None:
    set_rng_states(devices, states)
    rewound.count += 1


class _Rewound(threading.local):
    """How often this thread put back generators because something without a trace drew."""

    count = 0


rewound = _Rewound()


Places = list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]]


def put_back(originals: Places) -> None:
    """Gives modules the buffers that they had: pairs of a module's dictionary and its content."""
    for place, buffers in originals:
        place.clear()
        place.update(buffers)
