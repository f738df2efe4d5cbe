"""One layer's part in reversible checkpointing: all that its backward pass needs but tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .._support.compiling import may_compile, uncompiled
from .._support.generators import RNGStates
from .._support.no_trace import lock, no_trace
from ..state import Context, State
from .attributes import kept_tensors
from .circumstances import Autocast, Circumstances
from .comparison import Comparison
from .contexts import KeptContext
from .operations import Operations
from .plan import Step
from .replay import GONE, Replay, layout_of
from .settings import RebuildError


class Frame:
    """Runs a layer, and later runs it again from its output exactly as it ran before."""

    __slots__ = (
        "again",
        "asked_again",
        "circumstances",
        "comparison",
        "context",
        "differentiates",
        "first",
        "foreign",
        "hook",
        "inputs",
        "is_running",
        "layouts",
        "log_det",
        "operations",
        "outputs",
        "requests",
        "returns_tuple",
        "saved",
        "step",
        "takes_tuple",
        "tolerance",
        "watched",
    )

    # Numbers of tensors in the chain, and whether they are tuples.
    inputs: list[int]
    outputs: list[int]
    takes_tuple: bool
    returns_tuple: bool

    def __init__(
        self,
        step: Step,
        streams: Sequence[Tensor],
        context: KeptContext | None,
        devices: list[torch.device],
        autocast: Autocast,
        rng: RNGStates | None,
        comparison: Comparison,
    ) -> None:
        found, settings = step.survey, step.rebuild
        assert found, "made for the steps that are rebuilt"
        assert settings, "likewise"
        self.step = step
        self.context = context
        self.layouts = [layout_of(stream) for stream in streams]
        self.circumstances = Circumstances(found, devices, autocast, rng)
        # Compiled sub-networks would compile the hooks as well.
        self.hook: Callable[..., Any] = _uncompiled_hook if found.may_be_compiled else partial
        # The sizes of what autograd asked to save in the forward pass (numbers alone, which the
        # garbage collector need not look at), and the same tensors when they are rebuilt.
        self.requests: list[int] = []
        self.saved: list[Tensor | None] = []
        self.asked_again = False
        self.is_running = False
        self.differentiates = False  # while it runs, which code of users may do
        self.foreign = found.foreign
        self.comparison = comparison
        self.tolerance = settings.tolerance
        # Samples of activations, with their places in the requests, and of the log-determinant.
        self.watched: list[tuple[int, str, Tensor]] = []
        self.log_det: Tensor | None = None
        self.operations = Operations(found.with_buffers) if settings.debug else None
        self.first, self.again = settings.contexts()

    def record(
        self, x: State, context: Context, refill: Callable[[Frame], None]
    ) -> tuple[Any, Tensor | None, Sequence[Tensor]]:
        """Runs the layer, with numbers saved in place of tensors.

        In the backward pass ``refill`` is called when they are not there.

        Returns:
            What the layer returns, and the tensors that autograd saved.
        """
        step = self.step
        # While the layer runs, all is held, as it is when it runs again: f may differentiate, too.
        self.saved, self.is_running = [], True
        saved: list[Any] = self.saved
        note = self.operations.note if self.operations else None
        pack = self.hook(_request, saved, note)
        unpack = self.hook(_unpack, self, refill)
        with saved_tensors_hooks(pack, unpack), self.operations or _nothing, self.first:
            if step.untraced:
                with no_trace(step.layer, (x, context)):
                    y, log_det = step.apply(x, context)
            else:
                y, log_det = step.apply(x, context)
        # Somebody's inverse may have put the generators back in a way of its own.
        hides = step.direction.inverted and not (step.is_ours or step.untraced)
        self.circumstances.close(drawing_shows=not hides)
        self.saved, self.is_running = [], False
        self.requests = [x.numel() for x in saved]
        found = [*saved]
        saved.clear()  # the graph holds the hooks, and they hold this
        return y, log_det, found

    def rebuild(self, y: State) -> Any:
        """Rebuilds the input state and all saved tensors from the output state."""
        return self._save_again(self.step.layer.rebuild, y)

    def restart(self, x: State) -> Any:
        """Rebuilds all saved tensors from an input state that was stored."""
        return self._save_again(_run_again, x)

    def undo(self, y: State) -> Any:
        """Rebuilds the input state only."""
        with kept_tensors(self.foreign) if self.foreign else _nothing:
            self.circumstances.enter(self.step)
            try:
                return self._replay().undo(y)
            finally:
                self.circumstances.leave()

    def forget(self) -> None:
        """Frees the saved tensors."""
        self.saved = []

    def _replay(self) -> Replay:
        context = self.context.again() if self.context else None
        return Replay(
            self.step,
            context,
            self.layouts,
            self.circumstances,
            self._returned,
            self.differentiates,
            bool(self.foreign),
            self.again,
        )

    def _returned(self, y: Any, log_det: Tensor | None) -> None:
        self.comparison.returned(self, y, log_det)

    def _save_again(self, run: Callable[[State, Replay], Any], given: State) -> Any:
        """Runs the layer as before, and keeps what autograd saves meanwhile."""
        found: list[Tensor] = []
        versions: list[int] = []
        collect = self.hook(_collect, found, versions)
        self.circumstances.enter(self.step)
        try:
            with (
                kept_tensors(self.foreign) if self.foreign else _nothing,
                torch.enable_grad(),
                saved_tensors_hooks(collect, self.hook(_look_up, found, self.step)),
            ):
                result = run(given, self._replay())
        finally:
            self.circumstances.leave()
        self._require_same(found, versions)
        self.comparison.saved(self, found)
        self.saved = self.circumstances.as_without(found)
        # The hook that holds the list is held by the graph, and this by the tensors.
        found.clear()
        return result

    def _require_same(self, found: list[Tensor], before: list[int]) -> None:
        if [x.numel() for x in found] != self.requests:
            raise RebuildError(
                f"{self.step.place} saved other tensors for the backward pass when it was run "
                f"again ({len(found)}) than in the forward pass ({len(self.requests)}). Its "
                "sub-networks must do the same both times, also with grad on cut-off inputs."
            )
        if [x._version for x in found] != before:
            raise RuntimeError(
                f"{self.step.place} changes a tensor in place that its gradient needs. Make the "
                "in-place operation behind it out of place."
            )
        if self.operations and (
            difference := self.operations.first_difference(found, self.tolerance)
        ):
            raise RebuildError(f"{self.step.place} was not rebuilt as it ran: {difference}")


def _run_again(x: State, replay: Replay) -> State:
    x = replay.restore_state(x)
    replay.rerun(x)
    return x


def _request(saved: list[Tensor], note: Callable[[Tensor], None] | None, tensor: Tensor) -> int:
    saved.append(tensor)
    if note is not None:
        note(tensor)
    return len(saved) - 1


def _unpack(frame: Frame, refill: Callable[[Frame], None], number: int) -> Tensor:
    """A tensor that the backward pass of a frame needs.

    Autograd asks for each once, and what it was given is freed as soon as it is used. A custom
    function can ask again: then all are kept until the next layer is rebuilt.
    """
    saved = frame.saved
    tensor = saved[number] if saved else None
    if tensor is not None and frame.is_running:
        frame.differentiates = True
        return tensor
    if tensor is None:
        frame.asked_again = bool(saved)
        with lock:  # another thread may be at it
            # A compiled training step would compile the engine as well.
            (uncompiled(_refill) if may_compile() else _refill)(refill, frame)
            saved = frame.saved
        tensor = saved[number]
        assert tensor is not None
    if not frame.asked_again:
        saved[number] = None
    return tensor


def _refill(refill: Callable[[Frame], None], frame: Frame) -> None:
    refill(frame)


def _collect(found: list[Tensor], versions: list[int], tensor: Tensor) -> int:
    found.append(tensor)
    versions.append(tensor._version)
    return len(found) - 1


def _look_up(found: list[Tensor], step: Step, number: int) -> Tensor:
    """A tensor that a layer asks for while it runs again, since it differentiates within itself."""
    if not found:
        raise RuntimeError(GONE.format(place=step.place))
    return found[number]


HOOKS = _request, _unpack, _collect, _look_up
_nothing = nullcontext()


def _uncompiled_hook(function: Callable[..., Any], *bound: Any) -> Callable[..., Any]:
    return partial(uncompiled(function), *bound)
