"""What conditional layers take besides the state, kept as it was when they took it."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from operator import is_
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..state import Context, version


class KeptContext:
    """A context whose lists, dicts and plain objects may change afterwards, but no tensor in it."""

    __slots__ = ("_tensors", "_value", "_versions")

    def __init__(self, context: Context) -> None:
        found: dict[int, Any] = {}
        self._value = _copy(context, found)
        self._tensors = [x for x in found.values() if isinstance(x, Tensor)]
        self._versions = [version(x) for x in self._tensors]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in it."""
        return self._tensors

    def again(self) -> Context:
        """The context for a layer that runs again, which may change lists and dicts in it.

        Raises:
            RuntimeError: If a tensor in it was changed in place.
        """
        if [version(x) for x in self._tensors] != self._versions:
            raise RuntimeError("the context was changed in place between forward and backward.")
        return _copy(self._value, {})


def _copy(value: Any, done: dict[int, Any], inside: bool = False) -> Any:
    """A value with other containers and the same tensors in them; ``done`` by id."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, tuple):
        parts = [_copy(part, done, inside) for part in value]
        if all(map(is_, parts, value)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Tensor) or not _is_container(value, inside):
        done[id(value)] = value
        if isinstance(value, nn.Module):
            done.update({id(x): x for x in (*value.parameters(), *value.buffers())})
        return value
    twin = done[id(value)] = copy.copy(value)
    inside = inside or _is_object(value)
    if isinstance(value, list | deque):
        for i, part in enumerate(value):
            twin[i] = _copy(part, done, inside)
    elif isinstance(value, dict):
        for name, part in value.items():
            dict.__setitem__(twin, name, _copy(part, done, inside))
    # Past __setattr__, which a class may have replaced, as frozen dataclasses do.
    for name, part in _attributes(value).items():
        object.__setattr__(twin, name, _copy(part, done, inside))
    return twin


def _is_container(value: Any, inside: bool) -> bool:
    if isinstance(value, list | dict | set | deque) or dataclasses.is_dataclass(value):
        return not isinstance(value, type)
    # What an object refers to may be all of a program.
    return not inside and _is_object(value)


def _is_object(value: Any) -> bool:
    """Whether something does no more than hold attributes, as far as one can see."""
    return (
        bool(getattr(value, "__dict__", None))
        and not hasattr(value, "__del__")
        and not isinstance(value, nn.Module | ModuleType | type)
        and not callable(value)
    )


def _attributes(value: Any) -> dict[str, Any]:
    found = dict(getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(value):  # which may have slots
        found |= {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if hasattr(value, field.name)
        }
    return found
