"""Layers made of layers."""

from .composite import Composite
from .inverse import Inverse
from .sequential import InvertibleSequential
from .streams import OnStreams, Parallel

__all__ = ["Composite", "Inverse", "InvertibleSequential", "OnStreams", "Parallel"]
