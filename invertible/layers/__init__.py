"""The layers, a file a family."""

from .channel_pairs import PairRotation, PairScaling
from .coupling import AdditiveCoupling, ReversibleBlock
from .padding import InjectivePad
from .permutation import Permute
from .pixel_shuffle import PixelShuffle, PixelUnshuffle
from .shapes import Flatten, Identity, Reshape
from .streams import Merge, Split, Swap
from .wavelet import HaarWavelet

__all__ = [
    "AdditiveCoupling",
    "Flatten",
    "HaarWavelet",
    "Identity",
    "InjectivePad",
    "Merge",
    "PairRotation",
    "PairScaling",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "Reshape",
    "ReversibleBlock",
    "Split",
    "Swap",
]
