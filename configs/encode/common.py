"""Every key of the encoding, with its default. The recipes beside this file only change it."""

import dataclasses

from ml_collections import ConfigDict, config_dict

from dspo_jax.data.sources import get_source


def get_config() -> ConfigDict:
    """The schema; a recipe sets `resolution` and `source`."""
    config = ConfigDict()

    # The model whose VAE and tokenizers encode the data: a diffusers folder or a training workdir.
    config.model = config_dict.placeholder(str)
    # Side of the square training images in pixels: the shortest side is resized to it (bilinear), the centre
    # is kept.
    config.resolution = 512
    # Mirrors images left to right, both of a pair or neither: "none", or "random" (half of the examples).
    config.flip = "none"
    # Of what encoding draws at random: which examples are flipped.
    config.seed = 0
    # Examples in one call of the VAE.
    config.batch_size = 16
    # Source rows that go into one file.
    config.rows_per_shard = 2048
    # Which splits of the source to encode; empty means all.
    config.splits = ()

    config.source = ConfigDict()
    # Where the pairs come from: a name registered in dspo_jax/data/sources/. The source's own arguments
    # stand beside it.
    config.source.name = config_dict.placeholder(str)
    # Largest share of a split's rows that may be unusable (undecodable image, empty caption, ...) before the
    # run fails.
    config.source.max_skipped = 0.01
    return config


def set_source(config: ConfigDict, name: str) -> None:
    """Chooses a source and adds its arguments with their defaults, so that the command line can set them."""
    config.source.name = name
    config.source.update(dataclasses.asdict(get_source(name)))  # type: ignore[call-overload]
