"""What a layer is handed to rebuild its input."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .._support.memory_format import with_strides
from ..state import Context, State
from .circumstances import Circumstances
from .plan import Step

# What a rebuilt stream must have in common with the original: shape, strides, dtype, and whether it
# requires grad. A plain tuple, since two are made a layer.
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, bool]


def layout_of(x: Tensor) -> Layout:
    """The layout of a stream."""
    return x.shape, x.stride(), x.dtype, x.requires_grad


def restored(x: Tensor, layout: Layout, step: Step) -> Tensor:
    """Rebuilt values in the original's strides, cut off from their graph."""
    shape, stride, dtype, _ = layout
    if x.shape != shape or x.dtype != dtype:
        raise RuntimeError(
            f"{step.place} took a stream of shape {tuple(shape)} and {dtype}, and was rebuilt with "
            f"{tuple(x.shape)} and {x.dtype}."
        )
    x = x.detach()
    return x if x.stride() == stride else with_strides(x, stride)


# Said to those who keep tensors of a second run beyond it.
GONE = (
    "this tensor was made when {place} was run again to rebuild its activations, and its graph is "
    "gone. Keep those of the forward pass only: ask is_rebuilding() before a sub-network puts a "
    "tensor in a list."
)
_end_of_graph = torch._C._functions.DelayedError(GONE.format(place="a layer"), 2)


def _requiring_grad(x: Tensor) -> Tensor:
    """The start of a graph that does not keep it alive, as that of a leaf does."""
    result: Tensor = _end_of_graph(torch.empty(0, requires_grad=True), x)[1]
    return result


@contextmanager
def _inner_graph() -> Iterator[None]:
    """Lets a layer differentiate while it is undone; none of that is what it saved before."""
    with torch.enable_grad(), saved_tensors_hooks(_same, _same):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Replay:
    """A run of a layer that is to be repeated: see :meth:`InvertibleModule.rebuild`.

    When ``rebuild`` is called, grad is enabled, and buffers, random generators and autocast are
    as the layer found them when it ran. What they become meanwhile is forgotten.
    """

    __slots__ = (
        "_circumstances",
        "_differentiates",
        "_layouts",
        "_may_keep",
        "_returned",
        "_step",
        "again",
        "context",
    )

    context: Context
    """What a conditional layer took as its second argument."""

    again: AbstractContextManager[Any]
    """In which a layer that overrides ``rebuild`` runs its sub-networks again, by ``with``."""

    wants_result = False
    """Whether to tell :meth:`returned` also what a layer that overrides ``rebuild`` returned."""

    def __init__(
        self,
        step: Step,
        context: Context,
        layouts: list[Layout],
        circumstances: Circumstances,
        returned: Callable[[Any, Tensor | None], None],
        differentiates: bool,
        may_keep: bool,
        again: AbstractContextManager[Any],
    ) -> None:
        self.context = context
        self.again = again
        self._step = step
        self._layouts = layouts
        self._circumstances = circumstances
        self._returned = returned
        self._differentiates = differentiates
        self._may_keep = may_keep  # tensors of this run, beyond it, as code of users may

    @property
    def inverted(self) -> bool:
        """Whether the layer ran backwards, by ``inverse`` or ``inverse_and_log_det``."""
        return self._step.direction.inverted

    @property
    def log_det(self) -> bool:
        """Whether the log-determinant was computed as well."""
        return self._step.direction.log_det

    def restore(self, x: Tensor, stream: int = 0) -> Tensor:
        """Gives a rebuilt stream of the input the strides and ``requires_grad`` that it had.

        Args:
            x: The rebuilt values, cut off from whatever graph they have.
            stream: Which stream of the input it is.

        Raises:
            RuntimeError: If shape or dtype are not those of the original.
        """
        layout = self._layouts[stream]
        x = restored(x, layout, self._step)
        if not layout[3]:
            return x
        return _requiring_grad(x) if self._may_keep else x.requires_grad_()

    def undo(self, y: State) -> Any:
        """The input from the output by the layer's other direction, without grad; restored."""
        with _inner_graph() if self._differentiates else torch.no_grad():
            x = self._step.undo(y, self.context)
        return self.restore_state(x)

    def restore_state(self, x: State) -> Any:
        """:meth:`restore` for each stream of a state."""
        if not isinstance(x, tuple):
            return self.restore(x)
        return tuple(self.restore(stream, i) for i, stream in enumerate(x))

    def rerun(self, x: State) -> tuple[Any, Tensor | None]:
        """Runs the layer again, from the buffers and random numbers that it found."""
        self._circumstances.rewind()
        with self.again:
            y, log_det = self._step.apply(x, self.context)
        self.returned(y, log_det)
        return y, log_det

    def returned(self, y: State, log_det: Tensor | None) -> None:
        """Takes what the layer returned when it ran again, as :meth:`rerun` does by itself.

        A compiled graph needs it, whose gradients are those of what is returned here. Where a
        layer leaves it out, it is run once more.
        """
        self._returned(y, log_det)


class _Thread(threading.local):
    """Where this thread is."""

    def __init__(self) -> None:  # and not in the class, since the compiler follows instances
        self.inside_layer = False
        self.rebuilding = False


thread = _Thread()


def is_inside_layer() -> bool:
    """Whether a layer that will be rebuilt is running: what is in it is rebuilt with it."""
    return thread.inside_layer


@contextmanager
def storing() -> Iterator[None]:
    """Lets compositions inside store their activations, whatever they are set to."""
    before, thread.inside_layer = thread.inside_layer, True
    try:
        yield
    finally:
        thread.inside_layer = before


def is_rebuilding() -> bool:
    """Whether the code that asks is being run again to rebuild activations.

    For code in a sub-network that logs, counts or draws pictures, and wants to do so once a step.
    What the sub-network computes must not depend on the answer.

    Example:
        >>> class Logged(nn.Module):
        ...     def forward(self, x):
        ...         if not is_rebuilding():
        ...             print("mean", x.mean().item())
        ...         return x.tanh()
        >>> network = InvertibleSequential(Split(), AdditiveCoupling(Logged()), checkpoint=True)
        >>> y1, y2 = network(torch.zeros(8, 4, requires_grad=True))
        mean 0.0
        >>> (y1 + y2).sum().backward()
    """
    return thread.rebuilding
