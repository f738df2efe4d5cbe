"""A composition taken apart into the layers that it runs, in running order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .._support.survey import Survey, survey
from ..direction import Direction, method_of
from ..exact.composed import composed
from ..exact.grid import Grid
from ..exact.quantize import Quantize
from ..module import InvertibleModule, Member
from ..state import Context
from .settings import Rebuild


@dataclass(slots=True, eq=False)
class Step:
    """A layer that is run, and how; what is asked of a layer in every run is found once."""

    layer: InvertibleModule
    direction: Direction
    name: str  # its place in the composition, as get_submodule takes it
    rebuild: Rebuild | None  # how its activations are rebuilt; None stores them
    stores_input: bool  # whether the state that enters it is stored
    is_whole: bool  # whether it is a composition that is called as a whole
    untraced: bool  # a forward within an inverse, which must leave no trace
    grid: Grid | None  # the range that its output is checked against, if any
    survey: Survey | None  # what it consists of, if it is rebuilt
    has_hooks: bool = field(init=False)  # which run around the layer, and are not rebuilt
    conditional: bool = field(init=False)
    moves_only: bool = field(init=False)
    is_ours: bool = field(init=False)  # whose results need no check
    hands_through: bool = field(init=False)  # whose results are the tensors that it was given
    _method: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        layer = self.layer
        self.conditional, self.moves_only = layer.conditional, layer.moves_only
        method = method_of(self.direction)
        hooked = has_hooks(layer) and not self.direction.inverted
        compiled = layer._compiled_call_impl is not None and not self.direction.inverted
        replaced = replaced_methods(layer)
        rebuilt = self.rebuild is not None and not self.is_whole
        self.has_hooks = (
            rebuilt and hooked and method == "forward" and not compiled and not self.untraced
        )
        # A call goes through hooks, and through what torch.compile made of the layer; where there
        # is nothing of the kind, it costs a few microseconds.
        called = method == "forward" and (hooked or compiled) and not self.has_hooks
        self._method = layer if called else getattr(layer, method)
        if rebuilt and (compiled or replaced or (hooked and not self.has_hooks)):
            # Its inverse knows nothing of that, so that it runs again as it ran.
            self.stores_input, self.moves_only = True, False
        self.is_ours = type(layer).__module__.startswith("invertible.") and not (
            hooked or compiled or replaced
        )
        self.hands_through = self.is_ours and layer._hands_through and not self.stores_input

    @property
    def place(self) -> str:
        return f"layer {self.name} ({type(self.layer).__name__})"

    def apply(self, state: Any, context: Context) -> tuple[Any, Tensor | None]:
        """Runs the layer; the log-determinant is None unless it is asked for."""
        result = self._method(state, context) if self.conditional else self._method(state)
        return result if self.direction.log_det else (result, None)

    def undo(self, state: Any, context: Context) -> Any:
        """Runs the layer the other way, without hooks."""
        layer: Any = self.layer
        method = layer.forward if self.direction.inverted else layer.inverse
        return method(state, context) if self.conditional else method(state)


class Branches(NamedTuple):
    """Steps for some streams of a state each; the other streams wait."""

    owner: str  # the class of the composition
    name: str  # and its place, as that of a step
    stream_count: int | None  # how many streams the state must have
    members: list[tuple[Member, Steps]]


Steps = list[Step | Branches]


class Plan:
    """A module taken apart, through all compositions in it.

    Inner ones with hooks, or with a ``forward`` of their own, stay whole.

    Args:
        module: A composition, or a layer by itself.
        direction: Which of its methods runs.
        rebuilds: Whether activations can be rebuilt, here and now.
        asked: How a call around the module asks for that; ``checkpoint`` of a composition, also of
            the module itself, says more.
    """

    def __init__(
        self,
        module: InvertibleModule,
        direction: Direction,
        rebuilds: bool = False,
        asked: Rebuild | None = None,
    ) -> None:
        self.composed = composed(module)
        self.layers: list[InvertibleModule] = []  # of all steps, in running order
        self.rebuilds = False  # whether any activations are to be rebuilt
        self.appends_constants = False  # whether a layer may, as one that is only injective does
        self._can_rebuild = rebuilds
        self._inverted = direction.inverted
        self._ways = Direction(False, direction.log_det), Direction(True, direction.log_det)
        scope = _Scope(asked) if rebuilds and asked else None
        members = module.members()
        self.steps: Steps = (
            [self._step(module, direction.inverted, "0", scope, None)]
            if members is None
            else self._take_apart(module, members, direction.inverted, "", scope, None)
        )

    def _take_apart(
        self,
        module: InvertibleModule,
        members: Sequence[Member],
        inverted: bool,
        name: str,
        scope: _Scope | None,
        grid: Grid | None,
    ) -> Steps:
        if self._can_rebuild:
            scope = _Scope.of(getattr(module, "checkpoint", False), scope)
        if getattr(module, "check_layers", False) and module.quantum is not None:
            grid = Grid(module.quantum)
        if not members:
            raise ValueError(f"{type(module).__name__} has no layers to run: append some first.")
        found: Steps = []
        branches: Branches | None = None
        for member in reversed(members) if inverted else members:
            _, layer, is_turned, streams = member
            way = inverted is not is_turned
            place = f"{name}.{member.name}" if name else member.name
            inner_members = layer.members()
            if inner_members is None or not self._runs_members(layer, way):
                steps: Steps = [self._step(layer, way, place, scope, grid)]
            else:
                steps = self._take_apart(layer, inner_members, way, place, scope, grid)
            if streams is None:
                found += steps
                branches = None
            else:
                if branches is None:
                    count = getattr(module, "stream_count", None)
                    branches = Branches(type(module).__name__, name, count, [])
                    found.append(branches)
                branches.members.append((member, steps))
        return found

    def _step(
        self,
        layer: InvertibleModule,
        inverted: bool,
        name: str,
        scope: _Scope | None,
        grid: Grid | None,
    ) -> Step:
        self.appends_constants |= not (inverted or layer.surjective)
        is_whole = layer.members() is not None
        untraced = self._inverted and not inverted
        rebuild, stores_input, found = None, False, None
        if scope is not None:
            stores_input = scope.is_anchor() or layer.stores_input or self._loses(layer, inverted)
            rebuild, found = scope.rebuild, None if is_whole else survey(layer)
            self.rebuilds = True
            if found and found.is_lazy:  # its first run makes parameters, and may draw them
                rebuild = None
        self.layers.append(layer)
        way = self._ways[inverted]
        return Step(layer, way, name, rebuild, stores_input, is_whole, untraced, grid, found)

    def _loses(self, layer: InvertibleModule, inverted: bool) -> bool:
        """Whether a layer throws away what is needed to rebuild it, or those before it."""
        if layer.surjective if inverted else layer.injective:
            return False
        if isinstance(layer, Quantize):
            if self.composed.grid is not None:
                return False  # it rounds at the entrance only
        elif not layer.moves_only:
            return True
        # By themselves these two need nothing.
        return not all(before.moves_only for before in self.layers)

    def _runs_members(self, composite: InvertibleModule, inverted: bool) -> bool:
        """Whether a composition's method does no more than run its members."""
        method = method_of(self._ways[inverted])
        if method in composite.__dict__:
            return False
        if not getattr(getattr(type(composite), method), "runs_members", False):
            return False
        return method != "forward" or not (
            has_hooks(composite) or composite._compiled_call_impl is not None
        )


@dataclass
class _Scope:
    """Layers that are rebuilt with the same settings, and how many there are so far."""

    rebuild: Rebuild
    count: int = 0

    @classmethod
    def of(cls, checkpoint: bool | Rebuild, around: _Scope | None) -> _Scope | None:
        """The scope of a composition's layers: settings of its own, or those around it."""
        if isinstance(checkpoint, Rebuild):
            return cls(checkpoint)
        return cls(Rebuild()) if checkpoint and around is None else around

    def is_anchor(self) -> bool:
        every, count = self.rebuild.anchor_every, self.count
        self.count += 1
        return every is not None and count % every == 0


F = TypeVar("F", bound=Callable[..., Any])


def runs_members(method: F) -> F:
    """Marks a method of a composition that does no more than run the members."""
    method.runs_members = True  # type: ignore[attr-defined]
    return method


_METHODS = ("forward", "inverse", "forward_and_log_det", "inverse_and_log_det")


def replaced_methods(layer: nn.Module) -> dict[str, Any]:
    """The methods that somebody replaced in a layer itself, as wrappers do."""
    own = layer.__dict__
    return {name: own[name] for name in _METHODS if name in own}


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
