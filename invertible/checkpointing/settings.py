"""How activations are rebuilt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rebuild:
    """Settings of reversible checkpointing: ``InvertibleSequential(..., checkpoint=Rebuild(...))``.

    Args:
        anchor_every: How many layers share one stored state, from which rebuilding starts afresh;
            by default only the output is stored.

    Raises:
        ValueError: If ``anchor_every`` is less than 1.

    Example:
        >>> block = [AdditiveCoupling(nn.Linear(2, 2)), Swap()]
        >>> network = InvertibleSequential(
        ...     Split(), *(8 * block), Merge(), checkpoint=Rebuild(anchor_every=6)
        ... )
        >>> network(torch.randn(8, 4)).sum().backward()
    """

    anchor_every: int | None = None

    def __post_init__(self) -> None:
        if self.anchor_every is not None and self.anchor_every < 1:
            raise ValueError(f"Rebuild takes anchor_every of at least 1, got {self.anchor_every}.")
