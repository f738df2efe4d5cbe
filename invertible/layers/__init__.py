"""The layers, a file a family.

Imported by nothing in the package but its ``__init__``. Most import ``module``, ``state`` and
``_support`` only; those that round ``exact``, and couplings the engine and :class:`Composite`.
"""

from .channel_pairs import PairRotation, PairScaling
from .coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    ReversibleBlock,
    SplineCoupling,
)
from .maps import Affine, ElementwiseMap, ScaledShift, Shift
from .padding import InjectivePad
from .permutation import Permute
from .pixel_shuffle import PixelShuffle, PixelUnshuffle
from .shapes import Flatten, Identity, Reshape
from .spline import RationalQuadraticSpline
from .streams import Merge, Split, Swap
from .wavelet import HaarWavelet

__all__ = [
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Coupling",
    "ElementwiseMap",
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
    "RationalQuadraticSpline",
    "Reshape",
    "ReversibleBlock",
    "ScaledShift",
    "Shift",
    "SplineCoupling",
    "Split",
    "Swap",
]
