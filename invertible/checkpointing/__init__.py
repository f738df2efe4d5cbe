"""Training without stored activations: they are rebuilt by inversion."""

from .checkpoint import reversible_checkpoint
from .drift import Drift, LayerDrift, measure_drift
from .replay import Replay, is_rebuilding
from .settings import Rebuild

__all__ = [
    "Drift",
    "LayerDrift",
    "Rebuild",
    "Replay",
    "is_rebuilding",
    "measure_drift",
    "reversible_checkpoint",
]
