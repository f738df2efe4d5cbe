"""Layers run one after the other, of whose states only the last is stored."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from .._support.compiling import keep_out, may_compile
from .._support.generators import RNGStates, accelerators
from .._support.no_trace import lock
from ..module import InvertibleModule
from ..state import Context, State, streams_of, tensors, version
from .ambient import Ambient
from .circumstances import Autocast, autocast_settings
from .comparison import Comparison
from .constants import Constants
from .contexts import KeptContext
from .drift import current_drift
from .frame import HOOKS, Frame
from .plan import Step
from .replay import layout_of, restored, thread

# Dtypes in which a state hardly survives its inversion, and the layers that warned of it.
_COARSE = torch.float16, torch.bfloat16
_warned: WeakSet[InvertibleModule] = WeakSet()


class Kept:
    """A value that is stored, and must not be changed in place meanwhile."""

    __slots__ = ("value", "versions")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.versions = [version(x) for x in tensors(value)]

    def changed(self) -> bool:
        return [version(x) for x in tensors(self.value)] != self.versions


class Move:
    """A layer that only moves numbers: it saves nothing, and is undone for nothing."""

    __slots__ = ("inputs", "layouts", "outputs", "returns_tuple", "step")

    inputs: list[int]
    outputs: list[int]
    returns_tuple: bool

    def __init__(self, step: Step, streams: Sequence[Tensor]) -> None:
        self.step = step
        self.layouts = [layout_of(stream) for stream in streams]

    def undo(self, y: State) -> State:
        """Rebuilds the input."""
        with torch.no_grad():
            x = self.step.undo(y, None)
        return tuple(
            restored(stream, layout, self.step)
            for layout, stream in zip(self.layouts, streams_of(x), strict=True)
        )


class Chain:
    """What a run keeps for its backward pass, and how states are rebuilt from it.

    Every tensor on the way has a number. A layer consumes some and makes others; what it hands
    through keeps its number. In the backward pass a tensor's value is stored, or it comes from
    undoing the layer that consumed it. For that the tensors that this layer returned are needed,
    and so on up to the end of the run, whose state is stored. Autograd asks for layers from the
    last to the first, so that one step is enough; any other order works too, and what one branch
    needs is rebuilt without the others.
    """

    def __init__(
        self, context: Context, *, exact: bool = False, has_constants: bool = False
    ) -> None:
        if may_compile():
            keep_out(*HOOKS)
        self._context = context
        self._kept_context = KeptContext(context)
        self._context_devices = accelerators(self._kept_context.tensors)
        self._ambient = Ambient()
        # As they are while the run goes on, for the devices that are named.
        self._autocast: tuple[list[torch.device], Autocast] = [], autocast_settings([])
        self._rng: RNGStates | None = None
        self._links: list[Frame | Move] = []
        # By number: the link that consumed the tensor.
        self._consumers: list[int | None] = []
        # While the run goes on: tensors that no layer has consumed yet, by id.
        self._live: dict[int, tuple[int, Tensor]] = {}
        # Values that are stored, and values that were rebuilt and are still needed.
        self._kept: dict[int, Kept] = {}
        self._rebuilt: dict[int, Tensor] = {}
        # The frame whose saved tensors are there, and what goes when the next is rebuilt.
        self._filled: Frame | None = None
        self._spent: list[int] = []
        self._comparison = Comparison(exact)
        self._drift = current_drift()
        self._warned = False
        self._constants = Constants() if has_constants else None

    @property
    def context(self) -> Context:
        """What conditional layers take."""
        return self._context

    def record(self, step: Step, x: State, context: Context = None) -> tuple[Any, Tensor | None]:
        """Runs the next layer, with the run's context if it is given none of its own."""
        streams = x if isinstance(x, tuple) else (x,)
        from_outside = len(self._consumers)
        inputs = self._numbers(streams)
        if self._constants is not None:
            self._constants.suspect(number for number in inputs if number >= from_outside)
        if step.stores_input:
            for number, stream in zip(inputs, streams, strict=True):
                self._kept.setdefault(number, Kept(stream.detach()))
        if not step.moves_only:
            if streams[0].dtype in _COARSE and not step.stores_input:
                self._warn_of_coarse_state(step, streams[0])
            context = self.context if context is None else context
            frame, y, log_det, saved = self._record_frame(step, x, streams, context)
            frame.takes_tuple = isinstance(x, tuple)
            self._connect(frame, streams, inputs, y)
            if self._drift is None:  # which compares all there is, and is asked for numbers
                self._comparison.remember(frame, streams, y, log_det, saved)
            return y, log_det
        y, log_det = step.apply(x, None)
        if not all(id(stream) in self._live for stream in streams_of(y)):  # as behind Swap
            self._connect(Move(step, streams), streams, inputs, y)
        return y, log_det

    def _warn_of_coarse_state(self, step: Step, stream: Tensor) -> None:
        if self._warned:
            return
        self._warned = True  # the first layer stands for all
        if step.layer in _warned:
            return
        _warned.add(step.layer)
        warnings.warn(
            f"{step.place} is rebuilt from a state in {stream.dtype}, and so are those behind it: "
            "each addition rounds to 2 or 3 digits, and inversion adds that to gradients, 0.5 to "
            "7 % of their norm in 4 to 32 couplings. Keep the state in float32 and let only the "
            "sub-networks compute in lower precision: put .float() behind what makes the state, "
            "as a stem under torch.autocast does. See the guide on mixed precision.",
            UserWarning,
            stacklevel=2,
        )

    def end(self) -> None:
        """Stores what no layer has consumed: the state behind the last."""
        for number, stream in self._live.values():
            self._kept.setdefault(number, Kept(stream.detach()))
        self._live.clear()
        self._context = None

    def _record_frame(
        self, step: Step, x: State, streams: Sequence[Tensor], context: Context
    ) -> tuple[Frame, Any, Tensor | None, Sequence[Tensor]]:
        devices = self._devices_of(step, streams)
        # A composition inside a sub-network is rebuilt with it.
        with lock:
            thread.inside_layer = True
            try:
                kept = self._keep_context(context) if step.conditional else None
                context = context if step.conditional else None
                autocast = self._autocast[1]
                frame = Frame(step, streams, kept, devices, autocast, self._rng, self._comparison)
                if self._drift:
                    self._drift.remember(frame, x)
                y, log_det, saved = frame.record(x, context, self._fill)
                if self._drift:
                    self._drift.ran(frame)
            finally:
                thread.inside_layer = False
        self._rng = frame.circumstances.rng
        return frame, y, log_det, saved

    def _keep_context(self, context: Context) -> KeptContext:
        """A context as it is now: a layer before may have changed a list or a dict."""
        if context is not self._context:  # a hook's
            return KeptContext(context)
        if not isinstance(context, Tensor):
            self._kept_context = KeptContext(context)
        return self._kept_context

    def _devices_of(self, step: Step, streams: Sequence[Tensor]) -> list[torch.device]:
        """The accelerators that a layer may use, and autocast's settings for them."""
        found = step.survey.devices if step.survey is not None else []
        if not streams[0].is_cpu or found or self._context_devices:
            of_streams = (x.device for x in streams if not (x.is_cpu or x.is_meta))
            found = list(dict.fromkeys([*self._context_devices, *of_streams, *found]))
        if self._autocast[0] != found:
            self._autocast = found, autocast_settings(found)
        return found

    def _numbers(self, streams: Sequence[Tensor]) -> list[int]:
        """The numbers of tensors, new ones for those that no layer of this chain made."""
        live, found = self._live, []
        for stream in streams:
            known = live.get(id(stream))
            if known is None:
                known = live[id(stream)] = len(self._consumers), stream
                self._consumers.append(None)
            found.append(known[0])
        return found

    def _connect(
        self, link: Frame | Move, streams: Sequence[Tensor], inputs: list[int], y: Any
    ) -> None:
        """Notes which tensors a layer consumed and which it made."""
        link.returns_tuple = isinstance(y, tuple)
        outputs = self._numbers(y if link.returns_tuple else (y,))
        consumers, index = self._consumers, len(self._links)
        for stream, number in zip(streams, inputs, strict=True):
            if number not in outputs and consumers[number] is None:
                consumers[number] = index
                del self._live[id(stream)]
        link.inputs, link.outputs = inputs, outputs
        self._links.append(link)
        if self._constants is not None and self._constants.concern(link.step, inputs):
            self._keep_constants(self._constants, link, streams, streams_of(y))

    def _keep_constants(
        self,
        constants: Constants,
        link: Frame | Move,
        streams: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> None:
        """Stores the input of a layer whose constants would come back with rounding errors."""
        inputs = dict(zip(link.inputs, streams, strict=True))
        outputs = dict(zip(link.outputs, results, strict=True))
        consumed = {number: x for number, x in inputs.items() if number not in outputs}
        made = {number: y for number, y in outputs.items() if number not in inputs}
        if constants.are_spoiled(link.step, consumed, made):
            for number, stream in inputs.items():
                self._kept.setdefault(number, Kept(stream.detach()))

    def _fill(self, frame: Frame) -> None:
        """Rebuilds a frame's input and saved tensors."""
        if self._filled is not None and self._filled is not frame:
            self._filled.forget()
            self._drop_spent()
        self._comparison.begin([kept.value for n, kept in self._kept.items() if self._is_end(n)])
        before = thread.inside_layer, thread.rebuilding
        thread.inside_layer = thread.rebuilding = True
        try:
            with self._ambient.again():
                x = self._rebuild(frame)
        except Exception as error:
            error.add_note(f"While {frame.step.place} was rebuilt in the backward pass.")
            raise
        finally:
            thread.inside_layer, thread.rebuilding = before
        self._arrive(frame, x)
        self._filled = frame
        self._comparison.finish()

    def _rebuild(self, frame: Frame) -> Any:
        if all(number in self._kept for number in frame.inputs):
            return frame.restart(self._state(frame.inputs, frame.takes_tuple))
        self._require(frame.outputs)
        y = self._state(frame.outputs, frame.returns_tuple)
        if self._drift is None:
            self._comparison.see(frame.outputs, streams_of(y))
        return frame.rebuild(y)

    def _require(self, numbers: Sequence[int]) -> None:
        """Undoes the layers that lie between some tensors and what is known."""
        waiting = [number for number in numbers if not self._is_known(number)]
        while waiting:
            number = waiting[-1]
            if self._is_known(number):
                waiting.pop()
                continue
            consumer = self._consumers[number]
            if consumer is None:  # asked for while the run goes on
                self._store_live(number)
                continue
            link = self._links[consumer]
            missing = [number for number in link.outputs if not self._is_known(number)]
            if missing:
                waiting += missing
                continue
            self._arrive(link, link.undo(self._state(link.outputs, link.returns_tuple)))
            self._drop_spent()

    def _store_live(self, number: int) -> None:
        """Stores a tensor that no layer has consumed yet."""
        [stream] = [stream for n, stream in self._live.values() if n == number]
        self._kept[number] = Kept(stream.detach())

    def _is_end(self, number: int) -> bool:
        return self._consumers[number] is None

    def _is_known(self, number: int) -> bool:
        return number in self._rebuilt or number in self._kept

    def _state(self, numbers: Sequence[int], is_tuple: bool) -> Any:
        values = tuple(map(self._value, numbers))
        return values if is_tuple else values[0]

    def _value(self, number: int) -> Tensor:
        if number in self._rebuilt:
            return self._rebuilt[number]
        kept = self._kept[number]
        if kept.changed():
            which = "output" if self._is_end(number) else "state"
            raise RuntimeError(
                f"the {which} of a composition with reversible checkpointing was changed in place "
                "between forward and backward, so that its activations can't be rebuilt. Use an "
                "out-of-place operation behind it, for instance ReLU(inplace=False)."
            )
        value: Tensor = kept.value
        return value

    def _arrive(self, link: Frame | Move, x: State) -> None:
        """Keeps what a layer consumed, now that it is rebuilt; what it made is of no more use."""
        for number, stream in zip(link.inputs, streams_of(x), strict=True):
            if number not in link.outputs and number not in self._kept:
                self._rebuilt[number] = stream.detach()
        self._spent = [number for number in link.outputs if number not in link.inputs]
        if isinstance(link, Frame):
            self._comparison.arrived(link, streams_of(x))
            if self._drift:
                self._drift.measure(link, x)

    def _drop_spent(self) -> None:
        for number in self._spent:
            self._rebuilt.pop(number, None)
        self._spent = []
