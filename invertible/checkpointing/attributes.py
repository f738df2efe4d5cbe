"""Tensors with a graph that sub-networks keep in attributes, as an auxiliary loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

from torch import nn

from ..state import tensors


@contextmanager
def kept_tensors(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts back the tensors with a graph that modules keep, and lists and dictionaries of such.

    Those of a layer that is run again would stand for those of the forward pass, keep the rebuilt
    activations alive, and lead to no parameter below the layer.
    """
    before = []
    for module in modules:
        attributes = module.__dict__
        values = {name: attributes[name] for name in attributes.keys() - _OWN}
        copies = [(x, x.copy()) for x in values.values() if isinstance(x, (list, dict))]
        before.append((attributes, values, copies))
    try:
        yield
    finally:
        for attributes, values, copies in before:
            _put_back(attributes, values)
            for container, content in copies:
                if not _are_same(container, content) and _holds_graph(container):
                    container.clear()
                    (container.extend if isinstance(container, list) else container.update)(content)


# What every module has; modules, parameters and buffers are looked after elsewhere.
_OWN = frozenset(nn.Module().__dict__)


def _are_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        one, other = [*one, *one.values()], [*other, *other.values()]
    return len(one) == len(other) and all(map(is_, one, other))


def _put_back(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    for name in attributes.keys() - _OWN:
        value = attributes[name]
        if name not in before:
            if _holds_graph(value):
                del attributes[name]
        elif value is not before[name] and _holds_graph(value):
            attributes[name] = before[name]


def _holds_graph(value: Any) -> bool:
    return any(x.grad_fn is not None for x in tensors(value))
