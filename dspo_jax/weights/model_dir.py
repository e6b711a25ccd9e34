"""Model directories: finding one, listing its files, writing a new one."""

import functools
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from absl import logging

from dspo_jax import json_files
from dspo_jax.errors import UserError
from dspo_jax.files import appear, name_write_errors, write_json, write_text
from dspo_jax.hub_cache import find_repository, is_hub_id, split_hub_id
from dspo_jax.json_files import JsonObject
from dspo_jax.weights import tensors
from dspo_jax.weights.component_files import (
    OTHER_WEIGHTS,
    find_weights,
    missing_weights,
    open_stored,
    stored_name,
    weights_file,
)
from dspo_jax.weights.tensors import Tensor

_NOTICES = re.compile(r"(readme|license|licence|notice)", re.IGNORECASE)
_INDICES = re.compile(r"\.index(\.\w+)?\.json$")
# Components without which no picture is drawn, by diffusers' rule; for the others it takes null.
_NEEDED = re.compile(r"unet|transformer|vae|scheduler|(text_encoder|tokenizer)(_\d)?")
_LINK = (
    "{0}: a link to a file outside the model's folder, which is not copied; put the file itself there "
    "(cp -rL copies a folder so)"
)


def read_json(path: Path, fix: str = "fetch the model again") -> JsonObject:
    """Parses one JSON file of a model directory; a missing or malformed one is an error that names it.

    `fix` ends the message. Raises FileNotFoundError and UserError, as `json_files.read_object`.
    """
    if path.name == "model_index.json" and not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; a model directory is a diffusers folder with model_index.json"
        )
    return json_files.read_object(path, fix)


def find_model(model: str | Path) -> Path:
    """Finds a model's local folder: itself, or a hub id's download (safetensors only) in the cache.

    Raises:
      OSError: a hub id that cannot be downloaded and was not before; environment variables of huggingface_hub
        (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) apply.
    """
    if not is_hub_id(model):
        return Path(model)
    import huggingface_hub  # slow to import, and needed here only

    name, revision = split_hub_id(str(model))
    download = functools.partial(huggingface_hub.snapshot_download, name, revision=revision)
    with name_hub_errors(str(model)):
        # The index names the components to fetch: repositories hold the same weights several times over.
        folder = Path(download(allow_patterns=["model_index.json"]))
        components = list_components(read_json(folder / "model_index.json"))
        patterns = ["model_index.json", "README.md", "LICENSE*"]
        for component, class_name in components.items():
            patterns += [f"{component}/*.json", f"{component}/*.txt"]
            weights = weights_file(Path(component), class_name)
            patterns += [str(weights), f"{weights.with_suffix('')}-*.safetensors"]
        return Path(download(allow_patterns=patterns))


@contextmanager
def name_hub_errors(name: str) -> Iterator[None]:
    """Says which hub id could not be downloaded, in one line."""
    from huggingface_hub.errors import HFValidationError  # slow to import, and needed here only

    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{name}: no such folder, and no id of the model hub: {error}") from error
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{name}: no such folder, and the model hub did not give it ({type(error).__name__}: {reason})"
        ) from error


def list_components(index: JsonObject) -> dict[str, str]:
    """Lists the components that a parsed model_index.json names: folder -> class.

    Raises:
      UserError: one would lie outside the model directory.
    """
    components = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    }
    for name in components:
        if not re.fullmatch(r"\w+", name):
            raise UserError(
                f"model_index.json: {name!r} is not the name of a component; fetch the model again"
            )
    return components


def list_files(folder: Path) -> list[Path]:
    """Lists the files of a model directory, relative to it, without other copies of its weights.

    Optional components that diffusers could not load without what is never copied are left out, too:
    `find_unusable` has them.

    Raises:
      FileNotFoundError: a component is missing or has no safetensors weights.
    """
    components = list_components(read_json(folder / "model_index.json"))
    unusable = find_unusable(folder, components)
    files = [path for path in folder.iterdir() if path.is_file() and _NOTICES.match(path.name)]
    files.append(folder / "model_index.json")
    for component, class_name in components.items():
        if component in unusable:
            continue
        if not (folder / component).is_dir():
            raise FileNotFoundError(
                f"{folder / component}: no such folder, but model_index.json names it; fetch the model again"
            )
        files += find_weights(folder / component, class_name)
        files += [
            path
            for path in (folder / component).rglob("*")
            if path.is_file() and path.suffix not in OTHER_WEIGHTS and not _INDICES.search(path.name)
        ]
    return sorted(path.relative_to(folder) for path in files)


def find_unusable(folder: Path, components: Mapping[str, str]) -> dict[str, str]:
    """Lists optional components of a model directory that cannot be copied: component -> reason.

    A safety checker that is a pickle or not there is no reason to refuse a model: diffusers draws without.
    """
    unusable = {}
    for component, class_name in components.items():
        if not _NEEDED.fullmatch(component):
            reason = _find_fault(folder / component, class_name)
            if reason:
                unusable[component] = reason
    # diffusers loads no checker without what it reads pictures through.
    usable = components.keys() - unusable.keys()
    if "safety_checker" in usable and "feature_extractor" not in usable:
        unusable["safety_checker"] = "diffusers loads none without a feature_extractor"
    return unusable


