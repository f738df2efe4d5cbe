"""How activations are rebuilt, and what it is called when they are not."""

from __future__ import annotations

from dataclasses import dataclass


class RebuildError(RuntimeError):
    """What the backward pass raises when activations could not be rebuilt as they were.

    The gradients that it has written until then are wrong.
    """


@dataclass(frozen=True)
class Rebuild:
    """Settings of reversible checkpointing: ``InvertibleSequential(..., checkpoint=Rebuild(...))``.

    Args:
        anchor_every: How many layers share one stored state, from which rebuilding starts afresh;
            by default only the output is stored.
        tolerance: How far what is rebuilt may be off, relative to its norm, before the backward
            pass raises; ``math.inf`` compares nothing. By default it depends on the coarsest
            dtype of states and activations in the run: 1e-6 for float64, 1e-3 for float32 (1e-2 on
            accelerators), 0.2 for float16 and bfloat16, also those of autocast.
        debug: Whether all that autograd saves is stored as well, and compared with what is
            rebuilt, to name the first operation that differed. Takes the memory that
            checkpointing saves, and time.

    Raises:
        ValueError: If ``anchor_every`` is less than 1, or ``tolerance`` negative or NaN.

    Example:
        >>> block = [AdditiveCoupling(nn.Linear(2, 2)), Swap()]
        >>> network = InvertibleSequential(
        ...     Split(), *(8 * block), Merge(), checkpoint=Rebuild(anchor_every=6)
        ... )
        >>> network(torch.randn(8, 4)).sum().backward()
    """

    anchor_every: int | None = None
    tolerance: float | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        if self.anchor_every is not None and self.anchor_every < 1:
            raise ValueError(f"Rebuild takes anchor_every of at least 1, got {self.anchor_every}.")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(
                f"Rebuild takes a tolerance of 0 or more, or math.inf, got {self.tolerance}."
            )
