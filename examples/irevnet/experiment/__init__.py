"""A run: its settings, and the folder of its results."""
