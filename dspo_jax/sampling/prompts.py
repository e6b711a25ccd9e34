"""Prompts: a text, or a file of them in any of the forms that prompt sets come in."""

import csv
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.images.image_files import ImagePaths

COMMAND_ALLOWS_OUTSIDE = "--allow_outside"
"""The option of the commands that allows images outside their folder, as messages name it."""

_TEXT_KEYS = ("prompt", "caption", "text")
_SUFFIXES = (".txt", ".jsonl", ".json", ".tsv", ".csv", ".parquet")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, perhaps with an image to start from.

    Attributes:
      text: may be empty.
      image: the file of the picture to start from (image editing); None starts from noise.
      category: what tables group it under; "" is none.
    """

    text: str
    image: Path | None = None
    category: str = ""


def names_file(text: str) -> bool:
    """Tells whether `read_prompts` takes a text for a file's name; a sentence may end in ".json", too."""
    return Path(text).suffix in _SUFFIXES and (" " not in text or os.path.isfile(text))


def read_prompts(
    text_or_file: str,
    *,
    allow_outside: bool = False,
    image_columns: Sequence[str] = ("image",),
    option: str | None = "--prompts",
) -> list[Prompt]:
    """Returns the prompts of a file, in its order; or one prompt, if the argument ends in none of these.

    `.txt`: one a line, empty lines are passed over. `.jsonl`: objects with `prompt` (or `caption`, `text`)
    and perhaps `image`, a file to start from, relative to this one, and `category`; or strings. `.json`: a
    list of the same. `.tsv` (PartiPrompts), `.csv`: a column `prompt` (or `caption`, `text`), upper or lower
    case, and perhaps `image` and `category`. `.parquet`: the same columns.

    Args:
      text_or_file: the argument.
      allow_outside: whether images may lie outside the folder of the file that names them.
      image_columns: what the image may be called, in lower case.
      option: how messages call the argument; None where the command has no option for it.

    Raises:
      FileNotFoundError: it ends like a file and there is none, or an image is missing.
      UserError: no prompt, a file that cannot be understood, by line, or an image outside the folder.
    """
    path = Path(text_or_file)
    where, named = (option, f"{option}={path}") if option else ("prompt", str(path))
    readers: dict[str, Callable[[Path], Iterable[tuple[str, object]]]] = {
        ".txt": _read_lines,
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".tsv": _read_table,
        ".csv": _read_table,
        ".parquet": functools.partial(_read_parquet, image_columns=image_columns),
    }
    if not names_file(text_or_file):
        if not text_or_file.strip():
            raise UserError(f"{where}: empty; give a text or a file")
        return [Prompt(check_text(text_or_file.strip(), where))]
    if not path.is_file():
        raise FileNotFoundError(f"{named}: no such file")
    try:
        paths = ImagePaths(path.parent, COMMAND_ALLOWS_OUTSIDE, allow_outside)
        prompts = [
            _parse(row, path, place, paths, image_columns) for place, row in readers[path.suffix](path)
        ]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    if not prompts:
        raise UserError(f"{named}: no prompt in it")
    return prompts


def _parse(row: object, path: Path, where: str, paths: ImagePaths, image_columns: Sequence[str]) -> Prompt:
    where = f"{path}: {where}"
    if isinstance(row, str):
        return Prompt(check_text(row.strip(), where))
    if not isinstance(row, dict):
        raise UserError(f"{where}: {row!r}: must be a prompt, or an object with one")
    fields = {str(name).lower(): value for name, value in row.items()}
    text = next((fields[key] for key in _TEXT_KEYS if key in fields), None)
    if not isinstance(text, str):
        found = ", ".join(f"{name}, a {type(value).__name__}" for name, value in row.items())
        raise UserError(f"{where}: no text under {', '.join(_TEXT_KEYS)} (found: {found})")
    text = check_text(text.strip(), where)
    category = check_text(str(fields.get("category") or "").strip(), where)
    column = next((column for column in image_columns if fields.get(column)), None)
    if column is None:
        return Prompt(text, category=category)
    name = fields[column]
    if not isinstance(name, str):
        raise UserError(f"{where}: {column} is a {type(name).__name__}, but must be the path of a file")
    try:
        image = paths.find(name)
    except UserError as error:
        raise UserError(f"{where}: {column} = {name!r}: {error}") from error
    if not image.is_file():
        raise FileNotFoundError(f"{where}: {column} = {name!r}: no such file")
    return Prompt(text, image, category)


def check_text(text: str, where: str) -> str:
    """Returns the text, if it is one.

    Raises:
      UserError: it holds half a character or a null character; the message begins with `where`.
    """
    fault = spelling.fault_of_text(text)
    if fault:
        raise UserError(f"{where}: {text!r} has {fault} in it; write it anew, in UTF-8")
    return text


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    # Not by splitlines, which ends a line at Unicode's separators too: JSON may hold them.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return ((f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip())


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    for where, line in _read_lines(path):
        yield where, _decode(line, path, where)


def _read_json(path: Path) -> Iterable[tuple[str, object]]:
    rows = _decode(path.read_text(encoding="utf-8-sig"), path, "the file")
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a {type(rows).__name__}, but must be a list of prompts")
    return ((f"entry {number}", row) for number, row in enumerate(rows))


def _decode(text: str, path: Path, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, or a number or a nesting without end
        raise UserError(f"{path}: {where}: not JSON ({error})") from error


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    quoting: Literal[0, 3] = csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            for row in reader:
                if None in row:
                    fix = "quote what holds commas" if delimiter == "," else "take tabs out of the fields"
                    raise UserError(
                        f"{path}: line {reader.line_num}: more fields than the first line has names; {fix}"
                    )
                yield f"line {reader.line_num}", {name: value for name, value in row.items() if name}
        except csv.Error as error:
            raise UserError(f"{path}: after line {reader.line_num}: not CSV ({error}); mend it") from error


def _read_parquet(path: Path, image_columns: Sequence[str]) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        names = pq.read_schema(path).names
        wanted = [name for name in names if name.lower() in (*_TEXT_KEYS, *image_columns, "category")]
        # Other columns may hold gigabytes of images.
        rows = pq.read_table(path, columns=wanted).to_pylist() if wanted else [dict.fromkeys(names)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not parquet ({str(error).splitlines()[0]})") from error
    return ((f"row {number}", row) for number, row in enumerate(rows))
