"""Preference alignment of text-to-image diffusion models in JAX."""

import os
import sys
from pathlib import Path

from dspo_jax import interrupts

__version__ = "0.1.0"

# Before anything imports transformers, which warns that torch is missing; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# Before JAX loads libtpu, which tells at length of a machine without a TPU that it found none.
if not any(Path("/dev").glob("accel[0-9]*")) and not Path("/dev/vfio").is_dir():
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

# `python -m dspo_jax.NAME` imports this package first of all, and argv[0] is "-m" until the module is found.
# The imports of a command take seconds.
if sys.argv[:1] == ["-m"]:
    interrupts.end_at_once()
