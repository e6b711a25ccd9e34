"""Examples; this import makes Ctrl-C end them with one line while they import the rest."""

import dspo_jax  # noqa: F401