def _find_fault(folder: Path, class_name: str) -> str | None:
    """Explains why diffusers could not load the copy of an optional component; None if it could."""
    if not folder.is_dir():
        return f"{folder}: no such folder"
    if not any(folder.glob("*config.json")):
        return f"{folder}: holds no config"
    try:
        # A network has a config.json; what prepares its pictures has another, and no weights.
        if find_weights(folder, class_name) or not (folder / "config.json").is_file():
            return None
    except FileNotFoundError as error:
        return str(error)
    return str(missing_weights(folder, class_name))


def find_links(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Lists those of `files` (relative to `folder`) that are links to files elsewhere.

    The hub's cache may link as it does: from a snapshot to the blobs of the same repository.
    """
    root = folder.resolve()
    cached = find_repository(root)
    homes = [root, *([cached / "blobs"] if cached else [])]
    return [
        file for file in files if not any((folder / file).resolve().is_relative_to(home) for home in homes)
    ]


def foresee_export(folder: Path) -> list[str]:
    """Says what a later export over this model will leave out or refuse, a line each."""
    unusable = find_unusable(folder, list_components(read_json(folder / "model_index.json")))
    lines = [f"an export will be without {name} ({reason})" for name, reason in unusable.items()]
    links = find_links(folder, list_files(folder))
    return [*lines, *([f"an export will be refused: {_LINK.format(folder / links[0])}"] if links else [])]


def copy_files(folder: Path, files: Collection[Path], out: Path) -> None:
    """Copies `files` (relative to `folder`) to the same places under `out`, byte for byte.

    Raises:
      UserError: one is a link to a file elsewhere, which might be anything of this machine.
    """
    for link in find_links(folder, files):
        raise UserError(_LINK.format(folder / link))
    for file in files:
        target = out / file
        with name_write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target)


def copy_model(folder: Path, files: Collection[Path], out: Path) -> None:
    """Copies a model directory; its model_index.json gets null where a component is left out."""
    copy_files(folder, files, out)
    index = read_json(out / "model_index.json")
    unusable = find_unusable(folder, list_components(index))
    for name, reason in unusable.items():
        logging.warning("%s is left out of the copy: %s", name, reason)
    if unusable:
        write_json(out / "model_index.json", index | {name: [None, None] for name in unusable})


def write_folder(
    out: Path,
    base: Path,
    replaced: Mapping[str, Mapping[str, Tensor]],
    card: str,
    pictures: Mapping[str, Path] = {},
    changes: Mapping[str, JsonObject] = {},
) -> None:
    """Writes a diffusers folder: a copy of `base` with the weights of some components replaced.

    Args:
      out: must not exist; appears under its name when it is complete.
      base: a diffusers folder.
      replaced: component -> its tensors under torch's names, written under those that `base` has for them.
      card: README.md.
      pictures: name beside the card -> file that is copied there.
      changes: JSON file of `base` -> keys that get other values.

    Raises:
      FileNotFoundError: `base` lacks a component that its index names.
      OSError: the disk is too small.
    """
    classes = list_components(read_json(base / "model_index.json"))
    kept = [file for file in list_files(base) if file != Path("README.md")]
    written = {}
    for component, values in replaced.items():
        old = find_weights(base / component, classes[component])
        kept = [file for file in kept if base / file not in old]
        stored = open_stored(base / component, classes[component]) if old else {}
        # Tensors that are no parameters (a constant in old CLIP files) stay.
        written[component] = stored | {stored_name(name, stored): value for name, value in values.items()}
    size = sum((base / file).stat().st_size for file in kept)
    require_space(out, size + sum(value.nbytes for values in written.values() for value in values.values()))
    with appear(out) as partial:
        copy_model(base, kept, partial)
        for component, values in written.items():
            tensors.write_tensors(weights_file(partial / component, classes[component]), values)
        for component, class_name in classes.items():
            if component.startswith("text_encoder"):
                _load_as_float32(partial / component, class_name)
        for file, values in changes.items():
            write_json(partial / file, read_json(partial / file) | values)
        write_text(partial / "README.md", card)
        for name, picture in pictures.items():
            with name_write_errors(out / name):
                shutil.copyfile(picture, partial / name)


def _load_as_float32(folder: Path, class_name: str) -> None:
    """Makes transformers load a text encoder as float32, whatever it is stored as.

    diffusers loads the UNet so unless it is told otherwise, transformers a text encoder as config.json or
    else the weights say; the first picture fails where they differ.
    """
    config = read_json(folder / "config.json")
    named = [key for key in ("torch_dtype", "dtype") if config.get(key) is not None]
    stored = {str(tensor.dtype) for tensor in open_stored(folder, class_name).values()}
    if all(config[key] == "float32" for key in named) and (named or not stored & {"float16", "bfloat16"}):
        return
    write_json(folder / "config.json", config | dict.fromkeys(named or ("torch_dtype",), "float32"))


def require_space(out: Path, nbytes: int) -> None:
    """Refuses a write that does not fit on the disk.

    Raises:
      OSError: fewer than `nbytes` bytes are free where `out` is to be.
    """
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise OSError(
            f"--out={out}: needs {nbytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "make room or choose another disk"
        )
