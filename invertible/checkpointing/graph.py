"""Running a composition while ``torch.compile`` traces it, rebuilding within the compiled graph.

What can't be had there breaks the graph: an error under ``fullgraph=True``, and otherwise chain.py
does it, uncompiled. Imported by nobody before it is needed, since the compiler takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import skip_code

from .._support.checks import check_contexts, expect_state
from .._support.compiling import uncompiled
from ..direction import Direction
from ..module import InvertibleModule
from ..state import Context, State
from .follow import Follower, around
from .graph_chain import GraphChain, refuse
from .plan import Branches, Plan, Step, Steps
from .settings import Rebuild


def run_in_graph(
    eager: Callable[..., tuple[Any, list[Tensor]]],
    module: InvertibleModule,
    direction: Direction,
    x: State,
    context: Context,
    asked: Rebuild | None,
) -> tuple[Any, list[Tensor]]:
    """As ``run``, which calls it where there is something to rebuild; ``eager`` is not traced."""
    if not torch.compiler.is_dynamo_compiling():  # a break of the graph leads here
        found: tuple[Any, list[Tensor]] = uncompiled(eager)(
            module, direction, x, context, True, asked
        )
        return found
    plan = Plan(module, direction, True, asked)
    if plan.composed.grid is not None:
        refuse("it does not promise bits, as exact mode does")
    if plan.appends_constants or around.has_constants:
        refuse("constants that a layer appends may come back with rounding errors")
    check_contexts(module, plan.layers, context)
    if isinstance(plan.steps[0], Step):  # branches look for themselves
        expect_state(module, x, inverse=direction.inverted)
    follower = Follower(module, context, exact=False, has_constants=False)
    for is_rebuilt, steps in _groups(plan.steps):
        if is_rebuilt:
            x, log_dets = GraphChain(module, steps, context).run(x)
            follower.log_dets += log_dets
        else:
            x = follower.follow(steps, x)
    return x, follower.log_dets


# The frame that a break of the graph calls is not compiled by itself; traced within others it is.
skip_code(run_in_graph.__code__)


def _groups(steps: Steps) -> list[tuple[bool, Steps]]:
    """Steps in rows, each with whether it is rebuilt."""
    groups: list[tuple[bool, Steps]] = []
    for step in steps:
        is_rebuilt = _is_rebuilt(step)
        if not groups or groups[-1][0] is not is_rebuilt:
            groups.append((is_rebuilt, []))
        groups[-1][1].append(step)
    return groups


def _is_rebuilt(step: Step | Branches) -> bool:
    if isinstance(step, Branches):
        found = [_is_rebuilt(inner) for _, steps in step.members for inner in steps]
        if any(found) and not all(found):
            refuse(f"{step.owner} runs layers that are rebuilt beside such that are not")
        return all(found)
    if step.rebuild is None:
        return False
    if step.is_whole:
        refuse(f"{step.place} has a forward or hooks of its own")
    if step.has_hooks:
        refuse(f"{step.place} has hooks")
    if step.rebuild.debug or step.rebuild.context_fn is not None:
        refuse("Rebuild's debug and context_fn are for eager mode")
    return True
