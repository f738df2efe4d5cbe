"""What a layer consists of, found in one walk over its modules."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


class Survey(NamedTuple):
    """A layer's modules and parameters, each once, and what they may do."""

    modules: list[nn.Module]
    with_buffers: list[nn.Module]  # or which may register some
    read_buffers: list[nn.Module]  # those of them whose results may depend on what buffers become
    parameters: list[Tensor]
    devices: list[torch.device]  # accelerators that parameters are on
    foreign: list[nn.Module]  # those that run code of neither torch nor this library
    may_draw: bool  # random numbers
    may_be_compiled: bool


def survey(layer: nn.Module) -> Survey:
    """Walks over a layer: as ``layer.modules()``, but several times faster."""
    modules, seen = [layer], {id(layer)}
    with_buffers: list[nn.Module] = []
    read_buffers: list[nn.Module] = []
    parameters: list[Tensor] = []
    devices: dict[torch.device, None] = {}
    foreign: list[nn.Module] = []
    # Hooks and replaced methods may do anything.
    all_hooked = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    may_draw, may_be_compiled = bool(all_hooked), False
    for module in modules:  # which grows meanwhile
        own = module.__dict__
        known = _KNOWN.get(type(module)) or _is_known(type(module))
        if own["_buffers"] or not known:
            with_buffers.append(module)
            if type(module) not in _WRITE_ONLY:
                read_buffers.append(module)
        hooked = all_hooked or own["_forward_hooks"] or own["_forward_pre_hooks"]
        if not known or hooked:
            may_draw = True
            may_be_compiled |= "_orig_mod" in own["_modules"]  # torch.compile(module)
        if module._compiled_call_impl is not None or "forward" in own:
            may_draw = may_be_compiled = hooked = True
        if hooked or not (known or type(module).__module__.startswith("torch.nn.modules.")):
            foreign.append(module)
        for parameter in own["_parameters"].values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters.append(parameter)
                if not (parameter.is_cpu or parameter.is_meta):
                    devices[parameter.device] = None
        for child in own["_modules"].values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)
    return Survey(
        modules,
        with_buffers,
        read_buffers,
        parameters,
        list(devices),
        foreign,
        may_draw,
        may_be_compiled,
    )


# In train mode they only write their running statistics, and in eval mode only read them.
_WRITE_ONLY = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}

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
