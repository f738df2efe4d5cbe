"""The layers, a file a family."""

from .coupling import AdditiveCoupling
from .padding import InjectivePad
from .parallel import Parallel
from .partition import Merge, Split
from .permutation import Permute, Swap
from .pixel_shuffle import PixelShuffle, PixelUnshuffle
from .reshape import Flatten, Reshape

__all__ = [
    "AdditiveCoupling",
    "Flatten",
    "InjectivePad",
    "Merge",
    "Parallel",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "Reshape",
    "Split",
    "Swap",
]
