"""One layer's part in reversible checkpointing: all that its backward pass needs but tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .._support.generators import (
    RNGStates,
    accelerators,
    get_rng_states,
    same_rng_states,
    set_rng_states,
)
from .._support.no_trace import parts, untouched
from ..module import restore_state
from ..state import tensors, version
from .plan import Step


class Kept:
    """A state that is stored, and must not be changed in place meanwhile."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.versions = [version(x) for x in tensors(self.state)]

    def changed(self) -> bool:
        return [version(x) for x in tensors(self.state)] != self.versions


class Frame:
    """Runs a layer, and later runs it again from its output exactly as it ran before."""

    def __init__(self, step: Step, x: Any, context: Any, rng: RNGStates) -> None:
        self.step = step
        self.context = context
        self.inputs = [_Layout(t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors(x)]
        self.modules = parts(step.layer)
        parameters = [p for m in self.modules for p in m._parameters.values() if p is not None]
        self.parameters = [(p, version(p)) for p in parameters]
        self.is_compiled = any(map(_is_compiled, self.modules))
        self.devices = accelerators((x, context, parameters))
        self.autocast = _autocast_settings(self.devices)
        self.buffers = _copy_buffers(self.modules)
        # What autograd asked to save in the forward pass, and the same tensors when rebuilt.
        self.requests: list[tuple[int, torch.dtype]] = []
        self.saved: list[Tensor | None] = []
        self.asked_again = False
        # A state of the CPU's generator takes 5 kB: equal ones are kept once.
        self.rng_before = _reuse(rng, get_rng_states(self.devices))
        self.rng_after = self.rng_before

    def run(self, x: Any, unpack: Callable[[int], Tensor]) -> tuple[Any, Tensor | None]:
        """Runs the layer, with numbers saved in place of tensors.

        In the backward pass ``unpack`` gets the number and returns the tensor.
        """
        with saved_tensors_hooks(self.hook(_request, self.requests), unpack):
            y, log_det = self.step.direction.run(self.step.layer, x, self.context)
        self.rng_after = _reuse(self.rng_before, get_rng_states(self.devices))
        self.buffers = [entry for entry in self.buffers if entry.changed()]
        return y, log_det

    def rebuild(self, y: Any) -> Any:
        """Rebuilds the input state and all saved tensors from the output state."""
        layer, direction = self.step.layer, self.step.direction
        with self._recording():
            if direction.log_det and not layer.volume_preserving:
                with torch.no_grad():
                    x = restore_state(direction.undo(layer, y, self.context), self.restore)
                direction.run(layer, x, self.context)
                return x
            again = layer.rebuild_inverse if direction.inverted else layer.rebuild_forward
            return again(y, self.restore, *([self.context] if layer.conditional else []))

    def rerun(self, x: Any) -> Any:
        """Rebuilds all saved tensors from an input state that was stored."""
        x = restore_state(x, self.restore)
        with self._recording():
            self.step.direction.run(self.step.layer, x, self.context)
        return x

    def undo(self, y: Any) -> Any:
        """Rebuilds the input state only."""
        with torch.no_grad(), nullcontext() if self._only_moves() else self._as_before():
            x = self.step.direction.undo(self.step.layer, y, self.context)
            return restore_state(x, self.restore)

    def _only_moves(self) -> bool:
        """Whether there is nothing to put back: no parts, nothing saved, nothing drawn."""
        has_parts = len(self.modules) > 1 or self.parameters or self.modules[0]._buffers
        return not (has_parts or self.requests) and self.rng_before is self.rng_after

    def take(self, number: int) -> Tensor | None:
        """Hands out a saved tensor, or None if it is not there.

        Autograd asks for each once, and what it was given is freed as soon as it is used. A custom
        function can ask again: then all are kept until the next layer is rebuilt.
        """
        if not self.saved:
            return None
        tensor = self.saved[number]
        if tensor is None:
            self.asked_again = True
        elif not self.asked_again:
            self.saved[number] = None
        return tensor

    def forget(self) -> None:
        """Frees the saved tensors."""
        self.saved = []

    def restore(self, x: Tensor, stream: int) -> Tensor:
        """Gives a rebuilt stream the layout and ``requires_grad`` of the original."""
        layout = self.inputs[stream]
        if x.shape != layout.shape or x.dtype != layout.dtype:
            raise RuntimeError(
                f"{self.step.place} took a stream of shape {tuple(layout.shape)} and "
                f"{layout.dtype}, and its inverse returned {tuple(x.shape)} and {x.dtype}."
            )
        return _with_strides(x.detach(), layout.stride).requires_grad_(layout.requires_grad)

    def hook(self, function: Callable[..., Any], *bound: Any) -> Callable[..., Any]:
        """A hook on saved tensors that compiled sub-networks call, but do not compile as well."""
        return partial(_uncompiled(function) if self.is_compiled else function, *bound)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Keeps what autograd saves inside."""
        found: list[tuple[Tensor, int]] = []
        collect = self.hook(_collect, found)
        with (
            self._as_before(),
            torch.enable_grad(),
            saved_tensors_hooks(collect, _refuse),
        ):
            yield
            self._require_same_random_numbers()
        self._require_same(found)
        self.saved = [tensor for tensor, _ in found]

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Puts generators, buffers and autocast as they were before the layer ran."""
        for parameter, before in self.parameters:
            if version(parameter) != before:
                raise RuntimeError(
                    f"a parameter of {self.step.place}, of shape {tuple(parameter.shape)}, was "
                    "changed in place between forward and backward: its activations can't be "
                    "rebuilt. Call backward before optimizer.step()."
                )
        with untouched(self.modules, self.devices), ExitStack() as stack:
            if self.autocast != _autocast_settings(self.devices):
                for setting in self.autocast:
                    stack.enter_context(torch.autocast(**setting))
            set_rng_states(self.devices, self.rng_before)
            fresh: dict[int, Tensor] = {}
            for place, name, _, _, copy in self.buffers:
                place[name] = fresh.setdefault(id(copy), copy.clone())
            yield

    def _require_same_random_numbers(self) -> None:
        if not same_rng_states(get_rng_states(self.devices), self.rng_after):
            raise RuntimeError(
                f"{self.step.place} drew other random numbers when it was run again than in the "
                "forward pass. Another thread may have drawn from the same generator."
            )

    def _require_same(self, found: list[tuple[Tensor, int]]) -> None:
        if [(x.numel(), x.dtype) for x, _ in found] != self.requests:
            raise RuntimeError(
                f"{self.step.place} saved other tensors for the backward pass when it was run "
                f"again ({len(found)}) than in the forward pass ({len(self.requests)}). Its "
                "sub-networks must do the same both times, also with grad on cut-off inputs."
            )
        if any(version(x) != before for x, before in found):
            raise RuntimeError(
                f"{self.step.place} changes a tensor in place that its gradient needs. Make the "
                "in-place operation behind it out of place."
            )


class _Layout(NamedTuple):
    """What a rebuilt tensor must have in common with the original."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


class _BufferCopy(NamedTuple):
    """A buffer as it was before a layer ran."""

    place: dict[str, Tensor | None]
    name: str
    buffer: Tensor
    version: int
    copy: Tensor

    def changed(self) -> bool:
        return self.place.get(self.name) is not self.buffer or version(self.buffer) != self.version


# In train mode they only write their running statistics, and in eval mode only read them.
_WRITE_ONLY = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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
        if part._buffers and type(part) not in _WRITE_ONLY
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]


def _reuse(old: RNGStates, new: RNGStates) -> RNGStates:
    return old if same_rng_states(old, new) else new


def _autocast_settings(devices: list[torch.device]) -> list[dict[str, Any]]:
    return [
        {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in {"cpu", *(device.type for device in devices)}
    ]


def _with_strides(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same values under other strides.

    Convolutions and batch statistics sum in an order that depends on the strides, and compiled
    sub-networks have guards on them.
    """
    if x.stride() == stride:
        return x
    shape = x.shape
    # A dimension of stride 0 was expanded: it is copied once and expanded again.
    x = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)]
    moved = [
        old != new for size, old, new in zip(x.shape, x.stride(), stride, strict=True) if size > 1
    ]
    if any(moved):
        x = torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)
    return x.as_strided(shape, stride)


def _is_compiled(module: nn.Module) -> bool:
    return (
        module._compiled_call_impl is not None
        or "_orig_mod" in module._modules  # torch.compile(module)
        or "forward" in module.__dict__  # module.forward = torch.compile(module.forward)
    )


@cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)  # type: ignore[no-any-return,no-untyped-call]


def _request(requests: list[tuple[int, torch.dtype]], tensor: Tensor) -> int:
    requests.append((tensor.numel(), tensor.dtype))
    return len(requests) - 1


def _collect(found: list[tuple[Tensor, int]], tensor: Tensor) -> None:
    tensor = tensor.detach()
    found.append((tensor, version(tensor)))


def _refuse(_: None) -> Tensor:
    raise AssertionError("the graph of a rebuilt layer is never used")
