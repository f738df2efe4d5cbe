"""Checks of the laws that every layer keeps, for your own layers too.

:mod:`invertible.testing.strategies` has the Hypothesis strategies; it alone needs Hypothesis.
"""

from .inversecheck import inversecheck
from .laws import LAWS
from .subject import InversecheckError

__all__ = ["LAWS", "InversecheckError", "inversecheck"]
