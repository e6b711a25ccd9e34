"""Parquet files with captions and images as bytes: a file, a folder, or a dataset repository on the hub.

    python -m dspo_jax.encode --config configs/encode/parquet.py \
        --config.source.path=DIR_OR_HUB_ID --config.model=MODEL_DIR --out OUT

At the model's own size, which --config.resolution changes. Columns are named with
--config.source.caption=..., winner, loser, preference and key (dspo_jax/data/sources/parquet.py). Of a
repository on the hub only what is encoded is fetched, and nothing is stored. Time and hardware: not measured.
"""

from ml_collections import ConfigDict

from configs.encode import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    common.set_source(config, "parquet")
    return config
