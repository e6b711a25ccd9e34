"""Published reward weights -> the folder that a reward is loaded from."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.files import appear, refuse_existing, sha256, write_text
from dspo_jax.hub_cache import is_hub_id, split_hub_id
from dspo_jax.models.model import Model, build_model
from dspo_jax.pipelines import tokenizers
from dspo_jax.rewards import aesthetic, b_vqa, image_reward, open_clip
from dspo_jax.rewards.clip_folder import read_clip, read_tokenizer
from dspo_jax.weights import model_dir, tensors
from dspo_jax.weights.component_files import find_weights
from dspo_jax.weights.components import open_component
from dspo_jax.weights.layout import cast
from dspo_jax.weights.tensors import Tensor
from dspo_jax.weights.torch_files import open_weights

PUBLISHED_HEAD = "sac+logos+ava1-l14-linearMSE.pth"


@dataclasses.dataclass(frozen=True)
class Publication:
    """Arguments of the conversion of a reward's published weights.

    Attributes:
      reward: name of the reward.
      source: what the user calls the weights.
      weights: a file or folder.
      tokenizer: a folder; None for a reward that reads no prompt.
      head: the file of a part that is published by itself; None where there is none.
      out: the folder, which must not exist.
    """

    reward: str
    source: str
    weights: Path
    tokenizer: Path | None
    head: Path | None
    out: Path


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Published weights of a reward, and the function that converts them.

    Attributes:
      source: the hub id of its weights, or their file where they are on no hub.
      write: writes the folder.
      file: of the hub's repository, where it is one file; None for a transformers folder.
      tokenizer: the hub id of a tokenizer for weights that come without; None if it reads no prompt.
      tokenizer_files: the files of a tokenizer, of which a repository has some.
      head: whether a part is published by itself.
    """

    source: str
    write: Callable[[Publication], None]
    file: str | None = None
    tokenizer: str | None = None
    tokenizer_files: tuple[str, ...] = tokenizers.FILES
    head: bool = False


def write_clip(wanted: Publication, *, features: int, activation: str) -> None:
    """Writes the folder of a CLIP reward.

    Args:
      wanted: with weights in a transformers folder of a `CLIPModel`, or a file with open_clip's names.
      features: of the embeddings; CLIPs of another size are refused.
      activation: of the layers, which a file does not tell.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: weights, tokenizer or head are of something else, or damaged.
      OSError: the disk is full.
    """
    model, stored, files = _open_clip(wanted.weights, activation)
    found = model.settings["text"]["projection_dim"]
    if found != features:
        raise UserError(
            f"{wanted.weights}: embeds into {found} features, but the CLIP of {wanted.reward} into "
            f"{features}; is it another one?"
        )
    about: dict[str, object] = {"name": wanted.reward, "source": wanted.source, "sha256": sha256(*files)}
    written = {"model.safetensors": stored}
    if wanted.head:
        head = aesthetic.check_head(wanted.head, open_weights(wanted.head), features)
        about["head"] = {"source": wanted.head.name, "sha256": sha256(wanted.head)}
        written[aesthetic.HEAD] = head
    if wanted.tokenizer:
        read_tokenizer(wanted.tokenizer, model)
    model_dir.require_space(
        wanted.out, sum(each.nbytes for part in written.values() for each in part.values())
    )
    with appear(wanted.out) as partial:
        for name, content in (("config.json", model.config), ("reward.json", about)):
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
            write_text(partial / name, text + "\n")
        if wanted.tokenizer:
            there = [Path(name) for name in tokenizers.FILES if (wanted.tokenizer / name).is_file()]
            model_dir.copy_files(wanted.tokenizer, there, partial)
        for name, part in written.items():
            # Every value passes through here once, so that a damaged one is found now.
            finite = {key: cast(key, each, each.dtype, wanted.weights) for key, each in part.items()}
            tensors.write_tensors(partial / name, finite)


def _open_clip(weights: Path, activation: str) -> tuple[Model, dict[str, Tensor], list[Path]]:
    """Returns the architecture, its tensors under transformers' names, and the files that they are in."""
    if weights.is_dir():
        model = read_clip(weights)
        stored = open_component(weights, model)
        return model, stored, find_weights(weights, model.class_name)
    stored = open_weights(weights)
    if not open_clip.is_open_clip(stored):
        first = min(stored, default="nothing")
        hint = "; give the folder it lies in" if "logit_scale" in stored else ""
        raise UserError(f"{weights}: holds {first} and not a CLIP with open_clip's names{hint}")
    config, stored = open_clip.translate(weights, stored, activation)
    return build_model("CLIPModel", config), stored, [weights]


_LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


