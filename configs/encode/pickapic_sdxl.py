"""Pick-a-Pic for Stable Diffusion XL, at 1024 pixels: the data of the published recipes.

    python -m dspo_jax.encode --config configs/encode/pickapic_sdxl.py \
        --config.source.path=DIR_OR_HUB_ID --config.model=MODEL_DIR --out OUT

Version 2 has 959,040 rows of training data, ties among them, in 645 files of together about 335 GB
(dspo_jax/data/sources/pick_a_pic.py). Its images are no longer public where they were; give a folder of its
parquet files, or the id of a copy on the hub, of which only what is encoded is fetched and nothing is stored.
An example takes 512 KiB, so that a million take about 524 GB. All splits are encoded; for those of
training alone set --config.splits="('train', 'validation_unique')" and train with
--config.validation.split=validation_unique. DSPO-nodup is --config.source.one_pair_per_prompt=True.

Each image is mirrored with probability one half, by itself, as in the train.py of Diffusion-DPO and of DSPO,
where a mirror is drawn anew whenever an image is read. Here it is drawn once, of seed, key and image, so that
an image looks the same in all of a published run's four to five epochs (docs/data.md, Mirrored images).
--config.flip=none leaves all images as they are.

Not run at this size by this project: no hours and no hardware to report.
"""

from ml_collections import ConfigDict

from configs.encode import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.resolution = 1024
    config.flip = "independent"
    common.set_source(config, "pick_a_pic")
    return config
