"""The layers, a file a family."""

from .coupling import AdditiveCoupling
from .padding import InjectivePad
from .parallel import Parallel
from .partition import Merge, Split
from .permutation import Permute, Swap
from .pixel_shuffle import PixelShuffle, PixelUnshuffle
from .quantize import Quantize
from .reshape import Flatten, Reshape
from .shear import PairRotation, PairScaling
from .wavelet import HaarWavelet

__all__ = [
    "AdditiveCoupling",
    "Flatten",
    "HaarWavelet",
    "InjectivePad",
    "Merge",
    "PairRotation",
    "PairScaling",
    "Parallel",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "Quantize",
    "Reshape",
    "Split",
    "Swap",
]
