"""Which order in memory a tensor keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .survey import survey

# Bytes. New tensors of the CPU begin at multiples of 64, those of CUDA at multiples of 512; no
# kernel looks at more, since 64 bytes are the widest vector and a line of the cache.
_ALIGNMENT = 64


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are the fastest dimension, as in ``torch.channels_last``.

    ``Tensor.is_contiguous`` says no for the channel slices that Split makes of such a tensor.
    """
    # One channel or one pixel lies in memory the same way in every format.
    if x.dim() not in (4, 5) or x.shape[1] == 1 or x.shape[2:].numel() == 1:
        return False
    return x.stride(1) < x.stride(-1)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format to give a tensor that is made from ``x`` and has as many dimensions."""
    if not is_channels_last(x):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """A result in the memory format of what it was made from."""
    if x.dim() not in (4, 5) or y.stride() == x.stride():
        return y
    return y.contiguous(memory_format=memory_format(x))


def canonical(x: Tensor, f: nn.Module) -> Tensor:
    """The input of a sub-network as it would lie in memory if it were new, in ``f``'s format.

    Convolutions, matrix products and batch statistics sum in an order that depends on the strides
    and on the address: on a view, such as Split makes, or in another memory format, the last bits
    are others. So neither may depend on where the stream comes from. The strides are those that
    suit the weights of ``f``, and the address is one that torch itself could have chosen.
    """
    chosen = torch.contiguous_format
    if x.dim() in (4, 5):
        weights = survey(f).parameters
        if any(is_channels_last(p) for p in weights if p.dim() == x.dim()):
            chosen = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    x = x.contiguous(memory_format=chosen)
    if not _is_aligned(x):
        x = x.clone()
    if 1 not in x.shape:
        return x
    # Strides of dimensions of size 1 mean nothing, but choose among algorithms.
    strides = torch.empty_like(x, memory_format=chosen, device="meta").stride()
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def _is_aligned(x: Tensor) -> bool:
    """Whether a tensor begins where a new one could; False where that isn't known."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    try:
        return x.data_ptr() % _ALIGNMENT == 0
    except RuntimeError:  # under torch.func, for instance
        return False


def with_strides(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same values under other strides.

    Convolutions and batch statistics sum in an order that depends on the strides, and compiled
    sub-networks have guards on them.
    """
    if x.stride() == stride:
        return x
    shape = x.shape
    # A dimension of stride 0 was expanded: it is copied once and expanded again.
    x = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)]
    moved = [
        old != new for size, old, new in zip(x.shape, x.stride(), stride, strict=True) if size > 1
    ]
    if any(moved):
        x = x.new_empty_strided(x.shape, stride).copy_(x)  # of the same subclass
    return x if x.shape == shape and x.stride() == stride else x.as_strided(shape, stride)
