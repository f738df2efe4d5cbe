"""How activations are rebuilt, and what it is called when they are not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

# What makes a context for a layer's run, and one for when it runs again.
ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


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
        context_fn: As of :func:`torch.utils.checkpoint.checkpoint`: returns a context in which a
            layer runs, and one in which it runs again. The inversion runs outside of both. With
            those of ``torch.utils.checkpoint.create_selective_checkpoint_contexts``, as
            :func:`~invertible.keep_matmuls` makes them, results of chosen operations are stored
            and not computed again.

    Raises:
        TypeError: If ``context_fn`` can't be called.
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
    context_fn: ContextFn | None = None

    def __post_init__(self) -> None:
        if self.anchor_every is not None and self.anchor_every < 1:
            raise ValueError(f"Rebuild takes anchor_every of at least 1, got {self.anchor_every}.")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(
                f"Rebuild takes a tolerance of 0 or more, or math.inf, got {self.tolerance}."
            )
        if not (self.context_fn is None or callable(self.context_fn)):
            raise TypeError(
                "Rebuild takes a context_fn that returns two contexts, such as keep_matmuls(), got "
                f"{self.context_fn!r}."
            )

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """A context for a layer's run, and one for when it runs again."""
        if self.context_fn is None:
            return _nothing, _nothing
        found: Any = self.context_fn()
        if not (isinstance(found, tuple) and len(found) == 2 and all(map(_is_context, found))):
            raise TypeError(
                "Rebuild's context_fn must return two contexts, one for the run of a layer and one "
                f"for when it runs again, got {found!r}."
            )
        return found


def _is_context(x: Any) -> bool:
    return hasattr(x, "__enter__") and hasattr(x, "__exit__")


_nothing = nullcontext()
