"""Which order in memory a tensor keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are the fastest dimension, as in ``torch.channels_last``.

    ``Tensor.is_contiguous`` says no for the channel slices that Split makes of such a tensor.
    """
    return x.dim() in (4, 5) and x.stride(1) < x.stride(-1)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format to give a tensor that is made from ``x`` and has as many dimensions."""
    if not is_channels_last(x):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
