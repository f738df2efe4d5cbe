"""Bit-exact layers: sums on a grid of multiples of a quantum do not round."""

from .quantize import Quantize

__all__ = ["Quantize"]