_OPENAI_B, _OPENAI_L = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"


_write_h = functools.partial(write_clip, features=1024, activation="gelu")


_write_l = functools.partial(write_clip, features=768, activation="quick_gelu")


_write_b = functools.partial(write_clip, features=512, activation="quick_gelu")


RECIPES: dict[str, Recipe] = {
    "pickscore": Recipe("yuvalkirstain/PickScore_v1", _write_h, tokenizer=_LAION_H),
    "hpsv2.0": Recipe("xswu/HPSv2", _write_h, file="HPS_v2_compressed.pt", tokenizer=_LAION_H),
    "hpsv2.1": Recipe("xswu/HPSv2", _write_h, file="HPS_v2.1_compressed.pt", tokenizer=_LAION_H),
    "clip-b": Recipe(_OPENAI_B, _write_b, tokenizer=_OPENAI_B),
    "clip-h": Recipe(_LAION_H, _write_h, tokenizer=_LAION_H),
    "clip-l": Recipe(_OPENAI_L, _write_l, tokenizer=_OPENAI_L),
    "aesthetic": Recipe(_OPENAI_L, _write_l, head=True),
    "b_vqa": Recipe(
        "model_base_vqa_capfilt_large.pth",  # is on no hub
        lambda wanted: b_vqa.write_weights(wanted.weights, wanted.out, wanted.tokenizer, wanted.source),
        tokenizer="google-bert/bert-base-uncased",
        tokenizer_files=("vocab.txt", "tokenizer.json"),
    ),
    "imagereward": Recipe(
        "THUDM/ImageReward",
        lambda wanted: image_reward.write_weights(
            wanted.weights, wanted.out, wanted.tokenizer, wanted.source
        ),
        file="ImageReward.pt",
        tokenizer="google-bert/bert-base-uncased",
        tokenizer_files=("vocab.txt", "tokenizer.json"),
    ),
}


_MODEL_FILES = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


def _find(source: str, file: str | None, patterns: Sequence[str]) -> Path:
    """Returns a path as it is; of a hub id the download of a file, or a folder of what fits `patterns`."""
    if not is_hub_id(source):
        if not Path(source).exists():
            raise FileNotFoundError(f"{source}: no such file or folder")
        return Path(source)
    import huggingface_hub  # slow to import, and needed here only

    name, revision = split_hub_id(source)
    with model_dir.name_hub_errors(source):
        if file:
            return Path(huggingface_hub.hf_hub_download(name, file, revision=revision))
        download = huggingface_hub.snapshot_download
        return Path(download(name, revision=revision, allow_patterns=list(patterns)))


def prepare(
    reward: str, out: Path, *, weights: str | None, tokenizer: str | None, head: str | None
) -> Publication:
    """Finds or downloads the published files of a reward.

    Args:
      reward: name of the reward.
      out: the folder to write.
      weights: a file, folder or hub id; None for the published one.
      tokenizer: a folder or hub id with it; None for that of the weights or else the published one.
      head: the file of the aesthetic head.

    Raises:
      UserError: an unknown reward, or an option that it does not take or lacks.
      OSError: a path that is not there, or a hub id that cannot be downloaded.
    """
    if reward not in RECIPES:
        raise UserError(spelling.unknown("--reward", reward, RECIPES))
    recipe = RECIPES[reward]
    refuse_existing(out)
    if recipe.head and head is None:
        raise UserError(
            f"--head is missing: name the file {PUBLISHED_HEAD}, which lies on GitHub in "
            "christophschuhmann/improved-aesthetic-predictor"
        )
    if head is not None and not recipe.head:
        raise UserError(f"--head={head}: not an option of {reward}")
    if tokenizer is not None and recipe.tokenizer is None:
        raise UserError(f"--tokenizer={tokenizer}: not an option of {reward}, which reads no prompt")
    source = weights or recipe.source
    found = _find(source, recipe.file, [*_MODEL_FILES, *recipe.tokenizer_files])
    folder = None
    if recipe.tokenizer is not None:
        brought = tokenizers.is_tokenizer(found)
        folder = found if brought and tokenizer is None else _find_tokenizer(tokenizer, recipe)
    name = source if is_hub_id(source) else Path(source).resolve().name
    return Publication(reward, name, found, folder, Path(head) if head else None, out)


def _find_tokenizer(tokenizer: str | None, recipe: Recipe) -> Path:
    try:
        return _find(tokenizer or str(recipe.tokenizer), None, recipe.tokenizer_files)
    except OSError as error:
        needed = ", ".join(recipe.tokenizer_files[:3])
        raise OSError(f"{error}; name a folder that holds a tokenizer ({needed}) with --tokenizer") from error
