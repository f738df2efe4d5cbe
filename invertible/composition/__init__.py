"""Layers made of layers: each lists its members, and the engine runs them.

Imported by layers that are made of others; imports ``checkpointing`` and what is below, no layer.
"""

from .composite import Composite
from .inverse import Inverse
from .sequential import InvertibleSequential
from .streams import OnStreams, Parallel

__all__ = ["Composite", "Inverse", "InvertibleSequential", "OnStreams", "Parallel"]
