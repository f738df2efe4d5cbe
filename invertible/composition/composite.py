"""What compositions have in common: they are their members."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..checkpointing.plan import Plan, Step, Steps, runs_members
from ..checkpointing.run import run
from ..checkpointing.settings import Rebuild
from ..direction import Direction
from ..exact.composed import composed
from ..module import InvertibleModule, Member
from ..state import Context


class Composite(InvertibleModule):
    """A layer made of other layers: list them in :meth:`members`, and everything else follows.

    Both directions, log-determinants and all properties are those of the members together.
    Reversible checkpointing takes the layer apart as it does with :class:`InvertibleSequential`,
    so that its memory does not grow with the number of its members, however they are nested. For
    your own containers; a subclass that overrides ``forward`` is run as it says, and in one piece.

    Example:
        >>> class Twice(Composite):
        ...     def __init__(self, layer):
        ...         super().__init__()
        ...         self.layer = layer
        ...
        ...     def members(self):
        ...         return 2 * [Member("layer", self.layer)]
        >>> Twice(PixelUnshuffle(2))(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 48, 2, 2])
    """

    checkpoint: bool | Rebuild = False
    """Whether training rebuilds activations instead of storing them, and how."""
    check_layers: bool = False
    """Whether an exact composition checks the range behind every layer, and inside of some."""
    stream_count: int | None = None
    """How many streams the state must have where members take some each; None for any number."""

    @abstractmethod
    @override
    def members(self) -> Sequence[Member]:
        """The layers that ``forward`` runs, in this order; ``inverse`` runs them from the last."""

    @property
    @override
    def bijective(self) -> bool:
        return self.injective and self.surjective

    @property
    @override
    def injective(self) -> bool:
        return all(
            layer.surjective if inverted else layer.injective
            for _, layer, inverted, _ in self.members()
        )

    @property
    @override
    def surjective(self) -> bool:
        return all(
            layer.injective if inverted else layer.surjective
            for _, layer, inverted, _ in self.members()
        )

    @property
    @override
    def volume_preserving(self) -> bool:
        return all(member.layer.volume_preserving for member in self.members())

    @property
    @override
    def conditional(self) -> bool:
        return any(member.layer.conditional for member in self.members())

    @property
    @override
    def requires_context(self) -> bool:
        return any(member.layer.requires_context for member in self.members())

    @property
    @override
    def moves_only(self) -> bool:
        return all(member.layer.moves_only for member in self.members())

    @property
    @override
    def quantum(self) -> float | None:
        """The finest of the members' quanta; None if one has none, or all only move numbers.

        None as well if a :class:`Quantize` stands behind a layer with a finer quantum, whose digits
        it throws away.
        """
        grid = composed(self).grid
        return None if grid is None else grid.quantum

    @property
    def inexact_layers(self) -> dict[str, InvertibleModule]:
        """The layers that keep the composition from being exact, by name.

        They keep no grid, or are a :class:`Quantize` behind a layer with a finer quantum.
        """
        plan = Plan(self, Direction())
        return dict(_inexact(plan.steps, plan.composed.coarser))

    @runs_members
    @override
    def forward(self, x: Any, context: Context = None) -> Any:
        return run(self, Direction(), x, context)[0]

    @runs_members
    @override
    def inverse(self, y: Any, context: Context = None) -> Any:
        return run(self, Direction(inverted=True), y, context)[0]

    @runs_members
    @override
    def forward_and_log_det(self, x: Any, context: Context = None) -> tuple[Any, Tensor]:
        y, log_dets = run(self, Direction(log_det=True), x, context)
        return y, torch.stack(log_dets).sum(0)

    @runs_members
    @override
    def inverse_and_log_det(self, y: Any, context: Context = None) -> tuple[Any, Tensor]:
        x, log_dets = run(self, Direction(inverted=True, log_det=True), y, context)
        return x, torch.stack(log_dets).sum(0)


def _inexact(
    steps: Steps, coarser: Sequence[InvertibleModule]
) -> Iterator[tuple[str, InvertibleModule]]:
    for step in steps:
        if isinstance(step, Step):
            if not step.layer.exact or any(step.layer is layer for layer in coarser):
                yield step.name, step.layer
        else:
            for _, inner in step.members:
                yield from _inexact(inner, coarser)
