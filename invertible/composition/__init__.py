"""Layers made of layers."""

from .inverse import Inverse
from .sequential import InvertibleSequential
from .streams import Parallel

__all__ = ["Inverse", "InvertibleSequential", "Parallel"]
