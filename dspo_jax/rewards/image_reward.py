"""ImageReward v1.0: how well an image is liked for its prompt.

Source: Xu et al. 2023, "ImageReward" (arXiv:2304.05977), and `score` of the code released with it (package
image-reward 1.5): a prompt begins with BERT's [CLS], not BLIP's [ENC], and the head reads its last state.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.models.model import Params, build_model
from dspo_jax.rewards import blip_weights
from dspo_jax.rewards.device_pixels import IMAGE_REWARD
from dspo_jax.rewards.network import RewardNetwork
from dspo_jax.weights.layout import torch_shapes
from dspo_jax.weights.torch_files import open_weights

_NAME = "imagereward"
_CLASS = "ImageReward"

# Mean and deviation by which the released code standardises the output of the head.
_MEAN, _DEVIATION = 0.16717362830052426, 1.0333394966054072

_TOKENS = 35
# In the state dict, but no part of `score`: BLIP's contrastive projections, and a counting buffer.
_UNUSED = re.compile(r"blip\.((vision|text)_proj\.(weight|bias)|text_encoder\.embeddings\.position_ids)")


def load(folder: Path) -> RewardNetwork:
    """Returns the reward of the weights that `write_weights` put into `folder`.

    Args:
      folder: holds config.json, model.safetensors, vocab.txt and reward.json.

    Raises:
      FileNotFoundError: one of the files is missing.
      UserError: they are of another reward or do not fit each other.
    """
    model, params, tokenizer, source = blip_weights.read_folder(folder, _NAME, _CLASS)

    def network(params: Params, pixels: jax.Array, tokens: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (model.apply(params, pixels, *tokens) - _MEAN) / _DEVIATION

    def tokenize(prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="np"
        )
        return encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(bool)

    size = model.config["vision_config"]["image_size"]
    return RewardNetwork(_NAME, f"v1.0, {source}", params, network, IMAGE_REWARD, size, tokenize)


def write_weights(weights: Path, out: Path, tokenizer: Path | None, source: str) -> None:
    """Writes the folder that the reward is loaded from.

    Args:
      weights: the published ImageReward.pt, or a safetensors file of the same names.
      out: must not exist; appears when it is complete.
      tokenizer: BERT's vocab.txt or tokenizer.json, or a folder with one, such as that of bert-base-uncased.
      source: what the user calls the weights, which tables print.

    Raises:
      FileNotFoundError: no such weights or vocabulary.
      UserError: a tensor is missing, is not part of ImageReward, or has another shape; the vocabulary is
        another one.
      OSError: the disk is full.
    """
    vocabulary = blip_weights.find_vocabulary(_NAME, tokenizer)
    stored = {name: tensor for name, tensor in open_weights(weights).items() if not _UNUSED.fullmatch(name)}
    config = blip_weights.find_config(weights, stored, _CLASS, "blip.")
    heads = [f"mlp.layers.{number}.weight" for number in (0, 2, 4, 6)]
    config["head_features"] = [blip_weights.find_shape(weights, stored, name, 2)[0] for name in heads]
    model = build_model(_CLASS, config)
    blip_weights.check_tensors(weights, stored, model)
    extra = sorted(stored.keys() - torch_shapes(model))
    if extra:
        raise UserError(
            f"{weights}: {len(extra)} tensor(s) that are not part of ImageReward, first {extra[0]}"
        )
    blip_weights.write_folder(out, _NAME, source, weights, vocabulary, model, stored)
