"""Training with and without stored activations, side by side."""
