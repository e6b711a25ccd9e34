"""Human Preference Dataset v2 for Stable Diffusion 1.5, at 512 pixels.

    python -m dspo_jax.encode --config configs/encode/hpdv2_sd15.py \
        --config.source.path=HPD/train.json --config.model=MODEL_DIR --out OUT

The path is `train.json` (about 645,000 pairs) or `test.json` (153,000) of the unpacked archives, with their
images in `train/` and `test/` beside them (dspo_jax/data/sources/ranked.py, HpdV2). The file is one split:
captions are held out as `validation`. Not run at this size by this project: no hours and no hardware to
report.
"""

from ml_collections import ConfigDict

from configs.encode import common


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = common.get_config()
    config.resolution = 512
    common.set_source(config, "hpd_v2")
    return config
