"""Checks of the laws that every layer keeps, for your own layers too.

:mod:`invertible.testing.strategies` has the Hypothesis strategies; it alone needs Hypothesis.
"""

from .inversecheck import LAWS, InversecheckError, inversecheck

__all__ = ["LAWS", "InversecheckError", "inversecheck"]
