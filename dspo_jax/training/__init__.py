"""The training step, the start of a run, the loop, and the hooks that watch it."""
