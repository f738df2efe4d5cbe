"""Building blocks for invertible networks in PyTorch."""

from . import layers, testing
from .checkpoint import reversible_checkpoint
from .drift import Drift, LayerDrift, measure_drift
from .layers import (
    AdditiveCoupling,
    Flatten,
    HaarWavelet,
    InjectivePad,
    Merge,
    PairRotation,
    PairScaling,
    Parallel,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    Quantize,
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
    "HaarWavelet",
    "InjectivePad",
    "Inverse",
    "InvertibleModule",
    "InvertibleSequential",
    "LayerDrift",
    "Merge",
    "Pair",
    "PairRotation",
    "PairScaling",
    "Parallel",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "Quantize",
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
