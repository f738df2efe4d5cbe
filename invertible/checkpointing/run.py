"""Running a composition: what is asked for, and who does it."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._support.checks import check_contexts, expect_state
from ..direction import Direction
from ..exact.ranges import enter, leave
from ..module import InvertibleModule
from ..state import Context, State
from .follow import Follower, around
from .plan import Plan, Step
from .plans import plan_for
from .replay import is_inside_layer
from .settings import Rebuild


def run(
    module: InvertibleModule, direction: Direction, x: State, context: Context
) -> tuple[Any, list[Tensor]]:
    """Runs a composition, or a layer by itself, in one of its four ways.

    Activations are rebuilt where the composition asks for it, one in it, or a call around it.

    Returns:
        The state at the end, and the log-determinants of all layers if they are asked for.
    """
    asked = around.rebuild
    rebuilds = torch.is_grad_enabled() and not is_inside_layer()
    if rebuilds and (transform := _transform_around()):
        rebuilds = False
        if not torch.compiler.is_compiling() and Plan(module, direction, True, asked).rebuilds:
            _warn_of_storing(module, transform)
    rebuilds = rebuilds and torch._C._get_tracing_state() is None  # of torch.jit.trace
    if torch.compiler.is_dynamo_compiling() and Plan(module, direction, rebuilds, asked).rebuilds:
        if _COMPILES:
            from .graph import run_in_graph  # which takes a second to import

            return run_in_graph(_run_eagerly, module, direction, x, context, asked)
        eager: Any = torch.compiler.disable(_run_eagerly)  # type: ignore[no-untyped-call]
        return eager(module, direction, x, context, rebuilds, asked)  # type: ignore[no-any-return]
    return _run_eagerly(module, direction, x, context, rebuilds, asked)


# Older compilers can't trace what rebuilds.
_COMPILES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def _transform_around() -> str | None:
    """What runs around, if its autograd allows no hooks on saved tensors, or asks for others."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    return "forward-mode derivatives" if forward_ad._current_level >= 0 else None


_told: WeakSet[InvertibleModule] = WeakSet()


def _warn_of_storing(module: InvertibleModule, transform: str) -> None:
    if module not in _told:
        _told.add(module)
        warnings.warn(
            f"{type(module).__name__} can't rebuild activations under {transform}: it stores them, "
            "and reversible checkpointing saves no memory there. Results are right.",
            UserWarning,
            stacklevel=4,
        )


def _run_eagerly(
    module: InvertibleModule,
    direction: Direction,
    x: State,
    context: Context,
    rebuilds: bool,
    asked: Rebuild | None,
) -> tuple[Any, list[Tensor]]:
    plan = plan_for(module, direction, rebuilds, asked)
    check_contexts(module, plan.layers, context)
    if isinstance(plan.steps[0], Step):  # branches look for themselves
        expect_state(module, x, inverse=direction.inverted)
    exact = plan.composed.grid is not None
    # On a grid constants come back as they were.
    has_constants = not exact and (plan.appends_constants or around.has_constants)
    follower = Follower(module, context, exact, has_constants)
    y = follower.follow(plan.steps, enter(module, direction, x, plan.composed))
    return leave(module, direction, y, plan.composed), follower.log_dets
