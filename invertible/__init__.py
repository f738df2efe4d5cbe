"""Building blocks for invertible networks in PyTorch.

A name is public if it stands here in ``__all__``, and is imported from here. What is inside
imports only what is below it, from the bottom: ``state``, ``_support``, ``module`` (the contract of
a layer), ``direction``, ``exact``, ``checkpointing`` (the engine), ``composition``, ``layers``,
``testing``.
"""

from . import testing
from ._support.no_trace import no_trace
from .checkpointing import (
    Drift,
    LayerDrift,
    NearConstant,
    Rebuild,
    RebuildError,
    Replay,
    is_rebuilding,
    measure_drift,
    reversible_checkpoint,
)
from .composition import Composite, Inverse, InvertibleSequential, OnStreams, Parallel
from .exact import Quantize
from .layers import (
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    Coupling,
    ElementwiseMap,
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
    RationalQuadraticSpline,
    Reshape,
    ReversibleBlock,
    ScaledShift,
    Shift,
    SplineCoupling,
    Split,
    Swap,
)
from .module import InvertibleModule, Member
from .state import Pair, State

__version__ = "0.1.0"

__all__ = [
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Composite",
    "Coupling",
    "Drift",
    "ElementwiseMap",
    "Flatten",
    "HaarWavelet",
    "Identity",
    "InjectivePad",
    "Inverse",
    "InvertibleModule",
    "InvertibleSequential",
    "LayerDrift",
    "Member",
    "Merge",
    "NearConstant",
    "OnStreams",
    "Pair",
    "PairRotation",
    "PairScaling",
    "Parallel",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "Quantize",
    "RationalQuadraticSpline",
    "Rebuild",
    "RebuildError",
    "Replay",
    "Reshape",
    "ReversibleBlock",
    "ScaledShift",
    "Shift",
    "SplineCoupling",
    "Split",
    "State",
    "Swap",
    "is_rebuilding",
    "measure_drift",
    "no_trace",
    "reversible_checkpoint",
    "testing",
]
