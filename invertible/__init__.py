"""Building blocks for invertible networks in PyTorch."""

from . import layers, testing
from .checkpoint import reversible_checkpoint
from .drift import Drift, LayerDrift, measure_drift
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
    "Drift",
    "Flatten",
    "InjectivePad",
    "Inverse",
    "InvertibleModule",
    "InvertibleSequential",
    "LayerDrift",
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
    "measure_drift",
    "no_trace",
    "reversible_checkpoint",
    "testing",
]
