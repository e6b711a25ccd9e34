"""What the recipes that train on the model's own images share: LoRA, bfloat16, no data but prompts."""

from ml_collections import ConfigDict

from configs import common


def lora(kind: str, rank: int) -> ConfigDict:
    """Returns a config for Stable Diffusion with adapters of a rank.

    Args:
      kind: `config.stream.kind`.
      rank: of the adapters.
    """
    config = common.get_config()
    config.stream.kind = kind
    config.lora.rank = rank
    config.compute_dtype = "bfloat16"
    config.log_every = 1
    config.optimizer.warmup_steps = 0
    config.checkpoint.every = 50
    config.validation.every = 50
    config.samples.every = 50
    return config
