"""Training without stored activations: they are rebuilt by inversion.

The engine, which runs all compositions, in both directions, rebuilding or not; README.md in this
folder tells what happens in a step of training. Imported by compositions, and by layers that
rebuild in a way of their own; imports ``exact`` and what is below, no composition and no layer.
"""

from .checkpoint import reversible_checkpoint
from .drift import Drift, LayerDrift, NearConstant, measure_drift
from .replay import Replay, is_rebuilding
from .settings import Rebuild, RebuildError

__all__ = [
    "Drift",
    "LayerDrift",
    "NearConstant",
    "Rebuild",
    "RebuildError",
    "Replay",
    "is_rebuilding",
    "measure_drift",
    "reversible_checkpoint",
]
