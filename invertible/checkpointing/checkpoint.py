"""Reversible checkpointing: activations are rebuilt by inversion instead of being stored."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._support.checks import check_context
from .._support.no_trace import lock
from ..direction import Direction
from ..exact.grid import check_entrance, check_exit, check_layer
from ..module import InvertibleModule, call, located
from ..state import detach
from .drift import current_drift
from .frame import Frame, Kept
from .plan import Step, has_hooks, steps


class _Thread(threading.local):
    """Where this thread is: nested compositions look here."""

    inside_layer = False
    forced = False
    anchor_every: int | None = None  # while forced


_thread = _Thread()


def reversible_checkpoint(
    module: InvertibleModule, x: Any, context: Any = None, *, anchor_every: int | None = None
) -> Any:
    r"""Runs an invertible module without storing its activations.

    Like ``torch.utils.checkpoint.checkpoint``, but not even the inputs of the layers are kept:
    the backward pass rebuilds them from the output, layer by layer. The result is
    ``module(x)``, and the graph is the ordinary one: gradients, hooks, frozen parameters,
    double backward and distributed wrappers work as they do without it, up to the rounding of
    the inversion.

    A module made of :class:`InvertibleSequential` and :class:`Inverse`, however nested, is
    taken apart into its layers; any other module counts as one layer, all of whose activations
    are rebuilt at once. Without grad, and under ``torch.func`` transforms, where autograd
    allows no such hooks, it is the plain call.

    Args:
        module: The module; ``Inverse(module)`` for the other direction.
        x: Its input state.
        context: Its context, if it is conditional. Contexts are kept, not rebuilt.
        anchor_every: How many layers share one stored state; by default only the output is
            stored.

    Returns:
        ``module(x)``. Changing it in place makes the backward pass raise an error.

    Raises:
        TypeError: If ``module`` is not an :class:`InvertibleModule`.
        RuntimeError: In the backward pass, if a parameter, the context or the output was changed
            in place since, or if a layer does not run as it ran in the forward pass.

    References:
        Gomez et al., *The Reversible Residual Network* (2017), section 3.2,
        https://arxiv.org/abs/1707.04585.

    Example:
        >>> block = [AdditiveCoupling(nn.Linear(2, 2)), Swap()]
        >>> network = InvertibleSequential(Split(), *(4 * block), Merge())
        >>> y = reversible_checkpoint(network, torch.randn(8, 4))
        >>> y.sum().backward()
    """
    if not isinstance(module, InvertibleModule):
        raise TypeError(
            f"reversible_checkpoint takes an InvertibleModule, got a {type(module).__name__}."
        )
    check_context(module, module.conditional, context)
    if not applies(True):
        return call(module, x, context)
    if module._members(False) is not None and has_hooks(module):
        return _run_hooked(module, Direction(), x, context, anchor_every)[0]
    check_entrance(module, Direction(), x)
    y, _ = run(module, Direction(), x, context, anchor_every)
    return check_exit(module, Direction(), y)


def applies(wanted: bool) -> bool:
    """Whether activations of a composition are to be rebuilt, here and now."""
    return (
        (wanted or _thread.forced)
        and torch.is_grad_enabled()
        and not _thread.inside_layer
        # Their autograd refuses hooks on saved tensors.
        and not torch._C._are_functorch_transforms_active()
    )


def run(*arguments: Any) -> tuple[Any, list[Tensor]]:
    """Runs a composition; see :func:`_run`."""
    if torch.compiler.is_dynamo_compiling():
        # A layer must run the same code when it is rebuilt, outside of the compiler's reach.
        eager: Any = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
        return eager(*arguments)  # type: ignore[no-any-return]
    return _run(*arguments)


def _run(
    module: InvertibleModule,
    direction: Direction,
    state: Any,
    context: Any,
    anchor_every: int | None,
    check_layers: bool = False,
) -> tuple[Any, list[Tensor]]:
    """Runs a composition's layers, with their log-determinants if the direction asks for them."""
    anchor_every = anchor_every or _thread.anchor_every
    log_dets = []
    chain: Chain | None = None
    for step in steps(module, direction):
        try:
            if step.layer._members(step.direction.inverted) is None:
                chain = chain or Chain(context, anchor_every)
                state, log_det = chain.run(step, state)
            else:
                if chain:
                    chain.end(state)
                chain = None
                state, log_det = _run_hooked(
                    step.layer, step.direction, state, context, anchor_every
                )
            if check_layers:
                check_layer(module, step.place, state)
        except Exception as error:
            error.add_note(located(step.name, step.layer))
            raise
        if log_det is not None:
            log_dets.append(log_det)
    if chain:
        chain.end(state)
    return state, log_dets


