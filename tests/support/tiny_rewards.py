"""Small random weights of every reward that has a network, in the folders that rewards are loaded from.

Not of B-VQA, which asks for the phrases of each prompt: tests/rewards/test_b_vqa.py.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tiny_clip import clip_config, write_clip

from dspo_jax.rewards.differentiable import DIVISORS
from dspo_jax.rewards.publish import RECIPES, prepare

NETWORKS = sorted(set(DIVISORS) - {"colourfulness", "b_vqa"})
HEAD = {"layers.0": 1024, "layers.2": 128, "layers.4": 64, "layers.6": 16, "layers.7": 1}


def write_rewards(made: Path, out: Path) -> None:
    """Writes small published weights into `made`, and converts them as the command does; needs torch."""
    import image_reward_torch as oracle
    import torch
    from torch_modules import randomize

    large = write_clip(made / "h")
    small = write_clip(made / "l", clip_config(features=768, activation="quick_gelu"))
    smallest = write_clip(made / "b", clip_config(features=512, activation="quick_gelu"))
    rng, features, head = np.random.default_rng(0), 768, {}
    for layer, outputs in HEAD.items():
        head[f"{layer}.weight"] = rng.standard_normal((outputs, features), np.float32) / np.sqrt(features)
        head[f"{layer}.bias"] = rng.standard_normal(outputs, np.float32)
        features = outputs
    save_file({name: np.float32(value) for name, value in head.items()}, made / "head.safetensors")
    module = randomize(oracle.ImageReward(oracle.reduced()))
    torch.save(oracle.published(module), made / "ImageReward.pt")
    bert = oracle.write_vocabulary(made / "bert")
    for name in NETWORKS:
        weights, tokenizer, head_file = large, None, None
        if name == "clip-b":
            weights = smallest
        if name in ("clip-l", "aesthetic"):
            weights, head_file = small, str(made / "head.safetensors") if name == "aesthetic" else None
        if name == "imagereward":
            weights, tokenizer = made / "ImageReward.pt", str(bert)
        job = prepare(name, out / name, weights=str(weights), tokenizer=tokenizer, head=head_file)
        RECIPES[name].write(job)
