"""The random generators that a layer may draw from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from typing_extensions import override

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


def was_just_seeded(states: RNGStates) -> bool:
    """Whether ``torch.manual_seed`` was called, and nothing drawn since."""
    seeded = torch.Generator().manual_seed(torch.initial_seed()).get_state()
    return torch.equal(states[0], seeded)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of the first operation inside that draws from a default generator, before it does.

    The default generators belong to the process: whether their states changed says nothing of who
    drew, if other threads do. It costs several microseconds an operation.
    """

    # A composite operation may draw inside.
    supports_higher_order_operators = True

    def __init__(self, before_first: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before_first = before_first
        self.drew = False

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.drew and may_draw(func, args, kwargs):
            self.drew = True
            self._before_first()
        return func(*args, **kwargs)


def can_watch() -> bool:
    """Whether nothing else looks at operations, or traces them."""
    return not (torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling())


def may_draw(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation draws from a default generator."""
    if getattr(func, "namespace", None) not in ("aten", "prim", "prims"):
        return True  # somebody's own, which says nothing of it
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    arguments = func._schema.arguments
    given = {x.name: x.default_value for x in arguments if x.has_default_value()}
    given |= {x.name: value for x, value in zip(arguments, args, strict=False)} | kwargs
    generator = given.get("generator")
    if generator is not None and not _is_default(generator):
        return False
    # Attention, recurrent networks and RReLU draw if they are told to.
    chance = given.get("dropout_p", given.get("dropout", 1))
    return chance != 0 and given.get("training", given.get("train", True)) is not False


def _is_default(generator: torch.Generator) -> bool:
    return any(generator is x for x in (torch.default_generator, *torch.cuda.default_generators))


# Whether modules drew when they were called, by what else it may depend on.
_seen: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


def seen_to_draw(module: nn.Module, key: Any) -> bool | None:
    """Whether a module drew when it was watched; None if it never was."""
    found = _seen.get(module)
    return None if found is None else found.get(key)


def note_drawing(module: nn.Module, key: Any, drew: bool) -> None:
    """What :func:`seen_to_draw` says from now on."""
    _seen.setdefault(module, {})[key] = drew
