"""The grid of multiples of a quantum, on which floating-point addition is exact."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .._support.generators import accelerators
from ..direction import Direction
from ..module import InvertibleModule
from ..state import tensors


class _Round(torch.autograd.Function):
    """Rounds to the grid; the gradient goes straight through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, quantum: float) -> Tensor:
        # A quantum is a power of two: neither product rounds.
        return (x * (1 / quantum)).round_().mul_(quantum)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def jvp(_: Any, tangent: Tensor, __: None) -> Tensor:
        return tangent.clone()


def round_to_grid(x: Tensor, quantum: float | None) -> Tensor:
    """Rounds to the nearest multiple of the quantum, halves to even; None rounds nothing."""
    return x if quantum is None else _Round.apply(x, quantum)  # type: ignore[no-untyped-call]


def check_quantum(layer: object, quantum: float | None) -> None:
    """Raises unless the quantum is a power of two."""
    if quantum is None:
        return
    if not (0 < quantum < math.inf) or math.frexp(quantum)[0] != 0.5:
        raise ValueError(
            f"{type(layer).__name__} takes a power of two as quantum, for instance 2**-16, got "
            f"{quantum!r}."
        )


def check_dtype(layer: object, x: Tensor) -> None:
    """Raises unless the state can hold a grid."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{type(layer).__name__} with a quantum takes a float32 or float64 state, got "
            f"{x.dtype}. Let only the sub-networks run in lower precision, under torch.autocast."
        )


def check_state(name: str, state: Any, quantum: float, *, on_grid: bool) -> None:
    """Raises when a state has left the range in which sums are exact, or is not on the grid.

    Waits for the device once.
    """
    parts = [x.detach() for x in tensors(state) if x.numel()]
    if not parts or torch._C._are_functorch_transforms_active() or _is_exporting():
        return
    limit = _limit(parts[0].dtype, quantum)
    findings = [_magnitude(x) for x in parts]
    if on_grid:
        findings += [(x - round_to_grid(x, quantum)).abs_().max() for x in parts]
    found = torch.stack(findings).tolist()
    largest = max(found[: len(parts)], key=lambda size: (size != size, size))
    if not largest < limit:
        raise ValueError(_out_of_range(name, largest, quantum, limit, parts[0].dtype))
    if any(found[len(parts) :]):
        raise ValueError(
            f"{name} is not on the grid of multiples of {_power(quantum)}, off by up to "
            f"{max(found[len(parts) :]):.3g}, and would not be rebuilt bit for bit. Put "
            f"Quantize({_power(quantum)}) first."
        )


def _is_exporting() -> bool:
    """Whether torch.export is at work: an exported program can't raise on what it finds."""
    # Torch has the function since 2.7.
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def stay_in_range(name: str, state: Any, quantum: float) -> Any:
    """The state, if sums on it are exact; raises otherwise.

    Training on an accelerator is not made to wait for the answer: there the state becomes NaN.
    """
    if not (torch.is_grad_enabled() and accelerators(state)):
        check_state(name, state, quantum, on_grid=False)
        return state
    if isinstance(state, tuple):
        return tuple(stay_in_range(name, part, quantum) for part in state)
    if not state.numel():
        return state
    within = _magnitude(state.detach()) < _limit(state.dtype, quantum)
    return state.where(within, math.nan)


def _limit(dtype: torch.dtype, quantum: float) -> float:
    return 2.0 ** (24 if dtype == torch.float32 else 53) * quantum


def _magnitude(x: Tensor) -> Tensor:
    """The largest absolute value; NaN if there is one."""
    low, high = x.aminmax()  # ten times faster on the CPU than torch.linalg.vector_norm
    return torch.maximum(-low, high)


def check_entrance(module: InvertibleModule, direction: Direction, state: Any) -> None:
    """Raises when an exact composition is given a state that it can't give back."""
    quantum = module.quantum
    if not _is_finite(quantum) or (module._puts_on_grid and not direction.inverted):
        return
    # Going backward, a state beside the grid is a wish, such as features that were edited.
    name = f"the input of {type(module).__name__}"
    check_state(name, state, quantum, on_grid=not direction.inverted)


def check_exit(module: InvertibleModule, direction: Direction, state: Any) -> Any:
    """The state at the end of an exact composition, if it is within the range."""
    quantum = module.quantum
    if not _is_finite(quantum):
        return state
    end = "inverse" if direction.inverted else "output"
    name = f"the {end} of {type(module).__name__} (check_layers=True finds the layer)"
    return stay_in_range(name, state, quantum)


def check_layer(module: InvertibleModule, place: str, state: Any) -> None:
    """Raises when a layer of an exact composition has left the range."""
    quantum = module.quantum
    if _is_finite(quantum):
        check_state(f"the output of {place}", state, quantum, on_grid=False)


def _is_finite(quantum: float | None) -> TypeGuard[float]:
    return quantum is not None and quantum < math.inf


def _out_of_range(
    name: str, largest: float, quantum: float, limit: float, dtype: torch.dtype
) -> str:
    where = f"{name} reached {largest:g}"
    if not math.isfinite(largest):
        return f"{where}: the network has diverged, or its input is not finite."
    # With room to grow to twice the size.
    enough = quantum * 2.0 ** (math.floor(math.log2(largest / limit)) + 2)
    return (
        f"{where}, and with quantum {_power(quantum)} sums are exact only below {limit:g} in "
        f"{dtype}. Take quantum={_power(enough)} or larger, or a float64 state."
    )


def _power(quantum: float) -> str:
    return f"2**{math.frexp(quantum)[1] - 1}"
