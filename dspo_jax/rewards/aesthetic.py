"""LAION's aesthetic predictor: how people would rate an image from 1 to 10, whatever its prompt."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.models.model import Params
from dspo_jax.rewards import clip_folder
from dspo_jax.rewards.device_pixels import CLIP
from dspo_jax.rewards.network import RewardNetwork, ignore_prompts
from dspo_jax.weights.tensors import Tensor
from dspo_jax.weights.torch_files import open_weights

HEAD = "head.safetensors"
# Layer of the released head -> its output features; the layers between them are dropout.
_LAYERS = {"layers.0": 1024, "layers.2": 128, "layers.4": 64, "layers.6": 16, "layers.7": 1}


def load(folder: Path) -> RewardNetwork:
    """Loads five linear maps of the image embedding at length one, 768 -> 1024 -> 128 -> 64 -> 16 -> 1.

    Source: christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE.pth`, which has no
    activation between its layers, on CLIP ViT-L/14 of OpenAI.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: as `clip_folder.open_reward` and `check_head`.
    """
    clip, params = clip_folder.open_reward(folder, "aesthetic")
    head = read_head(folder / HEAD, clip.model.settings["text"]["projection_dim"])

    def network(params: Params, pixels: jax.Array, tokens: jax.Array) -> jax.Array:
        del tokens
        image = clip.model.apply(params["clip"], pixels, method="encode_image")
        return apply_head(params["head"], clip_folder.normalize(image))

    both = {"clip": params, "head": head}
    size = clip.model.settings["vision"]["image_size"]
    return RewardNetwork(clip.name, clip.version, both, network, CLIP, size, ignore_prompts)


def apply_head(head: Params, images: jax.Array) -> jax.Array:
    """Scores image embeddings [B, D] of length one, [B]. Pure."""
    for layer in _LAYERS:
        images = images @ head[layer]["kernel"] + head[layer]["bias"][None]
    return images[:, 0]


def check_head(file: Path, stored: Mapping[str, Tensor], features: int) -> dict[str, Tensor]:
    """Returns the head's tensors out of those that a file holds under the released names.

    Args:
      file: for messages.
      stored: tensors of the file.
      features: of the image embedding.

    Raises:
      UserError: they are not of such a head.
    """
    head = {}
    for layer, outputs in _LAYERS.items():
        for name, shape in ((f"{layer}.weight", (outputs, features)), (f"{layer}.bias", (outputs,))):
            found = stored[name].shape if name in stored else "missing"
            if found != shape:
                raise UserError(
                    f"{file}: tensor {name} is {found}, the aesthetic head asks for {shape}; give "
                    "sac+logos+ava1-l14-linearMSE.pth and CLIP ViT-L/14"
                )
            head[name] = stored[name]
        features = outputs
    return head


def read_head(file: Path, features: int) -> Params:
    """Reads kernels and biases by layer, float32, from the published file or a reward's folder.

    Raises:
      FileNotFoundError: no such file.
      UserError: as `check_head`.
    """
    stored = check_head(file, open_weights(file), features)
    values = {name: tensor.read().astype(np.float32) for name, tensor in stored.items()}
    return {
        layer: {"kernel": values[f"{layer}.weight"].T, "bias": values[f"{layer}.bias"]} for layer in _LAYERS
    }
