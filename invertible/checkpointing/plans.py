"""Plans, kept from run to run for as long as a module stays what it is."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..direction import Direction
from ..module import InvertibleModule
from .plan import Plan, replaced_methods
from .settings import Rebuild


def plan_for(
    module: InvertibleModule, direction: Direction, rebuilds: bool, asked: Rebuild | None
) -> Plan:
    """A module's :class:`Plan`: the one of last time if nothing in the module was exchanged.

    Making one takes 14 us for a block of ten modules, and looking whether it still holds 4 us
    (in a loop on one core of an AMD EPYC; making took 56 between the kernels of a network).
    """
    # An export would find that the module changed.
    if torch.compiler.is_compiling() or module.members() is None:
        return Plan(module, direction, rebuilds, asked)
    key = direction, rebuilds, asked
    # In the module itself, which a plan may refer to: elsewhere they would keep each other alive.
    plans: dict[Any, tuple[_Makeup, Plan]] = module.__dict__.setdefault("_plans", {})
    found = plans.get(key)
    if found is not None and found[0].still_holds(module):
        return found[1]
    plan = Plan(module, direction, rebuilds, asked)
    plans.pop(key, None)
    if _Makeup.is_enough(module):
        plans[key] = _Makeup(module), plan
    return plan


class _Makeup:
    """What a plan depends on: modules, parameters, hooks and settings in a module."""

    __slots__ = (
        "_attributes",
        "_claims",
        "_compositions",
        "_hooks",
        "_kinds",
        "_module",
        "_own",
        "_parts",
        "_replaced",
        "_settings",
        "_sizes",
        "_users",
        "_values",
    )

    def __init__(self, module: InvertibleModule) -> None:
        self._module = ref(module)  # a replica has its dictionary, and other parts
        everything = list(module.modules())
        self._parts = everything[1:]
        self._kinds = list(map(type, self._parts))
        self._compositions = [part for part in self._parts if _is_composition(part)]
        self._own = [
            part.__dict__[name] for part in everything for name in ("_modules", "_parameters")
        ]
        self._values = _values(self._own)
        self._attributes = [part.__dict__ for part in self._parts]
        self._replaced = [
            (part.__dict__, replaced)
            for part in self._parts
            if isinstance(part, InvertibleModule) and (replaced := replaced_methods(part))
        ]
        self._hooks = [part.__dict__[name] for part in everything for name in _HOOKS]
        self._sizes = self._measure(module)
        self._users = [
            part
            for part in self._parts
            if isinstance(part, InvertibleModule)
            and not type(part).__module__.startswith("invertible.")
        ]
        self._claims = list(map(_claims, self._users))
        self._settings = _settings([module, *self._compositions])

    @staticmethod
    def is_enough(module: InvertibleModule) -> bool:
        """Whether the makeup tells all; users' compositions may list other members any time.

        Nor is anything kept for tensors that ``torch.func.functional_call`` lends a module.
        """
        return all(
            type(part).__module__.startswith("invertible.")
            for part in module.modules()
            if _is_composition(part)
        ) and all(isinstance(p, nn.Parameter) for p in module.parameters())

    def still_holds(self, module: InvertibleModule) -> bool:
        """Whether the module is as it was."""
        now = _values(self._own)
        return (
            self._module() is module
            and len(now) == len(self._values)
            and all(map(is_, now, self._values))
            and self._measure(module) == self._sizes
            and all(map(is_, map(type, self._parts), self._kinds))
            and all(
                own.get(name) is method
                for own, replaced in self._replaced
                for name, method in replaced.items()
            )
            and list(map(_claims, self._users)) == self._claims
            and _settings([module, *self._compositions]) == self._settings
        )

    def _measure(self, module: InvertibleModule) -> list[int]:
        # The module's own dictionary, in which this is, is not held: a cycle would outlive it.
        return [len(module.__dict__), *map(len, self._attributes), *map(len, self._hooks)]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _values(dictionaries: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dictionaries)))


def _is_composition(part: nn.Module) -> bool:
    return isinstance(part, InvertibleModule) and part.members() is not None


def _claims(layer: InvertibleModule) -> tuple[bool, bool, bool, bool, float | None]:
    """What a plan takes from a layer, and what only users' layers may change."""
    injective, surjective = layer.injective, layer.surjective
    return layer.conditional, layer.moves_only, injective, surjective, layer.quantum


def _settings(compositions: Iterable[nn.Module]) -> list[Any]:
    hooked = (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
    own = [
        [getattr(part, name, None) for name in ("checkpoint", "check_layers", "streams")]
        for part in compositions
    ]
    return [bool(hooked), *own]
