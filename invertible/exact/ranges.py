"""Whether states are in the range in which sums on a grid are exact: checked around a run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._support.generators import accelerators
from ..direction import Direction
from ..module import InvertibleModule
from ..state import State, map_streams, streams_of
from .grid import Grid


def check_entrance(
    module: InvertibleModule, direction: Direction, state: State, grid: Grid
) -> None:
    """Raises when an exact composition is given a state that it can't give back."""
    if module._puts_on_grid and not direction.inverted:
        return
    # Going backward, a state beside the grid is a wish, such as features that were edited.
    name = f"the input of {type(module).__name__}"
    check_range(name, state, grid, on_grid=not direction.inverted)


def check_exit(module: InvertibleModule, direction: Direction, state: State, grid: Grid) -> State:
    """The state at the end of an exact composition, if it is within the range."""
    end = "inverse" if direction.inverted else "output"
    name = f"the {end} of {type(module).__name__} (check_layers=True finds the layer)"
    return stay_in_range(name, state, grid)


def stay_in_range(name: str, state: State, grid: Grid) -> State:
    """The state, if sums on it are exact; raises otherwise.

    Training on an accelerator is not made to wait for the answer: there the state becomes NaN.
    """
    if not (torch.is_grad_enabled() and accelerators(state)):
        check_range(name, state, grid, on_grid=False)
        return state

    def within(x: Tensor) -> Tensor:
        if not x.numel():
            return x
        return x.where(_magnitude(x.detach()) < grid.limit(x.dtype), math.nan)

    return map_streams(within, state)


def check_range(name: str, state: State, grid: Grid, *, on_grid: bool) -> None:
    """Raises when a state has left the range in which sums are exact, or is not on the grid.

    Waits for the device once.
    """
    # Another dtype is refused by the layers, with advice.
    streams = [x.detach() for x in streams_of(state) if x.numel() and x.is_floating_point()]
    if not streams or torch._C._are_functorch_transforms_active() or _is_exporting():
        return
    limit = grid.limit(streams[0].dtype)
    findings = [_magnitude(x) for x in streams]
    if on_grid:
        findings += [grid.distance(x) for x in streams]
    found = torch.stack(findings).tolist()
    largest = max(found[: len(streams)], key=lambda size: (size != size, size))
    if not largest < limit:
        raise ValueError(_out_of_range(name, largest, grid, limit, streams[0].dtype))
    if any(found[len(streams) :]):
        raise ValueError(
            f"{name} is not on the grid of multiples of {grid}, off by up to "
            f"{max(found[len(streams) :]):.3g}, and would not be rebuilt bit for bit. Put "
            f"Quantize({grid}) first."
        )


def _is_exporting() -> bool:
    """Whether torch.export is at work: an exported program can't raise on what it finds."""
    # Torch has the function since 2.7.
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def _magnitude(x: Tensor) -> Tensor:
    """The largest absolute value; NaN if there is one."""
    low, high = x.aminmax()  # ten times faster on the CPU than torch.linalg.vector_norm
    return torch.maximum(-low, high)


def _out_of_range(name: str, largest: float, grid: Grid, limit: float, dtype: torch.dtype) -> str:
    where = f"{name} reached {largest:g}"
    if not math.isfinite(largest):
        return f"{where}: the network has diverged, or its input is not finite."
    # With room to grow to twice the size.
    enough = Grid(grid.quantum * 2.0 ** (math.floor(math.log2(largest / limit)) + 2))
    return (
        f"{where}, and with quantum {grid} sums are exact only below {limit:g} in {dtype}. Take "
        f"quantum={enough} or larger, or a float64 state."
    )
