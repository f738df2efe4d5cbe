"""What ``torch.compile`` sees in code while it traces it: asked by code that is being traced.

Needs a second to import, since the compiler does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dynamo.comptime import comptime
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from .generators import may_draw


class _Look(NamedTuple):
    start: int  # how many operations the graph had
    watched: list[tuple[Tensor, int]]  # fake tensors, with their versions


# Looks that are being taken at graphs, each within the one before.
_looks: WeakKeyDictionary[torch.fx.Graph, list[_Look]] = WeakKeyDictionary()


def look() -> None:
    """Begins to look; :func:`stop_looking` ends it."""
    comptime(_look)


def watch(x: Tensor) -> None:  # noqa: ARG001, it is read from the frame
    """From here on a tensor must not be changed in place."""
    comptime(_watch)


def stop_looking(drawn: str, changed: str) -> None:  # noqa: ARG001, likewise
    """Breaks the graph, saying why, if anything was drawn or changed that was looked at."""
    comptime(_stop_looking)


@contextmanager
def without_drawing() -> Iterator[None]:
    """Breaks the graph if anything inside draws random numbers."""
    look()
    yield
    stop_looking("a graph can't put random generators back, as an inverse must", "")


def _look(ctx: Any) -> None:
    graph = ctx.graph()
    _looks.setdefault(graph, []).append(_Look(len(graph.nodes), []))


def _watch(ctx: Any) -> None:
    fake = ctx.get_local("x").as_fake()
    _looks[ctx.graph()][-1].watched.append((fake, fake._version))


def _stop_looking(ctx: Any) -> None:
    graph = ctx.graph()
    start, watched = _looks[graph].pop()
    why = ""
    if any(x._version != before for x, before in watched):
        why = ctx.get_local("changed").as_python_constant()
    elif any(map(_draws, [*graph.nodes][start:])):
        why = ctx.get_local("drawn").as_python_constant()
    if why:
        ctx.graph_break(why)


def _draws(node: torch.fx.Node) -> bool:
    """Whether an operation of a graph draws, or may: it is run once more on its fake inputs."""
    made = [x for x in tree_leaves(node.meta.get("example_value")) if isinstance(x, Tensor)]
    if not made or node.op not in ("call_function", "call_method"):
        return False
    watch = _Watch()  # type: ignore[no-untyped-call]
    try:
        args, kwargs = tree_map(_example, (node.args, node.kwargs))
        mode = made[0].fake_mode  # type: ignore[attr-defined]
        with mode.shape_env.ignore_fresh_unbacked_symbols(), torch.no_grad(), mode, watch:
            target: Any = node.target
            if node.op == "call_method":
                getattr(args[0], target)(*args[1:], **kwargs)
            else:
                target(*args, **kwargs)
    except Exception:
        return True  # who knows
    return watch.drew


def _example(x: Any) -> Any:
    return x.meta["example_value"] if isinstance(x, torch.fx.Node) else x


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    drew = False

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.drew = self.drew or may_draw(func, args, kwargs)
        return func(*args, **kwargs)
