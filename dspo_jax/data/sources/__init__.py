"""Sources of preference pairs.

A source is a small frozen dataclass: its fields are the arguments a config may set (`config.source.FIELD`),
its docstring is the schema of its rows, and `pairs(split)` yields `PreferencePair`s in an order that never
changes. `registry.SOURCES` names them all. A source hands over images as it finds them;
`decode_pair` is the one place that decodes them and says what is wrong with a row.
"""

from dspo_jax.data.sources.pairs import PreferencePair, decode_pair
from dspo_jax.data.sources.registry import SOURCES, Source, get_source

__all__ = ["SOURCES", "PreferencePair", "Source", "decode_pair", "get_source"]
