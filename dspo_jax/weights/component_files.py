"""Weight files of a model's component, and the advice where none can be read."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from absl import logging

from dspo_jax.hub_cache import find_repository
from dspo_jax.weights import tensors
from dspo_jax.weights.tensors import Tensor

# Files of weights that are never read (pickles) or never chosen (other frameworks, half-precision variants).
OTHER_WEIGHTS = {
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".pb",
    ".pt",
    ".pth",
    ".safetensors",
}
# Names that differ in some files: transformers 5 saves a CLIPTextModel without its prefix, which every
# published Stable Diffusion has, and diffusers called the VAE's attention otherwise before 0.15, as the
# published VAEs of Stable Diffusion 1 and 2 still do.
_TEXT_PREFIX = "text_model."
# T5's tokens, which are stored under one or the other name, or both.
_T5_TOKENS = {"shared.weight": "encoder.embed_tokens.weight"}
_OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

_SHARD = r"-\d{5}-of-\d{5}"
# Name of a weights file -> what to do about it, the first that fits; {0} is the file, {1} its variant.
_REMEDIES = (
    (
        rf".+\.(\w+){_SHARD}\.safetensors|.+{_SHARD}\.(\w+)\.safetensors",
        "{0} is a shard of the variant {1}: load the model with variant={1!r} in diffusers and save it with "
        "save_pretrained, whose files have no variant in their names",
    ),
    (
        rf".+{_SHARD}\.safetensors",
        "{0} is a shard, but the index of the shards, *.safetensors.index.json, is not there; fetch that too",
    ),
    (r".+\.safetensors", "{0} is there: give it this name if it holds the whole component"),
    (
        r"openvino.+|.+\.(?:onnx|onnx_data|pb)",
        "{0} is a program for inference, which has no weights to train; take the model that it was made from",
    ),
    (
        r".+\.(?:bin|ckpt|pth?)",
        "{0} is a pickle and is not read; save the model with safe_serialization=True where you trust it",
    ),
    (
        r".+\.(?:msgpack|h5)",
        "{0} holds weights for Flax or TensorFlow, which are not read; load them in a release of diffusers "
        "or transformers that has from_flax=True or from_tf=True, and save_pretrained writes safetensors",
    ),
    (r".+\.gguf", "{0} is quantised, which is not read; take the model that it was made from"),
)


def weights_file(folder: Path, class_name: str) -> Path:
    """Returns the safetensors file of a component; shards are named after it."""
    name = "diffusion_pytorch_model" if _is_of_diffusers(class_name) else "model"
    return folder / f"{name}.safetensors"


def _is_of_diffusers(class_name: str) -> bool:
    return class_name.startswith(("Autoencoder", "UNet", "SD3"))


def _choose(folder: Path, class_name: str) -> list[Path]:
    """Lists the single file and the index of shards, where they exist; the first is the one to read.

    Where both exist, one is out of date. diffusers reads the shards then, transformers the single file, and
    each class is read as by its library.
    """
    file = weights_file(folder, class_name)
    choices = [file, tensors.index_path(file)]
    if _is_of_diffusers(class_name):
        choices.reverse()
    return [path for path in choices if path.is_file()]


def find_weights(folder: Path, class_name: str) -> list[Path]:
    """Finds a component's safetensors files: one, or an index and its shards; none without weights.

    Raises:
      FileNotFoundError: it has weights in other formats only.
    """
    chosen = _choose(folder, class_name)
    if chosen:
        return tensors.list_files(chosen[0])
    if any(path.suffix in OTHER_WEIGHTS for path in folder.iterdir()):
        raise missing_weights(folder, class_name)
    return []


def open_stored(folder: Path, class_name: str) -> dict[str, Tensor]:
    """Returns a component's tensors under the names that its files have for them.

    Raises:
      FileNotFoundError: there is no safetensors file; a pickle is not read.
      UserError: a damaged or truncated file.
    """
    chosen = _choose(folder, class_name)
    if not chosen:
        raise missing_weights(folder, class_name)
    if chosen[1:]:
        library = "diffusers" if _is_of_diffusers(class_name) else "transformers"
        logging.warning(
            "%s: read, and not %s beside it, as %s does; delete the one that is out of date",
            chosen[0],
            chosen[1].name,
            library,
        )
    return tensors.open_tensors(chosen[0])


def missing_weights(folder: Path, class_name: str) -> FileNotFoundError:
    """Makes the error for a component without safetensors weights; it names the files there and the fix."""
    path = weights_file(folder, class_name)
    cached = find_repository(folder)
    hub_id = cached.name.removeprefix("models--").replace("--", "/", 1) if cached else ""
    names = _list_hub_files(hub_id, folder.name) if hub_id else []
    place = f"{hub_id} on the hub has none; " if names else ""
    if not names and folder.is_dir():
        names = [file.name for file in folder.iterdir()]
    return FileNotFoundError(f"{path}: no such file; {place}{_find_remedy(names)}")


def _find_remedy(names: Iterable[str]) -> str:
    names = sorted(names)
    for pattern, remedy in _REMEDIES:
        for match in filter(None, (re.fullmatch(pattern, name) for name in names)):
            return remedy.format(match[0], next(filter(None, match.groups()), ""))
    return "fetch the model again"


def _list_hub_files(repository: str, component: str) -> list[str]:
    """Lists a component's files on the hub, of which only some are downloaded; none offline."""
    import huggingface_hub  # slow to import, and needed here only
    from huggingface_hub.errors import HFValidationError

    try:
        files = huggingface_hub.snapshot_download(repository, allow_patterns=f"{component}/*", dry_run=True)
    except (OSError, HFValidationError):  # no network, or no such id: the message is about what is here
        return []
    return [Path(file.filename).name for file in files]


def stored_name(name: str, stored: Collection[str]) -> str:
    """Returns the name under which a file with the tensors `stored` has the tensor `name`."""
    old = name
    for today, before in _OLD_ATTENTION.items():
        old = old.replace(today, before)
    candidates = (name, name.removeprefix(_TEXT_PREFIX), old, _T5_TOKENS.get(name, name))
    return next((candidate for candidate in candidates if candidate in stored), name)
