"""The folder that a CLIP reward is loaded from, and scores of images and prompts as both towers see them.

It is a transformers folder of a `CLIPModel`: config.json, model.safetensors and a tokenizer; with
reward.json, which says which reward it is and where its weights came from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.json_files import member, shown
from dspo_jax.models.model import Model, Params
from dspo_jax.pipelines.tokenizers import open_tokenizer
from dspo_jax.rewards.network import Preprocess, RewardNetwork
from dspo_jax.weights import model_dir
from dspo_jax.weights.components import read_model, read_params

_CLASS = "CLIPModel"


@dataclasses.dataclass(frozen=True)
class ClipReward:
    """The parts of a CLIP reward without the weights, which a network that refers to it must not keep.

    Attributes:
      name, version: of the reward.
      folder: that the reward was read from.
      model: a `CLIPModel`.
    """

    name: str
    version: str
    folder: Path
    model: Model

    def cosine(self, params: Params, pixels: jax.Array, tokens: jax.Array) -> jax.Array:
        """Pixels [B, H, W, 3], token ids [B, S] -> the cosine [B] of each image with its prompt. Pure."""
        images = normalize(self.model.apply(params, pixels, method="encode_image"))
        return (images * normalize(self.model.apply(params, tokens).pooled)).sum(-1)

    def make(
        self,
        network: Callable[[Params, jax.Array, jax.Array], jax.Array],
        params: Params,
        preprocess: Preprocess,
        clean: Callable[[str], str] = str,
    ) -> RewardNetwork:
        """Makes the reward of a network over pixels and token ids; `clean` is applied to prompts first.

        Raises:
          FileNotFoundError, UserError: as `read_tokenizer`.
        """
        read = read_tokenizer(self.folder, self.model)

        def tokenize(prompts: Sequence[str]) -> np.ndarray:
            return read([clean(prompt) for prompt in prompts])

        size = self.model.settings["vision"]["image_size"]
        return RewardNetwork(self.name, self.version, params, network, preprocess, size, tokenize)


def normalize(vectors: jax.Array) -> jax.Array:
    """Scales vectors [B, D] to length one."""
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def open_reward(folder: Path, name: str) -> tuple[ClipReward, Params]:
    """Reads the reward `name`, and its weights as float32.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: it is the folder of another reward, or its files do not fit each other.
    """
    file = folder / "reward.json"
    fix = f"make the folder with python -m dspo_jax.rewards.convert --reward={name}"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {fix}")
    about = model_dir.read_json(file, fix)
    if about.get("name") != name:
        raise UserError(f"{file}: is of the reward {shown(about.get('name'))}, not {name}; {fix}")

    def describe_part(part: str) -> str:
        source, digest = (member(about, part + key, str, file, fix) for key in ("source", "sha256"))
        return f"{source} {digest[:8]}"

    version = ", ".join(map(describe_part, ["", *(["head."] if "head" in about else [])]))
    model = read_clip(folder)
    return ClipReward(name, version, folder, model), read_params(folder, model, "float32")


def read_clip(folder: Path) -> Model:
    """Returns the architecture of a transformers folder of a `CLIPModel`.

    Raises:
      FileNotFoundError: it has no config.json.
      UserError: it is something else.
    """
    if (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder}: is a text-to-image model; a reward is made of a CLIP with both its towers"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; give a transformers folder of a {_CLASS}")
    model = read_model(folder)
    if model.class_name != _CLASS:
        raise UserError(
            f"{folder / 'config.json'}: is of class {model.class_name}; a reward is made of a {_CLASS}, both "
            "towers and their projections"
        )
    return model


def read_tokenizer(folder: Path, model: Model) -> Callable[[Sequence[str]], np.ndarray]:
    """Returns a function from N prompts to their token ids [N, S] int32; longer prompts are cut.

    What follows the end token changes nothing, as no position sees a later one.

    Raises:
      FileNotFoundError: its files are missing.
      UserError: they are damaged, or of another model.
    """
    settings = model.settings["text"]
    tokenizer = open_tokenizer(folder, settings["vocab_size"])
    legacy = settings["eos_token_id"] == 2  # the end is then the highest id: models/clip.py
    end = max(tokenizer.get_vocab().values()) if legacy else settings["eos_token_id"]
    if tokenizer.eos_token_id != end:
        raise UserError(
            f"{folder}: a tokenizer of {len(tokenizer)} tokens with the end token {tokenizer.eos_token_id}; "
            f"config.json asks for {settings['vocab_size']} with {end}; is it of the same model?"
        )

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        length = settings["max_position_embeddings"]
        encoded = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)
        return np.asarray(encoded["input_ids"], np.int32)

    return tokenize
