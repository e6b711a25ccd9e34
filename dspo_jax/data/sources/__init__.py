"""Where preference pairs come from.

A source is a small frozen dataclass: its fields are the arguments a config may set (`config.source.FIELD`),
its docstring is the schema of its rows, and `pairs(split)` yields `PreferencePair`s in an order that never
changes. `registry.SOURCES` names them all. A source hands over images as it finds them;
`decode_pair` is the one place that decodes them and says what is wrong with a row.
"""

from dspo_jax.data.sources.pairs import PreferencePair, decode_pair
from dspo_jax.data.sources.registry import SOURCES, Source, get_source
from dspo_jax.images.decode import MAX_PIXELS, decode_image
from dspo_jax.images.image_files import BadRow, ImagePaths, read_image_file

__all__ = [
    "MAX_PIXELS",
    "SOURCES",
    "BadRow",
    "ImagePaths",
    "PreferencePair",
    "Source",
    "decode_image",
    "decode_pair",
    "get_source",
    "read_image_file",
]
