"""Densities: an invertible layer between data and a base distribution.

Imports layers' contract and what is below it, no layer; nothing in the library imports it.
"""

from .as_transform import AsTransform
from .distribution import FlowDistribution
from .flow import Flow

__all__ = ["AsTransform", "Flow", "FlowDistribution"]
