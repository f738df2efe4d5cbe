"""Bit-exact layers: sums on a grid of multiples of a quantum do not round.

The grid, the range checks around a run, and :class:`Quantize`, the entrance. Imported by the
engine, compositions and layers that round; imports ``state``, ``module``, ``direction`` and
``_support``.
"""

from .quantize import Quantize

__all__ = ["Quantize"]
