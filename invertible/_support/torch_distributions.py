"""Distributions and transforms of torch, which are no modules, with tensors that move with one."""

from __future__ import annotations

import copy
from typing import Any, Generic, Self, TypeVar
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from typing_extensions import override

Held = TypeVar("Held", Distribution, Transform)


class WithBuffers(nn.Module, Generic[Held]):
    """Holds a distribution or a transform, whose tensors are buffers.

    Raises:
        ValueError: If tensors are to be learned, or there are modules in it.
    """

    def __init__(self, owner: str, held: Held) -> None:
        super().__init__()
        # Copies: those given may be shared with others, or be expanded and take no state_dict.
        done: dict[int, Any] = {
            id(tensor): tensor.clone(memory_format=torch.contiguous_format)
            for tensor in _tensors_of(held, f"{owner} got a {type(held).__name__}")
        }
        self._template_tensors: list[Tensor] = list(done.values())
        self._template: Any = _rebuilt(held, done)
        for number, tensor in enumerate(self._template_tensors):
            self.register_buffer(f"tensor_{number}", tensor)

    @property
    def current(self) -> Held:
        """It, of the buffers as they are now.

        Made anew each time, since distributions keep what they once derived from their tensors.
        """
        pairs = zip(self._template_tensors, self.buffers(), strict=True)
        found: Held = _rebuilt(self._template, {id(then): now for then, now in pairs})
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Shares the template, of which torch's copies forget what an inverse is of."""
        twin = memo[id(self)] = object.__new__(type(self))
        for name, value in vars(self).items():
            shared = name.startswith("_template")
            twin.__dict__[name] = value if shared else copy.deepcopy(value, memo)
        return twin

    @override
    def extra_repr(self) -> str:
        return repr(self._template)


def _tensors_of(held: Any, who: str) -> list[Tensor]:
    """The tensors that something is made of, each once."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting = [held]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise ValueError(
                    f"{who} made of tensors that require grad, which it would not learn: they are "
                    "no parameters of a module."
                )
            found[id(value)] = value
        elif isinstance(value, nn.Module):
            raise ValueError(
                f"{who} with a module in it ({type(value).__name__}), whose parameters it would "
                "not have."
            )
        else:
            waiting += _parts(value)
    return list(found.values())


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Distribution | Transform):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _rebuilt(value: Any, done: dict[int, Any]) -> Any:
    """A copy made of other tensors; ``done`` by id. torch's own forgets what is inverted."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, Distribution | Transform):
        twin = done[id(value)] = object.__new__(type(value))
        for name, part in vars(value).items():
            forgotten = isinstance(part, ReferenceType)  # to the inverse of a transform
            twin.__dict__[name] = None if forgotten else _rebuilt(part, done)
        return twin
    if isinstance(value, dict):
        return {name: _rebuilt(part, done) for name, part in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_rebuilt(part, done) for part in value)
    return value
