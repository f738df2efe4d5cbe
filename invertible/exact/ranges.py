"""Whether states are in the range in which sums on a grid are exact: checked around a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._support.compiling import can_raise
from .._support.generators import accelerators
from ..direction import Direction
from ..module import InvertibleModule
from ..state import State, gathered, has_values, map_streams, streams_of
from .composed import Composed
from .grid import HOLDING, Grid, positive_zeros


def enter(
    module: InvertibleModule, direction: Direction, state: State, composed: Composed
) -> State:
    """The state as an exact composition takes it.

    What ``inverse`` is given beside the grid is rounded: a wish, such as features that were edited.

    Raises:
        ValueError: If it is one that the composition can't give back.
    """
    grid = composed.grid
    if grid is None or (composed.takes_any and not direction.inverted):
        return state
    name = f"the input of {type(module).__name__}"
    state = stay_in_range(name, state, grid, on_grid=not direction.inverted)
    put = grid.round if direction.inverted else positive_zeros
    return map_streams(lambda x: put(x) if x.dtype in HOLDING else x, state)


def leave(
    module: InvertibleModule, direction: Direction, state: State, composed: Composed
) -> State:
    """The state at the end of an exact composition, if it is within the range."""
    if composed.grid is None:
        return state
    end = "inverse" if direction.inverted else "output"
    name = f"the {end} of {type(module).__name__} (check_layers=True finds the layer)"
    return stay_in_range(name, state, composed.grid)


def stay_in_range(
    name: str,
    state: State,
    grid: Grid,
    *,
    on_grid: bool = False,
    waits: bool = False,
    of: State | None = None,
) -> State:
    """The state, if sums on it are exact; raises otherwise.

    What is being traced, compiled or transformed can't raise, and training on an accelerator is
    not made to wait for the answer unless ``waits`` is set: there the state becomes NaN. Another
    state than the one that is returned can be looked at: ``of``.
    """
    of = state if of is None else of
    if can_raise() and (waits or not (torch.is_grad_enabled() and accelerators(of))):
        check_range(name, of, grid, on_grid=on_grid)
        return state
    looked_at = _numbers(of)
    if not looked_at:
        return state
    fine = torch.stack([_is_exact(x, grid, on_grid) for x in looked_at]).all()
    return map_streams(lambda x: x.where(fine, math.nan) if x.dtype in HOLDING else x, state)


def check_range(name: str, state: State, grid: Grid, *, on_grid: bool) -> None:
    """Raises when a state has left the range in which sums are exact, or is not on the grid.

    Waits for the device once.
    """
    streams = _numbers(state)
    if not streams or not has_values(state):
        return
    findings = [_magnitude(x) for x in streams]
    if on_grid:
        findings += [grid.distance(x) for x in streams]
    found = gathered(torch.stack(findings)).tolist()
    largest = max(found[: len(streams)], key=lambda size: (size != size, size))
    if not largest < grid.limit(streams[0].dtype):
        raise ValueError(_out_of_range(name, largest, grid, streams[0].dtype))
    if any(found[len(streams) :]):
        raise ValueError(
            f"{name} is not on the grid of multiples of {grid}, off by up to "
            f"{max(found[len(streams) :]):.3g}, and would not be rebuilt bit for bit. Put "
            f"Quantize({grid}) first."
        )


def _numbers(state: State) -> Sequence[Tensor]:
    """The streams to look at; those of another dtype are refused by the layers, with advice."""
    return [x.detach() for x in streams_of(state) if x.numel() and x.dtype in HOLDING]


def _is_exact(x: Tensor, grid: Grid, on_grid: bool) -> Tensor:
    fine = _magnitude(x) < grid.limit(x.dtype)
    return fine & (grid.distance(x) == 0) if on_grid else fine


def _magnitude(x: Tensor) -> Tensor:
    """The largest absolute value; NaN if there is one."""
    low, high = x.aminmax()  # ten times faster on the CPU than torch.linalg.vector_norm
    return torch.maximum(-low, high)


def _out_of_range(name: str, largest: float, grid: Grid, dtype: torch.dtype) -> str:
    where, limit = f"{name} reached {largest:g}", grid.limit(dtype)
    if not math.isfinite(largest):
        return f"{where}: the network has diverged, or its input is not finite."
    # With room to grow to twice the size.
    enough = Grid(grid.quantum * 2.0 ** (math.floor(math.log2(largest / limit)) + 2))
    return (
        f"{where}, and with quantum {grid} sums are exact only below {limit:g} in {dtype}. Take "
        f"quantum={enough} or larger, or a float64 state."
    )
