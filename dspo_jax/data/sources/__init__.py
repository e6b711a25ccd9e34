"""Where preference pairs come from.

A source is a small frozen dataclass: its fields are the arguments a config may set (`config.source.FIELD`),
its docstring is the schema of its rows, and `pairs(split)` yields `PreferencePair`s in an order that never
changes. One decorator line registers it by name. A source hands over images as it finds them;
`decode_pair` is the one place that decodes them and says what is wrong with a row.
"""

from dspo_jax.data.sources import emoji, folder, parquet, pick_a_pic, ranked, tfds
from dspo_jax.data.sources.pairs import PreferencePair, decode_pair
from dspo_jax.data.sources.registry import Source, get_source, register
from dspo_jax.images.decode import MAX_PIXELS, decode_image
from dspo_jax.images.image_files import BadRow, ImagePaths, read_image_file

__all__ = [
    "MAX_PIXELS",
    "BadRow",
    "ImagePaths",
    "PreferencePair",
    "Source",
    "decode_image",
    "decode_pair",
    "emoji",
    "folder",
    "get_source",
    "parquet",
    "pick_a_pic",
    "ranked",
    "read_image_file",
    "register",
    "tfds",
]
