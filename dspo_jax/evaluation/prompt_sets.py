"""The prompt sets of the papers by name, checked for completeness; or the prompts of any file."""

import dataclasses
import functools
import hashlib
import io
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.files import whole
from dspo_jax.hub_cache import is_hub_id, split_hub_id
from dspo_jax.images.image_files import read_image_file
from dspo_jax.sampling.prompts import Prompt, check_text, read_prompts


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts to evaluate with.

    Attributes:
      name: what tables call it.
      prompts: in the order of the files.
    """

    name: str
    prompts: tuple[Prompt, ...]

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the prompts, each with a newline and the bytes of its picture, if any."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(f"{prompt.text}\n".encode())
            if prompt.image:
                digest.update(read_image_file(prompt.image))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of a set: the pattern of its name, its number of prompts, the category of all of them."""

    pattern: str
    count: int
    category: str = ""


@dataclasses.dataclass(frozen=True)
class _Published:
    """Files and digest of a published prompt set.

    Attributes:
      files: every file of the set.
      where: places to get the set from.
      sha256: as in `PromptSet`; None where this project has not seen the files.
    """

    files: tuple[_File, ...]
    where: str
    sha256: str | None = None


_STYLES = ("anime", "concept-art", "paintings", "photo")
_COMPOSITIONS = ("color", "shape", "texture", "spatial", "non_spatial", "complex")

SETS = {
    "parti": _Published(
        (_File("PartiPrompts.tsv", 1632),),
        "nateraw/parti-prompts, github.com/google-research/parti",
        "db0c2ddb1c8b2f7638acf694eb20ba6622d4cd2bddb2a5b66c92beddfbcde284",
    ),
    "hpsv2": _Published(
        tuple(_File(f"{style}.json", 800, style) for style in _STYLES), "zhwang/HPDv2 (its folder benchmark)"
    ),
    "pickapic": _Published((_File("test_unique*.parquet", 500),), "yuvalkirstain/pickapic_v2_no_images"),
    "pickapic-validation": _Published(
        (_File("validation_unique*.parquet", 500),), "yuvalkirstain/pickapic_v2_no_images"
    ),
    "instructpix2pix": _Published((_File("*.parquet", 1000),), "fusing/instructpix2pix-1000-samples"),
    "t2i-compbench": _Published(
        tuple(_File(f"{name}_val.txt", 300, name) for name in _COMPOSITIONS),
        "github.com/Karine-Huang/T2I-CompBench (its folder examples/dataset)",
    ),
}


def read_prompt_set(text: str, images: Path, *, allow_outside: bool = False) -> PromptSet:
    """Reads a published set, `NAME=WHERE`; or the prompts of a file, or one prompt, as `read_prompts`.

    Args:
      text: of a set, NAME is a key of `SETS`, WHERE its file, the folder of its files (searched with its
        subfolders) or a dataset repository of the model hub.
      images: folder that the pictures of a set of edits are unpacked into.
      allow_outside: see `read_prompts`.

    Raises:
      UserError: an unknown name; another number of prompts, or other prompts, than the set has.
      OSError: a file is missing, or the hub did not give the set.
    """
    name, equals, where = text.partition("=")
    if text in SETS:
        places = SETS[text].where
        raise UserError(f"--prompts={text}: say where it is, {text}=FILE, FOLDER or HUB_ID (from {places})")
    if not equals or Path(text).is_file() or not re.fullmatch(r"[\w.-]+", name) or " " in where:
        prompts = read_prompts(text, allow_outside=allow_outside)
        source = Path(text).name if Path(text).is_file() else "a text"
        return PromptSet(source, tuple(prompts))
    if name not in SETS:
        raise UserError(spelling.unknown("--prompts", name, SETS))
    published = SETS[name]
    prompts = []
    for file, paths in zip(published.files, _find(name, where), strict=True):
        found = [prompt for path in paths for prompt in _read(path, name, images)]
        if len(found) != file.count:
            raise UserError(
                f"{paths[0]}: {len(found):,} prompts, but {name} has {file.count:,} there; "
                + _fix(published.where, paths[0])
            )
        prompts += [dataclasses.replace(p, category=p.category or file.category) for p in found]
    complete = PromptSet(name, tuple(prompts))
    if published.sha256 not in (None, complete.sha256):
        raise UserError(
            f"--prompts={text}: not the prompts of {name}, their sha256 is {complete.sha256} and must be "
            f"{published.sha256}; " + _fix(published.where, where)
        )
    return complete


def _fix(where: str, path: str | Path) -> str:
    return f"fetch it again (from {where}), or give what you have without the name: --prompts={path}"


def _find(name: str, where: str) -> list[list[Path]]:
    """Lists, for each file of a set, the paths that have its name; several are parts of one file."""
    files, root = SETS[name].files, Path(where)
    if root.is_file():
        if len(files) > 1:
            raise UserError(f"--prompts={name}={where}: {name} has {len(files)} files; give their folder")
        return [[root]]
    if is_hub_id(where):
        root = _download(name, where)
    elif not root.is_dir():
        raise FileNotFoundError(f"--prompts={name}={where}: no such file or folder")
    found = [sorted(root.rglob(file.pattern)) for file in files]
    for file, paths in zip(files, found, strict=True):
        if not paths:
            raise FileNotFoundError(
                f"--prompts={name}={where}: no {file.pattern} in it; fetch it (from {SETS[name].where})"
            )
    return found


def _download(name: str, repository: str) -> Path:
    """Returns the folder in the hub's cache with the files of the set."""
    import huggingface_hub  # slow to import, and needed for the hub only
    from huggingface_hub.errors import HTTPError  # raised where there is no connection; not an OSError

    patterns = [f"{folder}{file.pattern}" for file in SETS[name].files for folder in ("", "*/")]
    owner_and_name, revision = split_hub_id(repository)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                owner_and_name, repo_type="dataset", revision=revision, allow_patterns=patterns
            )
        )
    except (OSError, HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"--prompts={name}={repository}: no such file or folder, and the hub gave no dataset of this "
            f"name ({type(error).__name__}: {reason})"
        ) from error


def _read(path: Path, name: str, images: Path) -> list[Prompt]:
    if name != "instructpix2pix" or path.suffix != ".parquet":
        return read_prompts(str(path))
    try:
        names = pq.read_schema(path).names
        for column in ("edit_prompt", "input_image"):
            if column not in names:
                raise UserError(f"{path}: no column {column!r} (found: {', '.join(names)})")
        rows = pq.read_table(path, columns=["edit_prompt", "input_image"]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not parquet ({str(error).splitlines()[0]})") from error
    folder = images / path.stem  # a set may have several files
    folder.mkdir(parents=True, exist_ok=True)
    prompts = []
    for i, row in enumerate(rows):
        text, image = row["edit_prompt"], row["input_image"]
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(text, str) or not isinstance(content, bytes):
            raise UserError(f"{path}: row {i}: needs a text as edit_prompt and bytes as input_image")
        text = check_text(text.strip(), f"{path}: row {i}")
        prompts.append(Prompt(text, _unpack(content, folder / f"{i:05d}", path)))
    return prompts


def _unpack(content: bytes, stem: Path, source: Path) -> Path:
    """Writes a picture, unless it is there; several processes may do so at once."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            file = stem.with_suffix(f".{image.format}".lower())
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: a broken chunk of a PNG
        raise UserError(f"{source}: row {int(stem.name)}: undecodable image ({error})") from error
    if not file.is_file() or file.stat().st_size != len(content):
        with whole(file, shared=True) as partial:
            partial.write_bytes(content)
    return file
