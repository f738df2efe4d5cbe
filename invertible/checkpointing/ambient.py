"""What surrounds a run, in the thread or the process: put back when its layers are rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.utils import parametrize


class Ambient:
    """The default device and dtype, function modes, and switches of torch, as they are.

    Autocast is not among them, since it depends on the devices that a layer uses.
    """

    __slots__ = ("_modes", "_switches")

    def __init__(self) -> None:
        self._modes = _function_modes()
        self._switches = _read_switches()

    def again(self) -> AbstractContextManager[None]:
        """A context in which all is as it was, and no tensor is made for inference alone."""
        if (
            not (torch.is_inference_mode_enabled() or parametrize._cache_enabled)
            and _function_modes() == self._modes
            and _read_switches() == self._switches
        ):
            return nullcontext()
        return self._put_back()

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        modes, switches = _function_modes(), _read_switches()
        cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
        with torch.inference_mode(False):
            try:
                _set_switches(self._switches)
                _set_function_modes(self._modes)
                yield
            finally:
                _set_function_modes(modes)
                _set_switches(switches)
                parametrize._cache_enabled = cached


def _function_modes() -> list[Any]:
    """Those of this thread; the default device is one of them."""
    count = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(i) for i in range(count)] if count else []


def _set_function_modes(modes: list[Any]) -> None:
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


def _set_deterministic(setting: tuple[bool, bool]) -> None:
    torch._C._set_deterministic_algorithms(setting[0], warn_only=setting[1])


Switch = tuple[Callable[[], Any], Callable[[Any], Any]]


def _switch(get: str, put: str) -> list[Switch]:
    """How a switch is read and set, where this version of torch has it."""
    found = getattr(torch._C, get, None), getattr(torch._C, put, None)
    return [found] if None not in found else []  # type: ignore[list-item]


def _precision(get: str, put: str) -> Switch:
    """Likewise; torch refuses to tell if it was set for single backends."""
    read, write = getattr(torch._C, get), getattr(torch._C, put)

    def read_or_none() -> Any:
        try:
            return read()
        except RuntimeError:
            return None

    def write_if_known(value: Any) -> None:
        if value is not None:
            write(value)

    return read_or_none, write_if_known


# What decides in which way, and in which precision, operations compute.
_SWITCHES: list[Switch] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    _precision("_get_float32_matmul_precision", "_set_float32_matmul_precision"),
    _precision("_get_cudnn_allow_tf32", "_set_cudnn_allow_tf32"),
    (
        lambda: (
            torch._C._get_deterministic_algorithms(),
            torch._C._get_deterministic_algorithms_warn_only(),
        ),
        _set_deterministic,
    ),
    *_switch("_get_flash_sdp_enabled", "_set_sdp_use_flash"),
    *_switch("_get_mem_efficient_sdp_enabled", "_set_sdp_use_mem_efficient"),
    *_switch("_get_math_sdp_enabled", "_set_sdp_use_math"),
    *_switch("_get_cudnn_sdp_enabled", "_set_sdp_use_cudnn"),
    *_switch("_get_overrideable_sdp_enabled", "_set_sdp_use_overrideable"),
    *_switch("_get_sdp_priority_order", "_set_sdp_priority_order"),
    *_switch("_get_mkldnn_enabled", "_set_mkldnn_enabled"),
    *_switch("_get_cudnn_enabled", "_set_cudnn_enabled"),
    *_switch("_get_cudnn_benchmark", "_set_cudnn_benchmark"),
    *_switch("_get_cudnn_deterministic", "_set_cudnn_deterministic"),
]


def _read_switches() -> list[Any]:
    return [get() for get, _ in _SWITCHES]


def _set_switches(values: list[Any]) -> None:
    for (get, put), value in zip(_SWITCHES, values, strict=True):
        if get() != value:
            put(value)
