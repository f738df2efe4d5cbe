"""What a layer's result depends on besides its input, kept so that it can run again."""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._support.generators import RNGStates, get_rng_states, same_rng_states, set_rng_states
from .._support.no_trace import Places, put_back
from .._support.survey import Survey
from ..state import version, versions
from .plan import Step

# Kind of device, whether it is on, its dtype, and whether it caches casts.
Autocast = list[tuple[str, bool, torch.dtype, bool]]


class Circumstances:
    """Parameters, buffers, random generators and autocast as a layer found them.

    Made before the layer runs; :meth:`close` is called behind it. Later :meth:`enter` puts all of
    it as it was then, and :meth:`leave` as it is now.
    """

    __slots__ = (
        "_autocast",
        "_buffers",
        "_devices",
        "_now",
        "_places",
        "_stack",
        "_survey",
        "_versions",
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
        self._versions = versions(found.parameters)
        self._autocast = autocast
        self._buffers = _copy_buffers(found.read_buffers) if found.read_buffers else []
        # A state of the CPU's generator takes 5 kB: the same one is kept once, in all layers.
        self.rng_before = _reuse(rng, get_rng_states(devices)) if found.may_draw else None
        self.rng = self.rng_before or rng

    def close(self, drawing_shows: bool) -> None:
        """Forgets what the layer left alone; whether it drew may not show in the generators."""
        if self._buffers:
            self._buffers = [entry for entry in self._buffers if entry.changed()]
        if self.rng_before is not None and drawing_shows:
            self.rng = _reuse(self.rng_before, get_rng_states(self._devices))
            if self.rng is self.rng_before:
                self.rng_before = None

    def enter(self, step: Step) -> None:
        """Puts all as the layer found it."""
        parameters = self._survey.parameters
        now = versions(parameters)
        if now != self._versions:
            changed = next(i for i, was in enumerate(self._versions) if was != now[i])
            raise RuntimeError(
                f"a parameter of {step.place}, of shape {tuple(parameters[changed].shape)}, was "
                "changed in place between forward and backward: its activations can't be rebuilt. "
                "Call backward before optimizer.step()."
            )
        self._places: Places = [(m._buffers, dict(m._buffers)) for m in self._survey.with_buffers]
        self._now = get_rng_states(self._devices) if self.rng_before is not None else None
        self._stack = None
        if self._autocast != autocast_settings(self._devices):
            self._stack = ExitStack()
            for kind, enabled, dtype, cache in self._autocast:
                self._stack.enter_context(torch.autocast(kind, dtype, enabled, cache))
        self.rewind()

    def rewind(self) -> None:
        """Puts buffers and generators as the layer found them, once more."""
        if self.rng_before is not None:
            set_rng_states(self._devices, self.rng_before)
        fresh: dict[int, Tensor] = {}
        for part, (place, buffers) in zip(self._survey.with_buffers, self._places, strict=True):
            if not buffers:
                continue
            if type(part) in _BATCH_NORMS and not self._survey.may_be_compiled:
                if part.training:
                    place.update(_scratch(part))
                continue
            for name, buffer in buffers.items():
                if buffer is not None:
                    place[name] = fresh.setdefault(id(buffer), buffer.detach().clone())
        for place, name, _, _, copy in self._buffers:
            place[name] = fresh.setdefault(id(copy), copy.clone())

    def leave(self) -> None:
        """Puts all as it was before :meth:`enter`."""
        put_back(self._places)
        if self._now is not None:
            set_rng_states(self._devices, self._now)
        if self._stack is not None:
            self._stack.close()


class _BufferCopy(NamedTuple):
    """A buffer as it was before a layer ran."""

    place: dict[str, Tensor | None]
    name: str
    buffer: Tensor
    version: int
    copy: Tensor

    def changed(self) -> bool:
        return self.place.get(self.name) is not self.buffer or version(self.buffer) != self.version


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _copy_buffers(modules: list[nn.Module]) -> list[_BufferCopy]:
    copies: dict[int, Tensor] = {}  # a buffer in two places is copied once
    return [
        _BufferCopy(
            part._buffers,
            name,
            buffer,
            version(buffer),
            copies.setdefault(id(buffer), buffer.detach().clone()),
        )
        for part in modules
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]


# Running statistics that BatchNorm may write to in a second run, and nobody reads, and the true
# mean that they were made for.
_scratches: WeakKeyDictionary[nn.Module, tuple[Tensor, dict[str, Tensor | None]]]
_scratches = WeakKeyDictionary()


def _scratch(norm: nn.Module) -> dict[str, Tensor | None]:
    mean, var = norm._buffers["running_mean"], norm._buffers["running_var"]
    if mean is None or var is None:
        return {}
    found = _scratches.get(norm)
    if found is None or found[0] is not mean:  # moved to another device, for instance
        scratch = {"running_mean": mean.clone(), "running_var": var.clone()}
        found = _scratches[norm] = mean, {**scratch, "num_batches_tracked": None}
    return found[1]


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
