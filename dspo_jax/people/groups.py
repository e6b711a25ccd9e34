"""Images that are shown together, read from the folders of `sample`, of single images, or of pairs."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.files import parse_named, sha256
from dspo_jax.images.image_files import ImagePaths
from dspo_jax.json_files import parse

MOST_IMAGES = 9
"""The most images of a group, which the digits of a keyboard rank."""

_OUTSIDE = "--allow_outside"
# Key of the picture that an image is an edit of, which `sample` notes.
_INIT_IMAGE = "init_image"
# Files that name prompts and images, the first that a folder holds, and the keys of the prompt and the image.
_MANIFEST, _PAIRS = "manifest.jsonl", "pairs.jsonl"
_KEYS = {
    _MANIFEST: ("prompt", "file"),
    "metadata.jsonl": ("prompt", "file_name"),
    _PAIRS: ("caption", "winner"),
}


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image that people judge.

    Attributes:
      folder: absolute path of a folder that was given.
      file: path relative to it.
      model: what drew it, or its part in a pair; never shown.
      sha256: of the file.
    """

    folder: str
    file: str
    model: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Images of one prompt that are shown together: two to choose from, or up to nine to rank.

    Attributes:
      prompt: the text above them.
      images: in an order that is never shown.
      answer: of an attention check, which image is right; None where people's opinion is asked.
      init_image: the picture that all of them are edits of, shown beside them; None where they are none.
      disagreement: of rewards on the images; groups with more are shown earlier.
    """

    prompt: str
    images: tuple[ImageFile, ...]
    answer: int | None = None
    init_image: ImageFile | None = None
    disagreement: float = 0.0


class _Drawn(NamedTuple):
    prompt: str
    image: ImageFile
    init_image: ImageFile | None


# Of images of different models, those of one place are compared.
_Place = tuple[object, ...]
_Images = dict[_Place, _Drawn]


def read_groups(folders: Sequence[str], *, rank: bool, allow_outside: bool = False) -> list[Group]:
    """Reads the groups of the folders that `--images` names.

    Of two or more models every two images of the same prompt and seed are a pair; of one model every two
    images of a prompt; of a folder with pairs.jsonl its pairs. Two files of the same content are no pair.

    Args:
      folders: each DIR or NAME=DIR; NAME is the model's.
      rank: whether all images that would be compared in pairs are one group.
      allow_outside: whether images may lie outside their folder.

    Raises:
      FileNotFoundError: a folder, a file that names its images, or an image is missing.
      UserError: what the folders hold cannot be compared.
    """
    models: dict[str, _Images] = {}
    groups: list[Group] = []
    for text in folders:
        label, path = parse_named(text)
        folder = Path(path)
        file = _find_list(folder)
        if file.name == _PAIRS:
            if rank:
                raise UserError(f"--images={text}: holds pairs, which cannot be ranked; leave out --rank")
            groups += _read_pairs(file, allow_outside)
            continue
        for name, of_model in _read_models(folder, file, label, allow_outside).items():
            if name in models:
                raise UserError(f"--images={text}: two are called {name!r}; name it: --images=NAME=DIR")
            models[name] = of_model
    together = list(_match(models)) if len(models) > 1 else list(_by_prompt(*models.values()))
    for drawn in together:
        prompt, _, init_image = drawn[0]
        images = tuple(each.image for each in drawn)
        if not rank:
            pairs = itertools.combinations(images, 2)
            groups += [Group(prompt, pair, init_image=init_image) for pair in pairs]
        elif len(images) > MOST_IMAGES:
            raise UserError(
                f"--rank: {len(images)} images of {prompt!r}, and at most {MOST_IMAGES} can be ranked; leave "
                "it out"
            )
        else:
            groups.append(Group(prompt, images, init_image=init_image))
    different = [group for group in groups if len({image.sha256 for image in group.images}) > 1]
    if not different:
        reason = f": the images of each of {len(groups):,} groups are equal" if groups else ""
        raise UserError(
            f"--images={','.join(folders)}: nothing to compare{reason}; give the images of two models, "
            "several images of each prompt, or a folder with pairs.jsonl"
        )
    if equal := len(groups) - len(different):
        logging.info("%d of %d groups left out: their images are equal", equal, len(groups))
    return different


def read_checks(folder: str | None, *, allow_outside: bool = False) -> list[Group]:
    """Reads attention checks: a folder with pairs.jsonl, whose winners are the right answers."""
    if folder is None:
        return []
    file = Path(folder) / _PAIRS
    if not file.is_file():
        raise FileNotFoundError(f"--checks={folder}: no {_PAIRS} in it, whose winners are the right answers")
    return [dataclasses.replace(group, answer=0) for group in _read_pairs(file, allow_outside)]


def _find_list(folder: Path) -> Path:
    """Returns the file that names the images of a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--images={folder}: no such folder")
    for name in _KEYS:
        if (folder / name).is_file():
            return folder / name
    if re.match(r"\d+-", folder.resolve().name) and (folder.resolve().parent / _MANIFEST).is_file():
        return folder.resolve().parent / _MANIFEST
    raise FileNotFoundError(
        f"--images={folder}: holds none of {', '.join(_KEYS)}, which name prompts and images; write a "
        'metadata.jsonl of lines {"file_name": ..., "prompt": ...}'
    )


