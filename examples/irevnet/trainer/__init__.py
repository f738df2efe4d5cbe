"""Training: its state, its steps, and the processes that share it."""
