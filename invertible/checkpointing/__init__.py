"""Training without stored activations: they are rebuilt by inversion."""

from .checkpoint import reversible_checkpoint
from .drift import Drift, LayerDrift, measure_drift

__all__ = ["Drift", "LayerDrift", "measure_drift", "reversible_checkpoint"]
