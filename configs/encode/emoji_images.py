"""The emoji that people tweet, each with its name and category: what the shipped base model learns.

    python -m dspo_jax.encode --config configs/encode/emoji_images.py --config.model=MODEL_DIR --out OUT

Needs the `demo` extra. MODEL_DIR needs a trained VAE and a tokenizer; its other parts are not used.
"""

from ml_collections import ConfigDict

from configs.encode import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.resolution = 64
    config.num_workers = 0  # such small pictures are decoded before other processes have started
    common.set_source(config, "emoji_images")
    # Those of the pairs (EmojiPairs.min_occurrences): a model of this size draws 400 emoji better than 1,600.
    config.source.min_occurrences = 20
    return config
