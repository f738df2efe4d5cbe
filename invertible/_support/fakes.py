"""Running modules on tensors that have shapes and no values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from ..state import tensors

# Raised by tensors without values where something depends on values.
NEED_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)


def fake_mode() -> fake_tensor.FakeTensorMode:
    """A context in which tensors have no values, and its ``from_tensor`` makes them of others."""
    return fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)


def copy_with(make: Callable[[Tensor], Tensor], *values: Any) -> Any:
    """Deep copies of modules, optimizers and contexts, with the tensors that ``make`` makes."""
    memo: dict[int, Any] = {id(x): _copy(x, make) for x in _tensors_in(values)}
    return copy.deepcopy(values, memo)


def _tensors_in(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, nn.Module):
            yield from (*value.parameters(), *value.buffers())
        elif isinstance(value, torch.optim.Optimizer):
            yield from tensors(list(value.state.values()))
        else:
            yield from tensors(value)


def _copy(x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    copied = make(x.detach())
    if isinstance(x, nn.Parameter):
        return nn.Parameter(copied, x.requires_grad)
    return copied.requires_grad_(x.requires_grad)
