"""Checks of the laws that every layer keeps, for your own layers too."""
