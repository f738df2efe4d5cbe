"""Hooks of a layer that is rebuilt: they run around it, once, and are no part of its inverse."""

from __future__ import annotations

from threading import get_ident
from typing import Any

from torch import Tensor

from .._support.checks import expect_state
from .._support.no_trace import lock
from ..state import Context, State, streams_of, versions
from .chain import Chain
from .plan import Step


def record_within_hooks(chain: Chain, step: Step, state: State) -> tuple[Any, Tensor | None]:
    """Calls a layer with hooks, whose ``forward`` is what the chain records.

    What hooks compute is stored, as without a chain. Tensors that they exchange have numbers of
    their own: the chain stores those that no layer consumed, and nothing if they only look on.
    """
    layer = step.layer
    seen = _Versions(state)
    thread, forward = get_ident(), layer.forward

    def stand_in(x: Any, *context: Context) -> Any:
        is_others = get_ident() != thread
        if is_others or (context and not step.conditional):  # which fails, as it should
            return forward(x, *context)
        seen.require_unchanged(step)
        y, _ = chain.record(step, expect_state(layer, x), *context)
        seen.add(y)
        return y

    own = layer.__dict__
    before = own.get("forward")
    with lock:
        own["forward"] = stand_in
        try:
            result = layer(state, chain.context) if step.conditional else layer(state)
        finally:
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before
    seen.require_unchanged(step)
    return result, None


class _Versions:
    """The tensors between hooks and layer, and how often they were changed in place."""

    def __init__(self, state: State) -> None:
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []
        self.add(state)

    def add(self, state: State) -> None:
        self._tensors += streams_of(state)
        self._versions += versions(streams_of(state))

    def require_unchanged(self, step: Step) -> None:
        if versions(self._tensors) != self._versions:
            raise RuntimeError(
                f"a hook of {step.place} changed the layer's input or output in place, so that "
                "activations can't be rebuilt. Let it return new tensors."
            )
