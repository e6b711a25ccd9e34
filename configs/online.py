"""Settings that all recipes for training on the model's own images begin with."""

from ml_collections import ConfigDict

from configs import common


def common_recipe(kind: str, lora_rank: int) -> ConfigDict:
    """Returns a config for Stable Diffusion.

    Args:
      kind: `config.stream.kind`.
      lora_rank: of the adapters; 0 trains every parameter.
    """
    config = common.get_config()
    config.stream.kind = kind
    config.lora.rank = lora_rank
    config.compute_dtype = "bfloat16"
    config.log_every = 1
    config.optimizer.warmup_steps = 0
    config.checkpoint.every = 50
    config.validation.every = 50
    config.samples.every = 50
    return config
