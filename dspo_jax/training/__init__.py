"""The training step, its start, its loop and what watches it."""
