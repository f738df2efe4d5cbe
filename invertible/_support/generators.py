"""The random generators that a layer may draw from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..state import tensors


def accelerators(state: Any) -> list[torch.device]:
    """The devices other than the CPU that a state lies on: those whose generators it may use."""
    found = {x.device: None for x in tensors(state) if not (x.is_cpu or x.is_meta)}
    return list(found)


RNGStates = list[Tensor]


def get_rng_states(devices: list[torch.device]) -> RNGStates:
    """The states of the CPU's default generator and of each device's."""
    states = [torch.get_rng_state()]
    for device in devices:
        module = torch.get_device_module(device)
        # torch.mps has one device, and takes none.
        states.append(module.get_rng_state(*[] if device.type == "mps" else [device]))
    return states


def set_rng_states(devices: list[torch.device], states: RNGStates) -> None:
    """Puts back what :func:`get_rng_states` returned for the same devices."""
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        module = torch.get_device_module(device)
        module.set_rng_state(state, *[] if device.type == "mps" else [device])


def same_rng_states(one: RNGStates, other: RNGStates) -> bool:
    """Whether no number was drawn in between."""
    if torch._C._len_torch_dispatch_stack():  # a mode of fake tensors compares none
        with _disable_current_modes():
            return same_rng_states(one, other)
    return len(one) == len(other) and all(map(torch.equal, one, other))