def _run_hooked(
    module: InvertibleModule,
    direction: Direction,
    state: Any,
    context: Any,
    anchor_every: int | None,
) -> tuple[Any, Tensor | None]:
    """Runs a composition through its hooks, on a chain of its own."""
    _thread.forced, _thread.anchor_every = True, anchor_every
    try:
        return direction.run(module, state, context)
    finally:
        _thread.forced, _thread.anchor_every = False, None


class Chain:
    """Layers run one after the other, of whose states only the last is stored.

    In the backward pass the layers are rebuilt from the last to the first: autograd asks for
    them in this order. A layer asked for out of order is reached by inverting down to it.
    """

    def __init__(self, context: Any, anchor_every: int | None) -> None:
        self.context = Kept(context)
        self.anchor_every = anchor_every
        self.frames: list[Frame] = []
        # States that are stored, by the index of the frame that they enter.
        self.kept: dict[int, Kept] = {}
        # The two states rebuilt last, and the frame between them whose saved tensors are there.
        self.rebuilt: dict[int, Any] = {}
        self.filled: Frame | None = None
        self.drift = current_drift()

    def run(self, step: Step, x: Any) -> tuple[Any, Tensor | None]:
        """Runs the next layer."""
        index = len(self.frames)
        with lock, _inside_layer():
            frame = Frame(
                step, x, self.context.state, self.frames[-1].rng_after if self.frames else []
            )
            self.frames.append(frame)
            if self._is_anchor(step, index):
                self.kept[index] = Kept(detach(x))
            if self.drift:
                self.drift.remember(frame, x)
            return frame.run(x, frame.hook(Chain.unpack, self, index))

    def _is_anchor(self, step: Step, index: int) -> bool:
        # What an injective layer's inverse throws away can't be rebuilt.
        lossy = step.direction.inverted and not step.layer.bijective
        return lossy or (self.anchor_every is not None and index % self.anchor_every == 0)

    def end(self, state: Any) -> None:
        """Stores the last state."""
        self.kept[len(self.frames)] = Kept(detach(state))

    def unpack(self, index: int, number: int) -> Tensor:
        """A tensor that a frame's backward needs."""
        with lock:
            frame = self.frames[index]
            tensor = frame.take(number)
            if tensor is None:
                self._rebuild(index)
                tensor = frame.take(number)
            assert tensor is not None
            return tensor

    def _rebuild(self, index: int) -> None:
        frame = self.frames[index]
        if self.filled is not None and self.filled is not frame:
            self.filled.forget()
        if self.context.changed():
            raise RuntimeError("the context was changed in place between forward and backward.")
        try:
            with _inside_layer():
                if index in self.kept:
                    x = frame.rerun(self._stored(index))
                else:
                    x = frame.rebuild(self._state(index + 1))
        except Exception as error:
            error.add_note(f"While {frame.step.place} was rebuilt in the backward pass.")
            raise
        self._descend(index, x)
        self.filled = frame

    def _state(self, index: int) -> Any:
        """The state that enters frame ``index``: stored, rebuilt just now, or by inversion."""
        known = min(i for i in [*self.kept, *self.rebuilt] if i >= index)
        state = self.rebuilt[known] if known in self.rebuilt else self._stored(known)
        for i in range(known - 1, index - 1, -1):
            state = self.frames[i].undo(state)
            self._descend(i, state)
        return state

    def _stored(self, index: int) -> Any:
        if self.kept[index].changed():
            which = "output" if index == len(self.frames) else "state"
            raise RuntimeError(
                f"the {which} of a composition with reversible checkpointing was changed in place "
                "between forward and backward, so that its activations can't be rebuilt. Use an "
                "out-of-place operation behind it, for instance ReLU(inplace=False)."
            )
        return self.kept[index].state

    def _descend(self, index: int, x: Any) -> None:
        above = {i: state for i, state in self.rebuilt.items() if i == index + 1}
        self.rebuilt = above | {index: detach(x)}
        if self.drift:
            self.drift.measure(self.frames[index], x)


@contextmanager
def _inside_layer() -> Iterator[None]:
    """Compositions inside a sub-network are part of their layer, and rebuilt with it."""
    before = _thread.inside_layer
    _thread.inside_layer = True
    try:
        yield
    finally:
        _thread.inside_layer = before
