"""Trains the emoji flow model, transformer and text encoders together, from random weights.

    python -m dspo_jax.train --config configs/emoji_flow_base.py --workdir runs/emoji_flow_base \
        --config.model=build/emoji/fresh_flow --config.data.path=build/emoji/flow_images

The same pictures, batch and length as those of configs/emoji_base.py. Hours and losses of the shipped model
stand in examples/emoji/README.md.
"""

from ml_collections import ConfigDict

from configs import emoji_base


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = emoji_base.get_config()
    config.text.max_sequence_length = 0  # this model has no T5, and learns without the zeros in its place
    config.steps = 4500
    config.ema_decay = 0.999
    config.validation.every = 1500
    return config
