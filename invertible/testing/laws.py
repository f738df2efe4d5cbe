"""The laws that every layer keeps, each a function of the layer at one input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._support.generators import accelerators, get_rng_states, same_rng_states
from ..checkpointing.checkpoint import reversible_checkpoint
from ..composition.inverse import Inverse
from ..module import InvertibleModule, call, call_inverse
from ..state import State, tensors
from .log_determinant import log_determinant
from .states import detached, formats, kinds, listed, named_tensors, same, shuffled, values
from .subject import Subject


def _state(subject: Subject) -> None:
    subject.inverse(subject.forward())


def _inverse_undoes_forward(subject: Subject) -> None:
    y = subject.forward()
    found = subject.inverse(y)
    subject.require_close("inverse undoes forward", found, subject.x, "inverse(forward(x))", y)


def _forward_undoes_inverse(subject: Subject) -> None:
    if not subject.layer.bijective:
        return
    y = subject.given_y if subject.given_y is not None else shuffled(subject.forward())
    x = subject.inverse(y)
    subject.require_close(
        "forward undoes inverse",
        subject.forward(x),
        y,
        "the layer calls itself bijective, and forward(inverse(y))",
        x,
    )


def _dtype_and_device(subject: Subject) -> None:
    y = subject.forward()
    expected = kinds(subject.x)
    for direction, state in (("forward", y), ("inverse", subject.inverse(y))):
        if not kinds(state) <= expected:
            subject.fail(
                "dtype and device",
                f"{direction} returned {listed(kinds(state))}, expected {listed(expected)}.",
            )


def _memory_format(subject: Subject) -> None:
    y = subject.forward()
    for direction, given, state in (
        ("forward", subject.x, y),
        ("inverse", y, subject.inverse(y)),
    ):
        for rank in (4, 5):
            expected, found = formats(given, rank), formats(state, rank)
            if len(expected) == 1 and None not in expected and not found <= {*expected, None}:
                subject.fail(
                    "memory format",
                    f"{direction} returned {listed(found)}, expected {listed(expected)}.",
                )


def _input_untouched(subject: Subject) -> None:
    y = subject.forward()
    for name, direction, state in (("forward", call, subject.x), ("inverse", call_inverse, y)):
        changed: list[str] = []

        def look(
            layer: InvertibleModule,
            state: State,
            context: Any,
            direction: Callable[..., Any] = direction,
            changed: list[str] = changed,
        ) -> None:
            given = {"its argument": state, "the context": context}
            before = {what: values(part) for what, part in given.items()}
            direction(layer, state, context)
            changed += [
                what for what, part in given.items() if not same(values(part), before[what])
            ]

        with torch.no_grad():
            subject.evaluate(look, state)
        if changed:
            subject.fail("input untouched", f"{name} changed {' and '.join(changed)} in place.")


def _no_trace(subject: Subject) -> None:
    changed: list[str] = []

    def look(layer: InvertibleModule, y: State, context: Any) -> None:
        devices = accelerators((y, context))
        rng = get_rng_states(devices)
        values = {name: value.clone() for name, value in named_tensors(layer)}
        modes = {name: part.training for name, part in layer.named_modules()}
        call_inverse(layer, y, context)
        changed.extend(
            name
            for name, value in named_tensors(layer)
            if name not in values or not same(value, values[name])
        )
        changed.extend(
            f"the mode of {name or 'the layer'}"
            for name, part in layer.named_modules()
            if part.training != modes.get(name)
        )
        if not same_rng_states(get_rng_states(devices), rng):
            changed.append("the random generator")

    y = subject.forward()
    with torch.no_grad():
        subject.evaluate(look, y)
    if changed:
        subject.fail(
            "no trace",
            f"inverse changed {', '.join(changed)}. Evaluate sub-networks in inverse with "
            "invertible.no_trace, in the mode that they are in.",
        )


def _differentiable(subject: Subject) -> None:
    if not subject.dtype.is_floating_point:
        return
    law = "differentiable"
    x = detached(subject.x, requires_grad=True)
    leaves = list(tensors(x))
    weights = _weights(leaves)
    with torch.enable_grad():
        back = list(tensors(subject.evaluate(call_inverse, subject.evaluate(call, x))))
        if not all(part.requires_grad for part in back):
            subject.fail(law, "no gradient flows through inverse(forward(x)).")
        gradients = torch.autograd.grad(back, leaves, weights, allow_unused=True)
    allowed = _gradient_tolerance(subject)
    for stream, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        of = f" stream {stream} of" if isinstance(x, tuple) else ""
        if gradient is None:
            subject.fail(law, f"no gradient reaches{of} the input through inverse(forward(x)).")
            continue
        error = ((gradient - weight).norm() / weight.norm().clamp_min(1e-30)).item()
        if not error <= allowed:
            subject.fail(
                law,
                f"the gradient of inverse(forward(x)) with respect to{of} the input is wrong by "
                f"{error:.3g} of its norm; allowed is {allowed:g}.",
            )


def _weights(parts: Sequence[Tensor]) -> list[Tensor]:
    """Random numbers in the shapes of some tensors, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(part.shape, generator=generator).to(part) for part in parts]


