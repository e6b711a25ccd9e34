"""The best images of Pick-a-Pic by PickScore, for Stable Diffusion XL at 1024 pixels: data of sdxl_emu.py.

    python -m dspo_jax.encode --config configs/encode/pickapic_emu_sdxl.py \
        --config.source.path=DIR_OR_HUB_ID --config.model=MODEL_DIR --out OUT

A first pass scores each image of every pair under its caption, which needs PickScore's weights in
rewards/pickscore (docs/rewards.md); a second encodes the hundredth with the highest scores. Printed in
Diffusion-DPO's supplement (S1.1): the top 1 % and 0.1 % of the images by PickScore, about 10,000 and 1,000.
For the second: --config.select.top=0.001, and OUT/scores copied into the other OUT saves its first pass.

This project's choice: an image that is in several pairs of a caption counts once, nothing is mirrored,
captions are as they are, and `validation_unique` is encoded whole for the early stop. An image takes 256 KiB.
Not run at this size by this project: no hours and no hardware to report.
"""

from ml_collections import ConfigDict

from configs.encode import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.resolution = 1024
    config.splits = ("train", "validation_unique")
    config.score = "pickscore"
    config.select.images = "single"
    config.select.top = 0.01
    common.set_source(config, "pick_a_pic")
    return config
