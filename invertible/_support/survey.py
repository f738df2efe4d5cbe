"""What a layer consists of, found in one walk over its modules."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


class Survey(NamedTuple):
    """A layer's modules and parameters, each once, and what they may do."""

    modules: list[nn.Module]
    kinds: list[type]  # their classes
    with_buffers: list[nn.Module]  # or which may register some
    read_buffers: list[nn.Module]  # those of them whose results may depend on what buffers become
    batch_norms: list[nn.Module]  # and those that do so in eval mode only
    parameters: list[Tensor]
    plain_parameters: list[Tensor]  # those of them of no subclass, such as distributed ones
    places: list[dict[str, Any]]  # where modules hold parameters and modules
    held: list[dict[str, Any]]  # what is in these places
    held_values: list[Any]  # likewise, in a row
    devices: list[torch.device]  # accelerators that parameters are on
    generators: list[torch.Generator]  # that modules hold as attributes
    foreign: list[nn.Module]  # those that run code of neither torch nor this library
    may_draw: bool  # random numbers
    may_write: bool  # to its own parameters when it runs
    may_be_compiled: bool
    is_lazy: bool  # whether its first run will make parameters

    @property
    def modes(self) -> tuple[bool, ...]:
        """Which modules are in train mode."""
        return tuple([module.training for module in self.modules])

    def still_holds(self) -> bool:
        """Whether no parameter and no module in it was exchanged, nor the class of one."""
        now, was = _values(self.places), self.held_values
        return (
            len(now) == len(was)
            and all(map(is_, now, was))
            and all(map(is_, map(type, self.modules), self.kinds))
        )


def _values(dictionaries: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dictionaries)))


def survey(layer: nn.Module) -> Survey:
    """Walks over a layer: as ``layer.modules()``, but several times faster."""
    modules, seen = [layer], {id(layer)}
    with_buffers: list[nn.Module] = []
    read_buffers: list[nn.Module] = []
    batch_norms: list[nn.Module] = []
    parameters: list[Tensor] = []
    plain: list[Tensor] = []
    places: list[dict[str, Any]] = []
    devices: dict[torch.device, None] = {}
    generators: list[torch.Generator] = []
    foreign: list[nn.Module] = []
    may_be_compiled = lazy = False
    # Hooks and replaced methods may do anything.
    all_hooked = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    may_draw = may_write = bool(all_hooked)
    for module in modules:  # which grows meanwhile
        own, kind = module.__dict__, type(module)
        known = _KNOWN.get(kind) or _is_known(kind)
        if own["_buffers"] or not known:
            with_buffers.append(module)
            (batch_norms if kind in _WRITE_ONLY else read_buffers).append(module)
        hooked = all_hooked or own["_forward_hooks"] or own["_forward_pre_hooks"]
        if not known or hooked:
            may_draw = True
            may_write = may_write or not _is_torchs(kind)
            may_be_compiled |= "_orig_mod" in own["_modules"]  # torch.compile(module)
        if not known:
            generators += [x for x in own.values() if type(x) is torch.Generator]
            lazy = lazy or any(
                isinstance(x, UninitializedParameter | UninitializedBuffer)
                for x in (*own["_parameters"].values(), *own["_buffers"].values())
            )
        if module._compiled_call_impl is not None or "forward" in own:
            may_draw = may_write = may_be_compiled = hooked = True
        if hooked or not (known or kind.__module__.startswith("torch.nn.modules.")):
            foreign.append(module)
        if kind in _EMBEDDINGS and own["max_norm"] is not None:
            may_write = True
        if own["_parameters"]:
            places.append(own["_parameters"])
        for parameter in own["_parameters"].values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters.append(parameter)
                if type(parameter) in PLAIN:
                    plain.append(parameter)
                if not (parameter.is_cpu or parameter.is_meta):
                    devices[parameter.device] = None
        if own["_modules"]:
            places.append(own["_modules"])
        for child in own["_modules"].values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)
    return Survey(
        modules,
        list(map(type, modules)),
        with_buffers,
        read_buffers,
        batch_norms,
        parameters,
        plain,
        places,
        list(map(dict, places)),
        _values(places),
        list(devices),
        generators,
        foreign,
        may_draw,
        may_write,
        may_be_compiled,
        lazy,
    )


# In train mode they only write their running statistics, and in eval mode only read them.
_WRITE_ONLY = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}

PLAIN = {nn.Parameter, Tensor}

# With max_norm they shorten the vectors that they look up.
_EMBEDDINGS = {nn.Embedding, nn.EmbeddingBag}

_KNOWN: dict[type, bool] = {}


def _is_known(kind: type) -> bool:
    """Whether modules of a class are known to draw no random numbers, in any mode."""
    known = _KNOWN.get(kind)
    if known is None:
        home = kind.__module__
        known = _KNOWN[kind] = home.startswith("invertible.") or (
            home.startswith("torch.nn.modules.") and kind.__name__ in _NEVER_DRAW
        )
    return known


def _is_torchs(kind: type) -> bool:
    """Whether a class is torch's own, none of which changes its parameters when it is called."""
    return kind.__module__.startswith("torch.nn.modules.")


# Classes of torch.nn that draw in no mode. Dropout draws in train mode, and so does RReLU.
_NAMES = """
    Identity Sequential ModuleList ModuleDict ParameterList ParameterDict
    Linear Bilinear Embedding Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d
    LayerNorm GroupNorm RMSNorm LocalResponseNorm
    ReLU ReLU6 LeakyReLU PReLU ELU SELU CELU GELU SiLU Mish GLU Tanh Sigmoid Softplus Softsign
    Hardtanh Hardswish Hardsigmoid Hardshrink Softshrink Tanhshrink LogSigmoid Threshold
    Softmax Softmax2d Softmin LogSoftmax
    MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d LPPool3d
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
    AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    Flatten Unflatten Upsample UpsamplingNearest2d UpsamplingBilinear2d PixelShuffle PixelUnshuffle
    ChannelShuffle ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d
    ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d
    ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d
"""
_NEVER_DRAW = frozenset(_NAMES.split())
