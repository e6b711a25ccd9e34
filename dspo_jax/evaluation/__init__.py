"""Win rates of models against a base, with intervals."""
