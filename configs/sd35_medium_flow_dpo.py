"""Flow-DPO on Stable Diffusion 3.5 medium: Diffusion-DPO of the velocity, adapters of rank 32.

    python -m dspo_jax.train --config configs/sd35_medium_flow_dpo.py --workdir runs/sd35_medium_flow_dpo \
        --config.model=MODEL_DIR --config.data.path=DATA_DIR

Encode the pairs at 512 pixels, as the released code bases train (--config.resolution=512). What they set for
this model at that size, with the same loss and a mean over the latent; none drops captions, and none weighs
noise levels:

    code base        beta   learning rate   noise levels            adapters
    flow_grpo         100   3e-4            logit-normal, shift 3   first attention alone, alpha 64
    Flow-Factory      100   1e-5            logit-normal            the same
    verl-omni         100   2e-4            logit-normal, shift 3   both attentions

Flow-Factory's and verl-omni's own default for beta is 2000, which flow_grpo's author advises, too, where a
run is unstable, and Flow-Factory's notes say that 1e-4 and 3e-4 collapse. `:lora` (the default) has 2000 and
1e-5, the noise levels of Flow-Factory, and flow_grpo's layers with those of the second attention. Batch and
length are this project's choice: theirs are of images that the model draws itself.

`:full` trains every parameter, which no released code base does: at a tenth of the rate, with beta 1500,
which is Diffusion-DPO's 5000 translated (docs/flow.md). Neither has been compared with other values.

Not run at this size by this project: no hours and no result to report.
"""

from ml_collections import ConfigDict

from configs import common
from dspo_jax import spelling

VARIANTS = ("lora", "full")


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe.

    Args:
      variant: "", "lora" or "full".

    Raises:
      ValueError: another variant.
    """
    if variant not in ("", *VARIANTS):
        raise ValueError(spelling.unknown("variant of the recipe, after the colon", variant, VARIANTS))
    config = common.get_config()
    config.objective.name = "diffusion_dpo"
    config.batch_size = 32
    config.accumulation = 8
    config.steps = 2000
    config.caption_dropout = 0.0
    config.compute_dtype = "bfloat16"
    config.remat = "blocks"
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_steps = 0
    config.validation.batch_size = 8
    if variant == "full":
        config.objective.beta = 1500.0
        config.optimizer.learning_rate = 1e-6
    else:
        config.objective.beta = 2000.0
        config.optimizer.learning_rate = 1e-5
        config.lora.rank = 32
        config.lora.alpha = 64.0
        config.lora.targets = (r"attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",)
    return config
