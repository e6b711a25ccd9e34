"""Human Preference Dataset v3 for Stable Diffusion XL, at 1024 pixels.

    python -m dspo_jax.encode --config configs/encode/hpdv3_sdxl.py \
        --config.source.path=HPDv3/train.json --config.model=MODEL_DIR --out OUT

The path is `train.json` or `test.json` of the hub's MizzenAI/HPDv3, with the unpacked images beside it
(dspo_jax/data/sources/ranked.py, HpdV3). The file is one split: captions are held out as `validation`. Not
run by this project: no hours and no hardware to report.
"""

from ml_collections import ConfigDict

from configs.encode import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.resolution = 1024
    common.set_source(config, "hpd_v3")
    return config
