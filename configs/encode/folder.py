"""Your own preference pairs, or your own captioned images: a folder with pairs.jsonl or pairs.csv.

    python -m dspo_jax.encode --config configs/encode/folder.py \
        --config.source.path=DIR --config.model=MODEL_DIR --out OUT

At the model's own size, which --config.resolution changes. What the file may say
stands in dspo_jax/data/sources/folder.py and docs/data.md. A pair takes 128 KiB at 512 pixels, a single image
half of that. Time and hardware: not measured.
"""

from ml_collections import ConfigDict

from configs.encode import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    common.set_source(config, "folder")
    return config
