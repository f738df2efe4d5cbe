"""Building blocks for invertible networks in PyTorch."""

from . import testing
from ._support.no_trace import no_trace
from .checkpointing import Drift, LayerDrift, measure_drift, reversible_checkpoint
from .composition import Inverse, InvertibleSequential, Parallel
from .exact import Quantize
from .layers import (
    AdditiveCoupling,
    Flatten,
    HaarWavelet,
    Identity,
    InjectivePad,
    Merge,
    PairRotation,
    PairScaling,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    Reshape,
    Split,
    Swap,
)
from .module import InvertibleModule
from .state import Pair, State

__version__ = "0.1.0"

__all__ = [
    "AdditiveCoupling",
    "Drift",
    "Flatten",
    "HaarWavelet",
    "Identity",
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
    "measure_drift",
    "no_trace",
    "reversible_checkpoint",
    "testing",
]