def _read_lines(file: Path) -> Iterator[tuple[str, str, Mapping[str, object]]]:
    """Yields where a line stands, its prompt, and its object."""
    key = _KEYS[file.name][0]
    try:
        # Not by splitlines, which ends a line at Unicode's separators too: JSON may hold them.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        row = parse(line, where, "mend or delete the line")
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be an object; mend or delete the line")
        prompt = row.get(key)
        if not isinstance(prompt, str) or spelling.fault_of_text(prompt):
            raise UserError(f"{where}: {key} = {prompt!r}: must be a text; mend or delete the line")
        yield where, prompt, row


def _name_of(row: Mapping[str, object], key: str, where: str) -> str:
    name = row.get(key)
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: {key} = {name!r}: must name an image; mend or delete the line")
    return name


def _open(folder: Path, name: str, model: str, paths: ImagePaths) -> ImageFile:
    path = paths.find(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image")
    return ImageFile(str(folder.resolve()), name, model, sha256(path))


def _open_init_image(
    folder: Path, row: Mapping[str, object], where: str, paths: ImagePaths
) -> ImageFile | None:
    if row.get(_INIT_IMAGE) is None:
        return None
    return _open(folder, _name_of(row, _INIT_IMAGE, where), "", paths)


def _read_pairs(file: Path, allow_outside: bool) -> list[Group]:
    paths = ImagePaths(file.parent, _OUTSIDE, allow_outside)
    groups = []
    for where, prompt, row in _read_lines(file):
        images = (_open(file.parent, _name_of(row, part, where), part, paths) for part in ("winner", "loser"))
        init_image = _open_init_image(file.parent, row, where, paths)
        groups.append(Group(prompt, tuple(images), init_image=init_image))
    return groups


def _read_models(folder: Path, file: Path, label: str, allow_outside: bool) -> dict[str, _Images]:
    """Returns the images of each model."""
    root, within = (folder, "") if file.parent == folder else (file.parent, f"{folder.resolve().name}/")
    paths = ImagePaths(root, _OUTSIDE, allow_outside)
    found: dict[str, _Images] = {}
    seen: dict[str, int] = {}
    for where, prompt, row in _read_lines(file):
        name = _name_of(row, _KEYS[file.name][1], where)
        if not name.startswith(within):
            continue
        if file.name == _MANIFEST:
            part = name.split("/")[0]
            place: _Place = (row.get("prompt_index"), prompt, row.get("seed"))
        else:
            seen[prompt] = seen.get(prompt, -1) + 1
            part, place = "", (prompt, seen[prompt])
        init_image = _open_init_image(root, row, where, paths)
        found.setdefault(part, {})[place] = _Drawn(prompt, _open(root, name, part, paths), init_image)
    if not found:
        raise UserError(f"{file}: names no image of {folder}; draw its images again")
    if len(found) == 1:
        names = {part: label for part in found}
    else:
        # `sample` puts a number before the model's name, which keeps equal names apart.
        short = [re.sub(r"^\d+-", "", part) for part in found]
        names = dict(zip(found, short if len(set(short)) == len(short) else found, strict=True))
    return {
        names[part]: {
            place: drawn._replace(image=dataclasses.replace(drawn.image, model=names[part]))
            for place, drawn in images.items()
        }
        for part, images in found.items()
    }


def _match(models: Mapping[str, _Images]) -> Iterator[tuple[_Drawn, ...]]:
    """Yields an image of each model, all of the same prompt and seed."""
    (first, of_first), *others = models.items()
    for label, images in others:
        alone = {**images, **of_first}
        for place in of_first.keys() & images.keys():
            if _digest(of_first[place].init_image) == _digest(images[place].init_image):
                del alone[place]
        for _, image, _ in alone.values():
            raise UserError(
                f"--images: {first!r} and {label!r} are not of the same prompts, seeds and pictures to edit "
                f"({Path(image.folder) / image.file} has no counterpart); draw both with the same --prompts "
                "and --seeds"
            )
    for place, drawn in of_first.items():
        yield (drawn, *(images[place] for _, images in others))


def _digest(image: ImageFile | None) -> str | None:
    return None if image is None else image.sha256


def _by_prompt(images: _Images | None = None) -> Iterator[tuple[_Drawn, ...]]:
    """Yields the images of one model that are of the same prompt, and edits of the same picture."""
    of_prompt: dict[tuple[str, str | None], list[_Drawn]] = {}
    for drawn in (images or {}).values():
        key = (drawn.prompt, _digest(drawn.init_image))
        of_prompt.setdefault(key, []).append(drawn)
    yield from (tuple(found) for found in of_prompt.values() if len(found) > 1)
