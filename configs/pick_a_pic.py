"""Settings shared by the recipes for Pick-a-Pic v2: those of the released launchers and of the papers.

Not a recipe itself. A recipe's variant comes after a colon: `--config configs/sd15_dspo.py:paper`.
"""

from ml_collections import ConfigDict

from configs import common
from dspo_jax import spelling

VARIANTS = ("paper", "released")


def sd15(variant: str, *, printed: bool = True) -> ConfigDict:
    """SD1.5 at 512 pixels, 2048 pairs a step, AdamW.

    "released" (the default) is the launcher of Diffusion-DPO and DSPO: --learning_rate=1e-8 --scale_lr over
    2048 pairs, which is 2.048e-5, constant after 500 warm-up steps. Its trainer mirrors each image at random,
    which is done here when the data are encoded (configs/encode/pickapic_sd15.py).

    "paper" is what DSPO prints in D.3: 2.048e-8 and 2000 warm-up steps, here the whole run. Its "inverse
    scaling" thereafter is no schedule: in Diffusion-DPO's text, where it comes from, it is the division of
    the rate by beta. Both papers print one timestep for a pair and noise of each image's own (DSPO's Eq. 14,
    Diffusion-DPO's supplement S2), where the launchers' trainers share the noise too.

    Args:
      variant: "", "released" or "paper".
      printed: whether the recipe's paper prints settings, and so has a variant "paper".

    Raises:
      ValueError: another variant.
    """
    config = _base(variant, printed)
    config.optimizer.warmup_steps = 500
    # All, and a few where it was interrupted: the authors' best ones are those of steps 500, 1000 and 1500.
    config.checkpoint.max_to_keep = 8
    return _as_printed(config) if variant == "paper" else config


def sdxl(variant: str, *, printed: bool = True) -> ConfigDict:
    """SDXL at 1024 pixels, 2048 pairs a step, Adafactor.

    "released" (the default) is the launcher of Diffusion-DPO and DSPO: as for SD1.5, with 200 warm-up steps
    and transformers' Adafactor.
    "paper" is as for SD1.5, and so are the arguments and what is raised.
    """
    config = _base(variant, printed)
    config.optimizer.name = "adafactor"
    config.optimizer.factored_axes = "released"
    config.optimizer.warmup_steps = 200
    config.checkpoint.every = 100
    # All, of 11 GB each, and a few where it was interrupted: the authors' best ones are those of steps 600
    # and 700.
    config.checkpoint.max_to_keep = 24
    config.validation.every = 100
    return _as_printed(config) if variant == "paper" else config


def _base(variant: str, printed: bool) -> ConfigDict:
    allowed = VARIANTS if printed else ("released",)
    if variant not in ("", *allowed):
        raise ValueError(spelling.unknown("variant of the recipe, after the colon", variant, allowed))
    config = common.get_config()
    config.steps = 2000
    config.compute_dtype = "bfloat16"
    config.optimizer.learning_rate = 2048 * 1e-8
    return config


def _as_printed(config: ConfigDict) -> ConfigDict:
    config.share_noise = False
    config.optimizer.learning_rate = 2.048e-8
    config.optimizer.warmup_steps = 2000
    return config
