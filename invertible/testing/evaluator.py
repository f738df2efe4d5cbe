"""Running a layer so that nothing is left of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from .._support.generators import accelerators, get_rng_states, same_rng_states
from .._support.no_trace import no_trace
from ..module import InvertibleModule
from ..state import Context
from .states import copied


class Evaluator:
    """Runs a layer on copies, always from the same random state, and puts back what it changes."""

    def __init__(self, layer: InvertibleModule) -> None:
        self.modules = list(layer.modules())
        self.places = [
            (place, dict(place))
            for part in self.modules
            for place in (part.__dict__, part._parameters, part._buffers, part._modules)
        ]
        self.parameters = [
            (parameter, parameter.detach().clone(), parameter.requires_grad, parameter.grad)
            for parameter in layer.parameters()
        ]
        self.draws = False

    def __call__(
        self, run: Callable[..., Any], layer: InvertibleModule, state: Any, context: Context
    ) -> Any:
        """``run(layer, state, context)``, where the layer may be a copy of the one that is kept."""
        devices = accelerators((state, context))
        try:
            with no_trace(layer, (state, context)):
                before = get_rng_states(devices)
                result = run(layer, copied(state), copied(context))
                self.draws |= not same_rng_states(before, get_rng_states(devices))
                return result
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for place, content in self.places:
            if place.keys() != content.keys():
                for name in place.keys() - content.keys():
                    del place[name]
            place.update(content)
        for parameter, value, requires_grad, grad in self.parameters:
            parameter.requires_grad_(requires_grad).grad = grad
            if not torch.equal(parameter, value):
                parameter.data.copy_(value)


def fresh_copy(layer: InvertibleModule) -> InvertibleModule | None:
    """A copy with the same parameters and buffers, if the layer can be copied."""
    kept = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    try:
        return copy.deepcopy(layer, kept)
    except Exception:  # a lock, or a tensor with a graph: whatever Python can't copy
        return None
