"""The law that inverse leaves no trace, and what traces there are."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._support.generators import accelerators, get_rng_states
from ..module import InvertibleModule
from ..state import Context, State, tensors
from .states import named_tensors, same
from .subject import Subject

# What the law looks at by itself, and the plans that plan_for keeps in a composition.
REGISTERED = (
    *("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    "_plans",
)
# How the contents of a generator are read, other than torch's default ones.
GENERATORS: dict[type, Callable[[Any], Any]] = {
    torch.Generator: lambda generator: generator.get_state(),
    random.Random: lambda generator: generator.getstate(),
    np.random.Generator: lambda generator: generator.bit_generator.state,
    np.random.RandomState: lambda generator: generator.get_state(),
}


def no_trace(subject: Subject) -> None:
    """Compares all that inverse could change, with grad and without."""
    _require_modes_kept(subject)
    changed: list[str] = []

    def look(layer: InvertibleModule, y: State, context: Context) -> None:
        _give_gradients(layer)
        devices = accelerators((y, context))
        before = _everything(layer, devices)
        run.direction.apply(layer, y, context)
        after = _everything(layer, devices)
        changed.extend(what for what in after if not alike(after[what], before.get(what)))
        changed.extend(what for what in before if what not in after)

    for run in subject.runs:
        if not run.direction.inverted:
            continue
        for with_grad in subject.grad_modes:
            with torch.set_grad_enabled(with_grad):
                subject.evaluate(look, run.given)
            if changed:
                subject.fail(
                    f"{run.name} changed {', '.join(changed)}. Evaluate sub-networks in inverse "
                    "with invertible.no_trace, in the mode that they are in, and keep nothing."
                )
    if subject.differentiable:
        _require_no_graph(subject)


def _give_gradients(layer: InvertibleModule) -> None:
    """Gradients as an optimizer has them, which are put back when the layer has run."""
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            parameter.grad = torch.full_like(parameter, 0.5)


def _require_modes_kept(subject: Subject) -> None:
    """Fails if forward switches between train and eval mode."""

    def look(layer: InvertibleModule, x: State, context: Context) -> list[str]:
        before = {part: part.training for part in layer.modules()}
        run.direction.apply(layer, x, context)
        names = {part: name or "the layer" for name, part in layer.named_modules()}
        return [names[part] for part, training in before.items() if part.training != training]

    for run in subject.runs:
        if not run.direction.inverted:
            with torch.no_grad():
                changed = subject.evaluate(look, run.given)
            if changed:
                subject.fail(f"{run.name} changed the mode of {', '.join(changed)}.")


def _everything(layer: InvertibleModule, devices: list[torch.device]) -> dict[str, Any]:
    """What inverse must not change, by name. Attributes of sub-networks are their own affair."""
    found: dict[str, Any] = {name: frozen(value) for name, value in named_tensors(layer)}
    for name, parameter in layer.named_parameters():
        found[f"requires_grad of {name}"] = parameter.requires_grad
        found[f"the gradient of {name}"] = frozen(parameter.grad)
    for name, part in layer.named_modules():
        found[f"the mode of {name or 'the layer'}"] = part.training
        if isinstance(part, InvertibleModule):
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}{key}": frozen(value) for key, value in _attributes(part).items()}
    found["the random generator"] = get_rng_states(devices)
    found["Python's random generator"] = random.getstate()
    found["NumPy's random generator"] = frozen(np.random.get_state())  # noqa: NPY002 - a layer may use it
    return found


def _require_no_graph(subject: Subject) -> None:
    """Fails if forward keeps activations in the layer, and their graph with them."""
    size = min(part.numel() for part in tensors((subject.x, subject.y)))

    def look(layer: InvertibleModule, x: State, context: Context) -> list[str]:
        forward(layer, x, context)
        return [
            f"{type(part).__name__}.{key}"
            for part in layer.modules()
            if isinstance(part, InvertibleModule)
            for key, value in _attributes(part).items()
            # A penalty kept for the loss is fine: it is a number.
            if any(
                kept.grad_fn is not None and kept.numel() >= max(size, 2) for kept in tensors(value)
            )
        ]

    forward = subject.runs[0].direction.apply
    given, context, _ = subject.sources(subject.x)
    with torch.enable_grad():
        kept = subject.evaluate(look, given, context)
    if kept:
        subject.fail(
            f"forward keeps activations and their graph in {', '.join(kept)}. Return them, or "
            "detach them."
        )


def _attributes(part: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module; what is declared a cache may be filled."""
    return {
        key: value
        for key, value in vars(part).items()
        if key != "_plans"  # kept for the next run, and no part of the layer's state
        if key not in REGISTERED and not isinstance(getattr(type(part), key, None), cached_property)
    }


def frozen(value: Any, depth: int = 4) -> Any:
    """What a value contains now: it stays so when the value is changed in place."""
    for kind, contents in GENERATORS.items():
        if isinstance(value, kind):
            return frozen(contents(value), depth)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, set):
        return set(value)
    if depth == 0 or isinstance(value, nn.Module | type) or callable(value):
        return value
    if isinstance(value, list | tuple):
        return [frozen(part, depth - 1) for part in value]
    if isinstance(value, dict):
        return {key: frozen(part, depth - 1) for key, part in value.items()}
    return frozen(vars(value), depth - 1) if hasattr(value, "__dict__") else value


def alike(one: Any, other: Any) -> bool:
    """Whether two frozen values are equal, NaN being so to itself."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return same(one, other)
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and one.tobytes() == other.tobytes())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return bool(one == other)
