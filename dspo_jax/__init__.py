"""Preference alignment of text-to-image diffusion models in JAX."""

import os
import sys

from dspo_jax import interrupts

__version__ = "0.1.0"

# Before anything imports transformers, which warns that torch is missing; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# `python -m dspo_jax.NAME` imports this package first of all, and argv[0] is "-m" until the module is found.
# The imports of a command take seconds.
if sys.argv[:1] == ["-m"]:
    interrupts.end_at_once()
