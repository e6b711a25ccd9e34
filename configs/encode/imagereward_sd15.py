"""ImageReward's ranked images for Stable Diffusion 1.5, at 512 pixels.

    python -m dspo_jax.encode --config configs/encode/imagereward_sd15.py \
        --config.source.path=ANNOTATIONS.json --config.source.images=DIR --config.model=MODEL_DIR --out OUT

The annotations are a JSON list of {id, prompt, generations, ranking}, or ImageRewardDB's parquet with a row
for each image; DIR is the folder that the images' names are relative to, by default that of the annotations
(dspo_jax/data/sources/ranked.py, ImageRewardRankings). The published test file of 466 prompts gives
6,399 pairs and 831 ties. The file is one split: captions are held out as `validation`. Not run with its
images by this project: no hours and no hardware to report.
"""

from ml_collections import ConfigDict

from configs.encode import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.resolution = 512
    common.set_source(config, "image_reward")
    return config
