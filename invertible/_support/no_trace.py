"""Evaluating a module without leaving a trace in its buffers or in the random generators."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .generators import accelerators, get_rng_states, set_rng_states
from .survey import Survey, survey

# Buffers and the default generators belong to the whole process: whoever swaps them out for
# a while holds this lock, so that two threads inverting one network cannot mix them up.
lock = threading.RLock()


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
    return untraced(survey(module), accelerators(state), generators=True)


def inverting(f: nn.Module, state: Any) -> AbstractContextManager[None]:
    """As :func:`no_trace`, for nothing but a call of ``f``: generators rest where it can't draw."""
    found = survey(f)
    return untraced(found, accelerators(state) if found.may_draw else [], found.may_draw)


@contextmanager
def untraced(found: Survey, devices: list[torch.device], generators: bool) -> Iterator[None]:
    """Swaps a module's buffers for copies, and puts them and the generators back afterwards."""
    compiling = torch.compiler.is_compiling()
    if compiling and not any(part.training for part in found.modules):
        generators = False  # the compiler can't take them, and in eval mode next to nothing draws
    # Nor does it take locks; what it makes swaps nothing when it runs.
    with nullcontext() if compiling else lock:
        rng_states = get_rng_states(devices) if generators else None
        # Swapped and not written back: BatchNorm changes its running statistics without
        # counting up their version, and comparing values would wait for the device.
        parts = found.with_buffers if compiling else found.modules
        originals = [(part._buffers, dict(part._buffers)) for part in parts]
        copies: dict[int, Tensor] = {}
        for place, buffers in originals:
            for name, buffer in buffers.items():
                if buffer is not None:
                    place[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        try:
            yield
        finally:
            put_back(originals)
            if rng_states is not None:
                set_rng_states(devices, rng_states)


Places = list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]]


def put_back(originals: Places) -> None:
    """Gives modules the buffers that they had: pairs of a module's dictionary and its content."""
    for place, buffers in originals:
        place.clear()
        place.update(buffers)
