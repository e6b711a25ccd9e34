"""The checker of annotations that the tests install."""

from beartype import BeartypeConf, beartype

# A whole number passes for a float, as in Python's own rules for annotations (PEP 484).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
