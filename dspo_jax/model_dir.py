"""Model directories: where one is, which files belong to it, and how a new one is written."""

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspo_jax import tensors
from dspo_jax.files import appear, name_write_errors
from dspo_jax.tensors import Tensor

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Files of weights that are never read (pickles) or never chosen (other frameworks, half-precision variants).
_OTHER_WEIGHTS = {
    ".bin",
    ".ckpt",
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
_OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
_NOTICES = re.compile(r"(readme|license|licence|notice)", re.IGNORECASE)


def read_json(path: Path) -> dict[str, Any]:
    """Parse one JSON file of a model directory; a missing or malformed one is an error that names it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a model directory is a diffusers folder with model_index.json"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); fetch the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object; fetch the model again")
    return content


def is_hub_id(model: str | Path) -> bool:
    """Whether `model` is written like `organisation/name` and no such path is here."""
    return bool(_HUB_ID.fullmatch(str(model))) and not Path(model).exists()


def find_model(model: str | Path) -> Path:
    """The local folder of a model: itself, or a hub id's download (safetensors only) in the hub's cache.

    Raises:
      OSError: a hub id that cannot be downloaded and was not before; environment variables of huggingface_hub
        (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) apply.
    """
    if not is_hub_id(model):
        return Path(model)
    import huggingface_hub  # slow to import, and needed here only

    name = str(model)
    with name_hub_errors(name):
        # What there is to fetch stands in the index: repositories hold the same weights several times over.
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=["model_index.json"]))
        components = list_components(read_json(folder / "model_index.json"))
        patterns = ["model_index.json", "README.md", "LICENSE*"]
        for component, class_name in components.items():
            patterns += [f"{component}/*.json", f"{component}/*.txt"]
            weights = weights_file(Path(component), class_name)
            patterns += [str(weights), f"{weights.with_suffix('')}-*.safetensors"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))


@contextmanager
def name_hub_errors(name: str) -> Iterator[None]:
    """Says which hub id could not be downloaded, in one line."""
    try:
        yield
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{name}: no such folder, and the model hub did not give it ({type(error).__name__}: {reason})"
        ) from error


def list_components(index: Mapping[str, Any]) -> dict[str, str]:
    """Folder -> class of the components that a parsed model_index.json names.

    Raises:
      ValueError: one would lie outside the model directory.
    """
    components = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    }
    for name in components:
        if not re.fullmatch(r"\w+", name):
            raise ValueError(
                f"model_index.json: {name!r} is not the name of a component; fetch the model again"
            )
    return components


def weights_file(folder: Path, class_name: str) -> Path:
    """The safetensors file of a component; shards are named after it."""
    by_diffusers = class_name.startswith(("Autoencoder", "UNet"))
    return folder / ("diffusion_pytorch_model.safetensors" if by_diffusers else "model.safetensors")


def find_weights(folder: Path, class_name: str) -> list[Path]:
    """The safetensors files of a component: one, or an index and its shards; none where it has no weights.

    Raises:
      FileNotFoundError: it has weights in other formats only.
    """
    path = weights_file(folder, class_name)
    index = tensors.index_path(path)
    if not path.is_file() and index.is_file():
        return [index, *tensors.list_files(path)]
    if path.is_file() or not any(file.suffix in _OTHER_WEIGHTS for file in folder.iterdir()):
        return [path] if path.is_file() else []
    raise _missing_weights(path)


def open_stored(folder: Path, class_name: str) -> dict[str, Tensor]:
    """A component's tensors under the names that its files have for them.

    Raises:
      FileNotFoundError: there is no safetensors file; a pickle is not read.
      ValueError: a damaged or truncated file.
    """
    path = weights_file(folder, class_name)
    if not path.is_file() and not tensors.index_path(path).is_file():
        raise _missing_weights(path)
    return tensors.open_tensors(path)


def _missing_weights(path: Path) -> FileNotFoundError:
    folder = path.parent
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    variants = sorted(file.name for file in folder.glob("*.safetensors"))
    if pickles:
        fix = f"{pickles[0]} is a pickle and is not read; save the model with safe_serialization=True"
    elif variants:
        fix = f"{variants[0]} is there: give it this name if it holds the whole component"
    else:
        fix = "fetch the model again"
    return FileNotFoundError(f"{path}: no such file; {fix}")


def stored_name(name: str, stored: Collection[str]) -> str:
    """What a file with the tensors `stored` calls `name`."""
    old = name
    for today, before in _OLD_ATTENTION.items():
        old = old.replace(today, before)
    candidates = (name, name.removeprefix(_TEXT_PREFIX), old)
    return next((candidate for candidate in candidates if candidate in stored), name)


def list_files(folder: Path) -> list[Path]:
    """The files that make up a model directory, relative to it; other copies of its weights are left out.

    Raises:
      FileNotFoundError: a component is missing or has no safetensors weights.
    """
    components = list_components(read_json(folder / "model_index.json"))
    files = [path for path in folder.iterdir() if path.is_file() and _NOTICES.match(path.name)]
    files.append(folder / "model_index.json")
    for component, class_name in components.items():
        if not (folder / component).is_dir():
            raise FileNotFoundError(
                f"{folder / component}: no such folder, but model_index.json names it; fetch the model again"
            )
        files += find_weights(folder / component, class_name)
        files += [
            path
            for path in (folder / component).rglob("*")
            if path.is_file()
            and path.suffix not in _OTHER_WEIGHTS
            and not path.name.endswith(".safetensors.index.json")
        ]
    return sorted(path.relative_to(folder) for path in files)


def copy_files(folder: Path, files: Iterable[Path], out: Path) -> None:
    """Copy `files` (relative to `folder`) to the same places under `out`, byte for byte."""
    for file in files:
        target = out / file
        with name_write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target)


def write_folder(out: Path, base: Path, replaced: Mapping[str, Mapping[str, Tensor]], card: str) -> None:
    """Write a diffusers folder that is `base`, file by file, but for the weights of some components.

    Args:
      out: must not exist; appears under its name when it is complete.
      base: a diffusers folder.
      replaced: component -> its tensors under torch's names, written under those that `base` has for them.
      card: README.md.

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
        # What is there besides parameters (a constant in old CLIP files) stays.
        written[component] = stored | {stored_name(name, stored): value for name, value in values.items()}
    size = sum((base / file).stat().st_size for file in kept)
    require_space(out, size + sum(value.nbytes for values in written.values() for value in values.values()))
    with appear(out) as partial:
        copy_files(base, kept, partial)
        for component, values in written.items():
            tensors.write_tensors(weights_file(partial / component, classes[component]), values)
        for component, class_name in classes.items():
            if component.startswith("text_encoder"):
                _load_as_float32(partial / component, class_name)
        with name_write_errors(partial / "README.md"):
            (partial / "README.md").write_text(card, encoding="utf-8")


def _load_as_float32(folder: Path, class_name: str) -> None:
    """Have transformers load a text encoder as float32, whatever it is stored as.

    diffusers loads the UNet so unless it is told otherwise, transformers a text encoder as config.json or
    else the weights say; the first picture fails where they differ.
    """
    config = read_json(folder / "config.json")
    named = [key for key in ("torch_dtype", "dtype") if config.get(key) is not None]
    stored = {str(tensor.dtype) for tensor in open_stored(folder, class_name).values()}
    if all(config[key] == "float32" for key in named) and (named or not stored & {"float16", "bfloat16"}):
        return
    content = config | dict.fromkeys(named or ("torch_dtype",), "float32")
    with tensors.name_write_errors(folder / "config.json"):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def require_space(out: Path, nbytes: int) -> None:
    """Refuse to begin what does not fit on the disk.

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
