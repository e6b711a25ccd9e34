"""Any dataset of TensorFlow Datasets that holds captions and images, in array_record files.

    python -m dspo_jax.encode --config configs/encode/tfds.py \
        --config.source.dataset=NAME:VERSION --config.source.data_dir=DIR --config.model=MODEL_DIR --out OUT

At the model's own size, which --config.resolution changes. The dataset must have been
prepared (tfds build --file_format=array_record); features are named with --config.source.caption=..., winner,
loser, preference and key (dspo_jax/data/sources/tfds.py). Time and hardware: not measured.
"""

from ml_collections import ConfigDict

from configs.encode import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    common.set_source(config, "tfds")
    return config
