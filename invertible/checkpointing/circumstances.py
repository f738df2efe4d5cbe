"""What a layer's result depends on besides its input, kept so that it can run again."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Set
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._support.generators import (
    RNGStates,
    Watch,
    can_watch,
    get_rng_states,
    note_drawing,
    same_rng_states,
    seen_to_draw,
    set_rng_states,
    was_just_seeded,
)
from .._support.no_trace import rewound
from .._support.survey import PLAIN, Survey
from ..state import version, versions
from .buffers import Statistics, cloned, copy_buffers, differ, scratch
from .plan import Step

# Kind of device, whether it is on, its dtype, and whether it caches casts.
Autocast = list[tuple[str, bool, torch.dtype, bool]]
Modes = tuple[bool, ...]


class Circumstances:
    """Parameters, buffers, modes, random generators and autocast as a layer found them.

    Made before the layer runs; :meth:`close` is called behind it. Later :meth:`enter` puts all of
    it as it was then, and :meth:`leave` as it is now.
    """

    __slots__ = (
        "_autocast",
        "_buffers",
        "_data",
        "_devices",
        "_exchanged",
        "_generators",
        "_held",
        "_modes",
        "_rewound",
        "_statistics",
        "_survey",
        "_undo",
        "_versions",
        "_watch",
        "_written",
        "rng",
        "rng_before",
    )

    def __init__(
        self,
        found: Survey,
        devices: list[torch.device],
        autocast: Autocast,
        rng: RNGStates | None,
    ) -> None:
        self._survey = found
        self._devices = devices
        self._autocast = autocast
        self._modes = found.modes
        self._versions = versions(found.parameters)
        # They share the memory, and keep it if ``parameter.data`` is set to other memory.
        self._data = [parameter.data for parameter in found.plain_parameters]
        self._exchanged: list[tuple[Tensor, Tensor]] = []
        self._written = _copy_parameters(found, self._modes) if found.may_write else {}
        self._held = [(part._buffers, dict(part._buffers)) for part in found.read_buffers]
        self._buffers = copy_buffers(self._held) if self._held else []
        self._statistics = [Statistics.of(n) for n in found.batch_norms if not n.training]
        self._generators = [(generator, generator.get_state()) for generator in found.generators]
        # A state of the CPU's generator takes 5 kB: the same one is kept once, in all layers.
        self.rng_before = _reuse(rng, get_rng_states(devices)) if found.may_draw else None
        self.rng = self.rng_before or rng
        self._rewound = rewound.count
        self._watch: Watch | None = None
        self._undo: list[Callable[[], Any]] = []

    # Behind the layer:

    def close(self, drawing_shows: bool) -> None:
        """Forgets what the layer left alone; whether it drew may not show in the generators."""
        found = self._survey
        known = _known_writes(found, self._modes) if found.may_write else _NOTHING
        if self._buffers:
            layer, is_first = found.modules[0], known is None
            self._buffers = [entry.if_needed(layer, is_first) for entry in self._buffers]
        if found.may_write:
            self._forget_parameters(known)
        if self.rng_before is not None:
            self._forget_rng(self.rng_before, drawing_shows)

    def _forget_parameters(self, known: Set[int] | None) -> None:
        found, before = self._survey, self._versions
        self._versions = now = versions(found.parameters)
        written = {i for i, count in enumerate(now) if count != before[i]}
        if known is None:
            parameters = found.parameters
            written |= {i for i, copy in self._written.items() if differ(copy, parameters[i])}
            self._written = {i: self._written[i] for i in written}
        elif written <= known:
            return
        _note_writes(found, self._modes, written | (known or _NOTHING))

    def _forget_rng(self, before: RNGStates, drawing_shows: bool) -> None:
        layer, modes = self._survey.modules[0], self._modes
        self.rng = _reuse(before, get_rng_states(self._devices))
        if self.rng is not before:
            if threading.active_count() == 1:  # nobody else can have drawn
                note_drawing(layer, modes, True)
        elif rewound.count == self._rewound and (
            drawing_shows or seen_to_draw(layer, modes) is False
        ):
            self.rng_before = None

    # When it is to run again:

    def enter(self, step: Step) -> None:
        """Puts all as the layer found it.

        Raises:
            RuntimeError: If a parameter or a large buffer was changed in place.
        """
        self._require_unchanged(step)
        try:
            self._put_back()
            self.rewind()
        except BaseException:
            self.leave()
            raise

    def rewind(self) -> None:
        """Puts what the layer may have changed as it found it, once more."""
        if self._watch is not None:
            self._watch.drew = False
        elif self.rng_before is not None:
            set_rng_states(self._devices, self.rng_before)
        for generator, state in self._generators:
            generator.set_state(state)
        if self._written:
            self._place_parameters()
        fresh = {id(b): (b if copy is None else copy).clone() for b, _, copy in self._buffers}
        for place, held in self._held:
            _fill(place, {name: b if b is None else fresh[id(b)] for name, b in held.items()})

    def leave(self) -> None:
        """Puts all as it was before :meth:`enter`."""
        while self._undo:
            self._undo.pop()()

    def as_without(self, saved: list[Tensor]) -> list[Tensor | None]:
        """What autograd would hold in place of what was saved when the layer ran again.

        It holds parameters and running statistics themselves: where other numbers came into them
        uncounted, by ``parameter.data`` or a batch in train mode, it computes with these.
        """
        pairs = [*self._exchanged]
        for _, buffers, copies in self._statistics:
            pairs += [(copy, buffers[name]) for name, copy in copies.items()]
        if not pairs:
            return [*saved]
        live = {then.data_ptr(): (then, now) for then, now in pairs if type(then) in PLAIN}
        found: list[Tensor | None] = []
        for x in saved:
            pair = live.get(x.data_ptr()) if type(x) in PLAIN else None
            found.append(x if pair is None else _now(x, *pair))
        return found

    def _require_unchanged(self, step: Step) -> None:
        parameters, before = self._survey.parameters, self._versions
        now = versions(parameters)
        if now != before:
            for i, parameter in enumerate(parameters):
                if now[i] != before[i] and i not in self._written:
                    raise RuntimeError(
                        f"a parameter of {step.place}, of shape {tuple(parameter.shape)}, was "
                        "changed in place between forward and backward: its activations can't be "
                        "rebuilt. Call backward before optimizer.step()."
                    )
        for buffer, count, copy in self._buffers:
            if copy is None and version(buffer) != count:
                raise RuntimeError(
                    f"a buffer of {step.place}, of shape {tuple(buffer.shape)}, was changed in "
                    "place between forward and backward: its activations can't be rebuilt. Change "
                    "it behind backward, or put another tensor in its place."
                )

    def _put_back(self) -> None:
        found = self._survey
        if not found.still_holds():
            for place, held in zip(found.places, found.held, strict=True):
                now = dict(place)
                self._undo.append(partial(_fill, place, now))
                _fill(place, {name: _was(x, now.get(name)) for name, x in held.items()})
            for module, kind in zip(found.modules, found.kinds, strict=True):
                if type(module) is not kind:  # as a parametrization exchanges it
                    self._undo.append(partial(setattr, module, "__class__", type(module)))
                    module.__class__ = kind
        elif self._written:
            self._undo += [partial(_fill, place, dict(place)) for place in found.places]
        self._put_data_back()
        if self._modes != found.modes:
            for module, mode in zip(found.modules, self._modes, strict=True):
                self._undo.append(partial(setattr, module, "training", module.training))
                module.training = mode
        for part in found.with_buffers:
            self._undo.append(partial(_fill, part._buffers, dict(part._buffers)))
        self._put_statistics_back()
        if self._autocast != autocast_settings(self._devices):
            stack = ExitStack()
            self._undo.append(stack.close)
            for device, enabled, dtype, cache in self._autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled, cache))
        if self.rng_before is not None:
            self._prepare_drawing(self.rng_before)

    def _put_data_back(self) -> None:
        self._exchanged = []
        parameters = self._survey.plain_parameters
        if [x.data_ptr() for x in self._data] == [p.data_ptr() for p in parameters]:
            return
        for parameter, data in zip(parameters, self._data, strict=True):
            now = parameter.data
            # Who frees the memory of parameters and gets it back in time leaves another shape.
            if now.data_ptr() != data.data_ptr() and now.shape == data.shape:
                self._undo.append(partial(setattr, parameter, "data", now))
                parameter.data = data
                self._exchanged.append((data, parameter))

    def _put_statistics_back(self) -> None:
        for norm in self._survey.batch_norms:
            if norm.training:
                compiled = self._survey.may_be_compiled
                norm._buffers.update(cloned(norm._buffers) if compiled else scratch(norm))
        for place, buffers, copies in self._statistics:
            place.update(buffers)
            place.update(copies)

    def _prepare_drawing(self, before: RNGStates) -> None:
        """Sets the generators at :meth:`rewind`, or, in doubt, not before anything is drawn."""
        layer, modes, devices = self._survey.modules[0], self._modes, self._devices
        now = get_rng_states(devices)
        if self._survey.may_be_compiled or not can_watch() or seen_to_draw(layer, modes):
            self._undo.append(partial(set_rng_states, devices, now))
            return
        note_drawing(layer, modes, False)

        def start() -> None:
            if not seen_to_draw(layer, modes):
                note_drawing(layer, modes, True)
                self._undo.append(partial(set_rng_states, devices, now))
            current = get_rng_states(devices)
            # A layer that seeds the generators itself has done so by then.
            if same_rng_states(current, now) or not was_just_seeded(current):
                set_rng_states(devices, before)

        self._watch = Watch(start)
        self._watch.__enter__()  # type: ignore[no-untyped-call]
        self._undo.append(self._stop_watching)

    def _stop_watching(self) -> None:
        assert self._watch is not None
        self._watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._watch = None

    def _place_parameters(self) -> None:
        found, fresh = self._survey, dict[int, Tensor]()
        for i, copy in self._written.items():
            parameter = found.parameters[i]
            fresh[id(parameter)] = stand_in = nn.Parameter(copy.clone(), parameter.requires_grad)
            if version(parameter) == self._versions[i]:  # else autograd would raise
                self._exchanged.append((stand_in, parameter))
        for place, held in zip(found.places, found.held, strict=True):
            place.update({name: fresh[id(x)] for name, x in held.items() if id(x) in fresh})


# Of layers that have run in some modes, which parameters changed meanwhile, by number.
_writes: WeakKeyDictionary[nn.Module, dict[Modes, Set[int]]] = WeakKeyDictionary()
_NOTHING: frozenset[int] = frozenset()


def _known_writes(found: Survey, modes: Modes) -> Set[int] | None:
    """Which parameters a layer is known to change; None before it has run."""
    known = _writes.get(found.modules[0])
    return None if known is None else known.get(modes)


def _note_writes(found: Survey, modes: Modes, written: Set[int]) -> None:
    _writes.setdefault(found.modules[0], {})[modes] = written


def _copy_parameters(found: Survey, modes: Modes) -> dict[int, Tensor]:
    """By number, those that a layer may change."""
    known = _known_writes(found, modes)
    if known is not None and not known:
        return {}
    return {
        i: parameter.detach().clone()
        for i, parameter in enumerate(found.parameters)
        if known is None or i in known
    }


def _fill(place: dict[str, Any], content: dict[str, Any]) -> None:
    place.clear()
    place.update(content)


def _was(held: Any, now: Any) -> Any:
    """What a layer found, unless it is for its own hooks to exchange.

    ``fully_shard`` puts whole parameters in the place of shards around each use.
    """
    return now if _is_shard(held) is not _is_shard(now) else held


def _is_shard(x: Any) -> bool:
    if hasattr(x, "_fsdp_flattened"):  # of FullyShardedDataParallel
        return True
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


def _now(x: Tensor, then: Tensor, now: Tensor) -> Tensor:
    """What became of a tensor that was saved as it is, and not as a view."""
    is_whole = x.shape == then.shape and x.stride() == then.stride()
    return now.detach() if is_whole else x


def _reuse(old: RNGStates | None, new: RNGStates) -> RNGStates:
    return old if old is not None and same_rng_states(old, new) else new


def autocast_settings(devices: list[torch.device]) -> Autocast:
    """What autocast is set to, for the CPU and for some devices."""
    kinds = ("cpu", *{device.type for device in devices}) if devices else ("cpu",)
    cache = torch.is_autocast_cache_enabled()
    return [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cache)
        for kind in kinds
    ]