def _gradient_tolerance(subject: Subject) -> float:
    """Largest error of a gradient, relative to its norm."""
    return 1e-6 if subject.dtype == torch.float64 else 0.1


def _rebuilding(subject: Subject) -> None:
    if not subject.dtype.is_floating_point:
        return
    layer = subject.layer
    directions: list[tuple[str, InvertibleModule, State]] = [("forward", layer, subject.x)]
    if layer.bijective:
        directions.append(("inverse", Inverse(layer), subject.forward()))
    for name, module, state in directions:
        x = detached(state, requires_grad=True)
        try:
            with torch.enable_grad():
                found, expected = (
                    subject.evaluate(partial(_gradients, run, module, list(tensors(x))), x)
                    for run in (reversible_checkpoint, call)
                )
        except RuntimeError as error:
            subject.fail("rebuilding", f"{name} cannot be rebuilt: {error}")
        norm = max((gradient.norm().item() for gradient in expected.values()), default=0.0)
        allowed = _gradient_tolerance(subject) * norm
        for what, gradient in expected.items():
            difference = (found[what] - gradient).norm().item()
            if not difference <= allowed:
                subject.fail(
                    "rebuilding",
                    f"reversible checkpointing of {name} makes the gradient of {what} wrong by "
                    f"{difference:.3g}; allowed is {allowed:.3g}. Check rebuild_{name}.",
                )


def _gradients(
    run: Callable[..., Any],
    module: InvertibleModule,
    inputs: Sequence[Tensor],
    layer: InvertibleModule,
    state: State,
    context: Any,
) -> dict[str, Tensor]:
    """Gradients of a weighted sum of a module's output, by what they are of."""
    sources = {f"stream {number} of the input": part for number, part in enumerate(inputs)}
    sources |= {name: p for name, p in layer.named_parameters() if p.requires_grad}
    outputs = [part for part in tensors(run(module, state, context)) if part.requires_grad]
    gradients = torch.autograd.grad(
        outputs, list(sources.values()), _weights(outputs), materialize_grads=True
    )
    return dict(zip(sources, gradients, strict=True))


# In this order, the law that explains a violation best speaks first.
LAWS: dict[str, Callable[[Subject], None]] = {
    "state": _state,
    "dtype and device": _dtype_and_device,
    "input untouched": _input_untouched,
    "inverse undoes forward": _inverse_undoes_forward,
    "forward undoes inverse": _forward_undoes_inverse,
    "memory format": _memory_format,
    "no trace": _no_trace,
    "differentiable": _differentiable,
    "rebuilding": _rebuilding,
    "log-determinant": log_determinant,
}
