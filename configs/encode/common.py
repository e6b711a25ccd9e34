"""Every key of the encoding, with its default. The recipes beside this file only change it."""

import dataclasses

from ml_collections import ConfigDict, config_dict

from dspo_jax.data.sources import get_source


def get_config() -> ConfigDict:
    """Returns the schema; a recipe sets `source`."""
    config = ConfigDict()

    # The model whose VAE and tokenizers encode the data: a diffusers folder, a hub id or a training workdir.
    config.model = config_dict.placeholder(str)
    # Side of the square training images in pixels: the shortest side is resized to it (bilinear), the centre
    # is kept. None: that of the images the model was made for (512 for Stable Diffusion 1.5, 1024 for SDXL).
    config.resolution = config_dict.placeholder(int)
    # Largest ratio of the sides; 1 is the square, as in the papers. Above it, an image is cropped to the
    # nearest of several shapes of about the same area, whose sides are multiples of `bucket_step`.
    config.max_aspect_ratio = 1.0
    config.bucket_step = 64
    # Captions longer than 75 tokens are stored in up to so many chunks of 75; 1 cuts them. Training on the
    # data needs the same `text.max_chunks`.
    config.text = ConfigDict()
    config.text.max_chunks = 1
    # Tokens that Stable Diffusion 3's T5 reads of a caption; None is 256. Training needs the same.
    config.text.max_sequence_length = config_dict.placeholder(int)
    # Whether T5 reads every caption now and its states are stored, in float16, so that training does without
    # T5; else it runs in every step. And what it computes in: "float32" or "bfloat16".
    config.text.store_t5 = True
    config.text.t5_dtype = "float32"
    # Mirrors images left to right: "none"; "random", half of the pairs, both images or neither;
    # "independent", half of the images, each by itself, as the released trainers do; "both", each row is
    # stored as it is and with both images mirrored. The same in every epoch, and in all splits.
    config.flip = "none"
    # Of what encoding draws at random: which images are mirrored.
    config.seed = 0
    # What the VAE computes in: "float32" or "bfloat16".
    config.vae_dtype = "float32"
    # Examples in one call of the VAE, over all devices of a process.
    config.batch_size = 16
    # Processes that decode images, 0 to decode in the process of the VAE; None: one for each core.
    config.num_workers = config_dict.placeholder(int)
    # Source rows that go into one file. What is lost when a process is killed is the file it was at.
    config.rows_per_shard = 2048
    # Which splits of the source to encode; empty means all.
    config.splits = ()

    # A reward that scores every image of the source, in a first pass: a name, or FILE.py:FUNCTION; or
    # "column", for the columns that `source.scores` names. The scores are stored with the examples. "" is
    # none. Of several, separated by commas, the first is stored and `select.agree` counts all.
    config.score = ""
    config.rewards = ConfigDict()
    # Holds the weights of each reward under its name, as dspo_jax.rewards.convert writes them.
    config.rewards.folder = "rewards"

    # What is encoded, by these scores.
    config.select = ConfigDict()
    # "pairs", or "single": each image of a pair is an example of its own, once for each caption.
    config.select.images = "pairs"
    # Keeps the pairs of `train` whose winner scores more than the loser by at least so many of the rewards in
    # `score`; 0 is all pairs.
    config.select.agree = 0
    # Share of `train` with the highest scores, of the winners where examples are pairs; 1 is all.
    config.select.top = 1.0
    # Pairs of `train` whose winner scores at least so much more than the loser; at 0 the reward agrees with
    # people. None: all.
    config.select.min_gap = config_dict.placeholder(float)

    config.source = ConfigDict()
    # Where the pairs come from: a name in dspo_jax/data/sources/registry.py. The source's own arguments
    # stand beside it.
    config.source.name = config_dict.placeholder(str)
    # Largest share of a split's rows that may be unusable (undecodable image, empty caption, ...) before the
    # run fails.
    config.source.max_skipped = 0.01
    return config


def set_source(config: ConfigDict, name: str) -> None:
    """Chooses a source and adds its arguments with their defaults, so that the command line can set them."""
    config.source.name = name
    config.source.update(dataclasses.asdict(get_source(name)))
