"""Building blocks for invertible networks in PyTorch."""

from . import layers, testing
from .layers import (
    AdditiveCoupling,
    Flatten,
    InjectivePad,
    Merge,
    Parallel,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    Reshape,
    Split,
    Swap,
)
from .module import Inverse, InvertibleModule, Pair, State
from .sequential import InvertibleSequential
from .trace import no_trace

__version__ = "0.1.0"

__all__ = [
    "AdditiveCoupling",
    "Flatten",
    "InjectivePad",
    "Inverse",
    "InvertibleModule",
    "InvertibleSequential",
    "Merge",
    "Pair",
    "Parallel",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "Reshape",
    "Split",
    "State",
    "Swap",
    "layers",
    "no_trace",
    "testing",
]
