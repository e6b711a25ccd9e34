"""ImageReward v1.0: how well an image is liked for its prompt.

Source: Xu et al. 2023, "ImageReward" (arXiv:2304.05977), and `score` of the code released with it (package
image-reward 1.5): a prompt begins with BERT's [CLS], not BLIP's [ENC], and the head reads its last state.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from dspo_jax import json_files
from dspo_jax.errors import UserError
from dspo_jax.files import appear, refuse_existing, write_json, write_text
from dspo_jax.models.config import NetworkConfig
from dspo_jax.models.model import Model, Params, build_model
from dspo_jax.rewards.device_pixels import IMAGE_REWARD
from dspo_jax.rewards.network import RewardNetwork
from dspo_jax.weights import model_dir, tensors
from dspo_jax.weights.components import read_model, read_params
from dspo_jax.weights.layout import cast, torch_shapes
from dspo_jax.weights.tensors import Tensor
from dspo_jax.weights.torch_files import open_weights

if TYPE_CHECKING:
    from transformers import BertTokenizer

_NAME = "imagereward"
_CLASS = "ImageReward"

# Mean and deviation by which the released code standardises the output of the head.
_MEAN, _DEVIATION = 0.16717362830052426, 1.0333394966054072

_TOKENS = 35
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Tokens that BLIP adds to BERT's vocabulary; a prompt has one only where it spells the token out.
_ADDED = ["[DEC]", "[ENC]"]

_HEAD_WIDTH = 64  # width of an attention head in ViT-L/16 and BERT-base; the weights do not tell it
_LAYER_NORM_EPS = {"vision_config": 1e-6, "text_config": 1e-12}
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
    file, fix = folder / "reward.json", "convert the weights again"
    about = model_dir.read_json(file, fix)
    if about.get("name") != _NAME:
        raise UserError(f"{file}: is not of the reward {_NAME}; {fix}")
    source, digest = (json_files.member(about, key, str, file, fix) for key in ("source", "sha256"))
    model = read_model(folder)
    if model.class_name != _CLASS:
        raise UserError(f"{folder / 'config.json'}: is of class {model.class_name}, not {_CLASS}")
    params = read_params(folder, model, "float32")
    tokenizer = _read_tokenizer(folder / "vocab.txt", model.config["text_config"]["vocab_size"])

    def network(params: Params, pixels: jax.Array, tokens: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (model.apply(params, pixels, *tokens) - _MEAN) / _DEVIATION

    def tokenize(prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="np"
        )
        return encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(bool)

    version, size = f"v1.0, {source} {digest[:8]}", model.config["vision_config"]["image_size"]
    return RewardNetwork(_NAME, version, params, network, IMAGE_REWARD, size, tokenize)


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
    refuse_existing(out)
    if tokenizer is None:
        raise UserError(
            f"reward {_NAME}: needs a tokenizer: a folder with vocab.txt of bert-base-uncased, or that file"
        )
    vocabulary = tokenizer
    if tokenizer.is_dir():
        named = [tokenizer / name for name in ("vocab.txt", "tokenizer.json")]
        vocabulary = next((file for file in named if file.is_file()), named[0])
    stored = {name: tensor for name, tensor in open_weights(weights).items() if not _UNUSED.fullmatch(name)}
    model = _check(weights, stored)
    _read_tokenizer(vocabulary, model.config["text_config"]["vocab_size"])
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    about = {"name": _NAME, "source": source, "sha256": digest}
    model_dir.require_space(out, sum(tensor.nbytes for tensor in stored.values()))
    with appear(out) as partial:
        write_json(partial / "config.json", model.config)
        write_json(partial / "reward.json", about)
        write_text(partial / "vocab.txt", "".join(f"{token}\n" for token in _read_vocabulary(vocabulary)))
        tensors.write_tensors(
            partial / "model.safetensors",
            {name: cast(name, tensor, tensor.dtype, weights) for name, tensor in stored.items()},
        )


def _check(file: Path, stored: Mapping[str, Tensor]) -> Model:
    """Returns the architecture whose tensors `stored` are."""
    model = build_model(_CLASS, _find_config(file, stored))
    wanted = torch_shapes(model)
    _require(file, stored, *wanted)
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{file}: tensor {name} has shape {stored[name].shape}, but its other tensors ask for {shape}"
            )
    extra = sorted(stored.keys() - wanted)
    if extra:
        raise UserError(f"{file}: {len(extra)} tensor(s) that are not part of ImageReward, first {extra[0]}")
    return model


def _require(file: Path, stored: Mapping[str, Tensor], *names: str) -> None:
    missing = [name for name in names if name not in stored]
    if missing:
        raise UserError(f"{file}: tensor {missing[0]} is missing; is it the published ImageReward.pt?")


def _find_config(file: Path, stored: Mapping[str, Tensor]) -> NetworkConfig:
    """Returns the config.json of weights, from the shapes of some."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        _require(file, stored, name)
        if len(stored[name].shape) != axes:
            raise UserError(
                f"{file}: tensor {name} has shape {stored[name].shape}; it should have {axes} axes"
            )
        return stored[name].shape

    def layers(part: str, features: int, blocks: str, hidden: str) -> NetworkConfig:
        if features % _HEAD_WIDTH:
            raise UserError(f"{file}: {blocks} are {features} wide; it must be a multiple of {_HEAD_WIDTH}")
        number = re.compile(re.escape(blocks) + r"\.(\d+)\.")
        return {
            "hidden_size": features,
            "intermediate_size": shape(f"{blocks}.0.{hidden}.weight", 2)[0],
            "num_hidden_layers": len({match[1] for name in stored if (match := number.match(name))}),
            "num_attention_heads": features // _HEAD_WIDTH,
            "layer_norm_eps": _LAYER_NORM_EPS[part],
        }

    image, text = "blip.visual_encoder", "blip.text_encoder"
    width, _, patch, _ = shape(f"{image}.patch_embed.proj.weight", 4)
    patches = shape(f"{image}.pos_embed", 3)[1] - 1
    vocabulary, features = shape(f"{text}.embeddings.word_embeddings.weight", 2)
    return {
        "architectures": [_CLASS],
        "vision_config": {
            **layers("vision_config", width, f"{image}.blocks", "mlp.fc1"),
            "image_size": patch * math.isqrt(patches),
            "patch_size": patch,
        },
        "text_config": {
            **layers("text_config", features, f"{text}.encoder.layer", "intermediate.dense"),
            "vocab_size": vocabulary,
            "max_position_embeddings": shape(f"{text}.embeddings.position_embeddings.weight", 2)[0],
        },
        "head_features": [shape(f"mlp.layers.{number}.weight", 2)[0] for number in (0, 2, 4, 6)],
    }


def _read_vocabulary(file: Path) -> list[str]:
    """Returns the tokens, in the order of their ids, of BERT's vocab.txt or tokenizer.json."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; it is vocab.txt of bert-base-uncased")
    if file.suffix == ".json":
        content = model_dir.read_json(file)
        try:
            ids = dict(content["model"]["vocab"])
            tokens = sorted(ids, key=ids.__getitem__)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: no vocabulary; give vocab.txt of bert-base-uncased") from error
        if [ids[token] for token in tokens] != list(range(len(tokens))):
            raise UserError(f"{file}: ids with gaps; give vocab.txt of bert-base-uncased")
        return tokens
    try:
        return file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file; give vocab.txt of bert-base-uncased") from error


def _read_tokenizer(file: Path, embeddings: int) -> "BertTokenizer":
    """Reads BERT's uncased tokenizer with the tokens of BLIP; ids must be below `embeddings`."""
    from transformers import BertTokenizer

    rows = {token: row for row, token in enumerate(_read_vocabulary(file))}
    missing = [token for token in _SPECIAL if token not in rows]
    fault = f"has no {missing[0]}" if missing else f"has {len(rows)} tokens"
    if missing or len(rows) + len(_ADDED) != embeddings:
        raise UserError(
            f"{file}: {fault}; the weights are for {embeddings - len(_ADDED)} tokens of bert-base-uncased"
        )
    tokenizer = BertTokenizer(rows)
    tokenizer.add_tokens(_ADDED, special_tokens=True)
    return tokenizer
