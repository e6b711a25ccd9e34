"""Flow-DPO on pairs for the shipped emoji flow model: minutes on a laptop CPU.

    python -m dspo_jax.encode --config configs/encode/emoji.py --config.model=examples/emoji/flow_model \
        --config.text.max_sequence_length=0 --out runs/emoji_flow_pairs
    python -m dspo_jax.train --config configs/emoji_flow_dpo.py --workdir runs/emoji_flow_dpo

The same pairs, batch, length and rate as those of configs/emoji_diffusion_dpo.py, on a model of Stable
Diffusion 3.5's kind. Of the betas 200, 700, 2000 and 7000 this one did best (examples/emoji/README.md).
"""

from ml_collections import ConfigDict

from configs import emoji_diffusion_dpo


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = emoji_diffusion_dpo.get_config()
    config.model = "examples/emoji/flow_model"
    config.data.path = "runs/emoji_flow_pairs"
    config.text.max_sequence_length = 0
    config.objective.beta = 200.0
    return config
