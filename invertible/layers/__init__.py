"""The layers, a file a family.

Imported by nothing in the package but its ``__init__``. Most import ``module``, ``state`` and
``_support`` only; those that round ``exact``, and couplings the engine and :class:`Composite`.
"""

from .autoregressive import MaskedAutoregressive
from .channel_pairs import PairRotation, PairScaling
from .conditioners import MADE, CausalTransformer
from .coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    ReversibleBlock,
    SplineCoupling,
)
from .dynamics import Leapfrog, Momentum
from .elementwise import Elementwise
from .from_transform import FromTransform
from .interleaved import CheckerboardSplit, StripeSplit
from .linear import InvertibleLinear
from .logistic_mixture import LogisticMixture
from .maps import Affine, ElementwiseMap, ScaledShift, Shift
from .masked import Masked, Padded
from .noise import Augment, Dequantize
from .padding import InjectivePad
from .permutation import Permute
from .pixel_shuffle import PixelShuffle, PixelUnshuffle
from .scale import ActNorm, Scale
from .shapes import Flatten, Identity, Reshape
from .spline import RationalQuadraticSpline
from .squashing import Logit, Sigmoid, Softplus, Tanh
from .streams import FactorOut, Merge, Split, Swap
from .wavelet import HaarWavelet

__all__ = [
    "MADE",
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Augment",
    "CausalTransformer",
    "CheckerboardSplit",
    "Coupling",
    "Dequantize",
    "Elementwise",
    "ElementwiseMap",
    "FactorOut",
    "Flatten",
    "FromTransform",
    "HaarWavelet",
    "Identity",
    "InjectivePad",
    "InvertibleLinear",
    "Leapfrog",
    "LogisticMixture",
    "Logit",
    "Masked",
    "MaskedAutoregressive",
    "Merge",
    "Momentum",
    "Padded",
    "PairRotation",
    "PairScaling",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "RationalQuadraticSpline",
    "Reshape",
    "ReversibleBlock",
    "Scale",
    "ScaledShift",
    "Shift",
    "Sigmoid",
    "Softplus",
    "SplineCoupling",
    "Split",
    "StripeSplit",
    "Swap",
    "Tanh",
]
