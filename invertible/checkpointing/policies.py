"""What a layer keeps of its run, so that less of it runs again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from .._support.generators import may_draw
from .settings import ContextFn

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _flops_of_cpu_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]


# What counts the floating-point operations of an operation: torch's own, and one that it lacks.
_FLOPS: dict[Any, Callable[..., int]] = {
    **{op: count for op, count in flop_registry.items() if "backward" not in str(op)},
    _CPU_ATTENTION: _flops_of_cpu_attention,
}


def keep_matmuls(flops_per_value: float = 0) -> ContextFn:
    """Keeps the results of matrix products, convolutions and attention, which cost most.

    For ``context_fn`` of :class:`Rebuild`. The backward pass then computes only the rest again:
    norms, activation functions, and products that were not kept. What is kept is held from the
    forward pass on, so that memory grows with depth again, by less than if everything was stored.

    Each operation of a layer costs some microseconds of Python more, in both passes: small layers
    become slower instead. Results that draw random numbers, as attention with dropout does, are
    computed again. Kept results can't be changed in place, by ``ReLU(inplace=True)`` for example:
    the backward pass raises. Compiled sub-networks can't be looked into.

    Args:
        flops_per_value: The dial. A result is kept if it took at least so many floating-point
            operations for each of its numbers: twice the inner dimension of a matrix product,
            twice the channels times the kernel's size of a convolution, four times the number of
            keys for attention. At 0 all are kept, from some value on none.

    Returns:
        What to give to ``Rebuild(context_fn=...)``.

    Raises:
        ValueError: If ``flops_per_value`` is no number, negative or NaN.

    References:
        ``torch.utils.checkpoint.create_selective_checkpoint_contexts``, which this calls.

    Example:
        >>> def bottleneck():  # flops per value: 16, 36, 4
        ...     return nn.Sequential(
        ...         nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 8, 1)
        ...     )
        >>> blocks = [ReversibleBlock(bottleneck(), bottleneck()) for _ in range(2)]
        >>> network = InvertibleSequential(
        ...     Split(), *blocks, checkpoint=Rebuild(context_fn=keep_matmuls(10))
        ... )
        >>> y1, y2 = network(torch.randn(1, 16, 8, 8))
        >>> (y1 * y2).sum().backward()
    """
    if not (isinstance(flops_per_value, int | float) and flops_per_value >= 0):
        raise ValueError(f"keep_matmuls takes 0 or more flops_per_value, got {flops_per_value!r}.")
    return partial(create_selective_checkpoint_contexts, partial(_policy, flops_per_value))


def _policy(
    flops_per_value: float, context: Any, operation: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    packet = getattr(operation, "overloadpacket", None)
    count = _FLOPS.get(packet)
    if count is None or may_draw(operation, args, kwargs):
        return CheckpointPolicy.PREFER_RECOMPUTE
    if flops_per_value:
        result = context.op_output
        first: Tensor = result[0] if isinstance(result, tuple) else result
        if count(*args, **kwargs, out_val=result) < flops_per_value * first.numel():
            return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE
