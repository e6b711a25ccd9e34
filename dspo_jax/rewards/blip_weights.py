"""The published weights of BLIP networks, and the folders that rewards are loaded from.

A folder has config.json, model.safetensors, vocab.txt and reward.json.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dspo_jax import json_files
from dspo_jax.errors import UserError
from dspo_jax.files import appear, refuse_existing, write_json, write_text
from dspo_jax.models.config import NetworkConfig
from dspo_jax.models.model import Model, Params
from dspo_jax.weights import model_dir, tensors
from dspo_jax.weights.components import read_model, read_params
from dspo_jax.weights.layout import cast, torch_shapes
from dspo_jax.weights.tensors import Tensor

if TYPE_CHECKING:
    from transformers import BertTokenizer

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Tokens that BLIP adds to BERT's vocabulary; a prompt has one only where it spells the token out.
START, QUESTION = "[DEC]", "[ENC]"
_ADDED = [START, QUESTION]

_HEAD_WIDTH = 64  # width of an attention head in ViT-L/16 and BERT-base; the weights do not tell it
_LAYER_NORM_EPS = {"vision_config": 1e-6, "text_config": 1e-12}


def read_folder(folder: Path, name: str, class_name: str) -> tuple[Model, Params, "BertTokenizer", str]:
    """Reads what `write_folder` wrote: architecture, float32 weights, tokenizer, and which weights these are.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: they are of another reward or do not fit each other.
    """
    file, fix = folder / "reward.json", "convert the weights again"
    about = model_dir.read_json(file, fix)
    if about.get("name") != name:
        raise UserError(f"{file}: is not of the reward {name}; {fix}")
    source, digest = (json_files.member(about, key, str, file, fix) for key in ("source", "sha256"))
    model = read_model(folder)
    if model.class_name != class_name:
        raise UserError(f"{folder / 'config.json'}: is of class {model.class_name}, not {class_name}")
    params = read_params(folder, model, "float32")
    tokenizer = read_tokenizer(folder / "vocab.txt", model.config["text_config"]["vocab_size"])
    return model, params, tokenizer, f"{source} {digest[:8]}"


def write_folder(
    out: Path,
    name: str,
    source: str,
    weights: Path,
    vocabulary: Path,
    model: Model,
    stored: Mapping[str, Tensor],
) -> None:
    """Writes the folder of a reward, which appears when it is complete.

    Args:
      out: must not exist.
      name: of the reward.
      source: what the user calls the weights, which tables print.
      weights: the published file.
      vocabulary: from `find_vocabulary`.
      model: the architecture of the tensors.
      stored: its tensors by name.

    Raises:
      UserError: the folder exists, or the vocabulary is another one.
      OSError: the disk is full.
    """
    refuse_existing(out)
    read_tokenizer(vocabulary, model.config["text_config"]["vocab_size"])
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    model_dir.require_space(out, sum(tensor.nbytes for tensor in stored.values()))
    with appear(out) as partial:
        write_json(partial / "config.json", model.config)
        write_json(partial / "reward.json", {"name": name, "source": source, "sha256": digest})
        write_text(partial / "vocab.txt", "".join(f"{token}\n" for token in read_vocabulary(vocabulary)))
        tensors.write_tensors(
            partial / "model.safetensors",
            {key: cast(key, tensor, tensor.dtype, weights) for key, tensor in stored.items()},
        )


def find_vocabulary(reward: str, tokenizer: Path | None) -> Path:
    """Returns BERT's vocab.txt or tokenizer.json, which a reward needs, of that name or in that folder."""
    if tokenizer is None:
        raise UserError(
            f"reward {reward}: needs a tokenizer: a folder with vocab.txt of bert-base-uncased, or that file"
        )
    if not tokenizer.is_dir():
        return tokenizer
    named = [tokenizer / name for name in ("vocab.txt", "tokenizer.json")]
    return next((file for file in named if file.is_file()), named[0])


def check_tensors(file: Path, stored: Mapping[str, Tensor], model: Model) -> None:
    """Refuses tensors that are not all those of an architecture, in its shapes.

    Raises:
      UserError: names the first that is missing, or has another shape.
    """
    wanted = torch_shapes(model)
    require(file, stored, *wanted)
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{file}: tensor {name} has shape {stored[name].shape}, but its other tensors ask for {shape}"
            )


def require(file: Path, stored: Mapping[str, Tensor], *names: str) -> None:
    """Refuses weights without one of the tensors of these names."""
    missing = [name for name in names if name not in stored]
    if missing:
        raise UserError(f"{file}: tensor {missing[0]} is missing; is it the published file?")


def find_shape(file: Path, stored: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """Returns the shape of a tensor; refuses one that is missing, or has another number of axes."""
    require(file, stored, name)
    if len(stored[name].shape) != axes:
        raise UserError(f"{file}: tensor {name} has shape {stored[name].shape}; it should have {axes} axes")
    return stored[name].shape


def find_config(file: Path, stored: Mapping[str, Tensor], class_name: str, prefix: str = "") -> NetworkConfig:
    """Returns the config.json of the encoders in weights, from the shapes of some.

    Args:
      file: that they are in, for messages.
      stored: tensors by name.
      class_name: of the network.
      prefix: of the names of the encoders' tensors.

    Raises:
      UserError: a tensor is missing, or has another number of axes.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        return find_shape(file, stored, name, axes)

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

    image, text = f"{prefix}visual_encoder", f"{prefix}text_encoder"
    width, _, patch, _ = shape(f"{image}.patch_embed.proj.weight", 4)
    patches = shape(f"{image}.pos_embed", 3)[1] - 1
    vocabulary, features = shape(f"{text}.embeddings.word_embeddings.weight", 2)
    return {
        "architectures": [class_name],
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
    }


def read_vocabulary(file: Path) -> list[str]:
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


def read_tokenizer(file: Path, embeddings: int) -> "BertTokenizer":
    """Reads BERT's uncased tokenizer with the tokens of BLIP; ids must be below `embeddings`."""
    from transformers import BertTokenizer

    rows = {token: row for row, token in enumerate(read_vocabulary(file))}
    missing = [token for token in _SPECIAL if token not in rows]
    fault = f"has no {missing[0]}" if missing else f"has {len(rows)} tokens"
    if missing or len(rows) + len(_ADDED) != embeddings:
        raise UserError(
            f"{file}: {fault}; the weights are for {embeddings - len(_ADDED)} tokens of bert-base-uncased"
        )
    tokenizer = BertTokenizer(rows)
    tokenizer.add_tokens(_ADDED, special_tokens=True)
    return tokenizer
