"""Training without stored activations: they are rebuilt by inversion.

The engine, which runs all compositions, in both directions, rebuilding or not; README.md in this
folder tells what happens in a step of training. Imported by compositions, and by layers that
rebuild in a way of their own; imports ``exact`` and what is below, no composition and no layer.
"""

from .checkpoint import reversible_checkpoint
from .drift import Drift, LayerDrift, NearConstant, measure_drift
from .memory import LayerMemory, Memory, StepMemory, measure_memory
from .policies import keep_matmuls
from .replay import Replay, is_rebuilding
from .settings import Rebuild, RebuildError

__all__ = [
    "Drift",
    "LayerDrift",
    "LayerMemory",
    "Memory",
    "NearConstant",
    "Rebuild",
    "RebuildError",
    "Replay",
    "StepMemory",
    "is_rebuilding",
    "keep_matmuls",
    "measure_drift",
    "measure_memory",
    "reversible_checkpoint",
]
