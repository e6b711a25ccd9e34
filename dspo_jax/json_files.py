"""Reads JSON files of any origin; a fault is an error of one line that names the file."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dspo_jax.errors import UserError

MAX_BYTES = 64 << 20
"""More than the manifest of a hundred thousand shards; parsing takes tens of times a file's size."""

JsonObject = dict[str, Any]
"""An object of a JSON file, by key. Whoever reads a value of it checks what kind it is of."""

_Kind = TypeVar("_Kind")
_FIX = "fetch it again"
_KINDS: dict[type | tuple[type, ...], str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    (int, float): "a number",
}

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict = 3, 12, 12, 4
_short.maxstring = _short.maxother = 100


def shown(value: object) -> str:
    """Returns the repr of a value, cut where it is long or deep, for a message of one line."""
    return _short.repr(value)


def read_object(path: Path, fix: str = _FIX) -> JsonObject:
    """Reads a JSON file that holds an object.

    Args:
      path: the file.
      fix: what mends a damaged file; the end of every message.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is no regular file, larger than 64 MiB, empty, not UTF-8, not JSON, nested too deeply,
        gives a key twice with different values, or holds something else than an object.
    """
    content = read_json(path, fix)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object; {fix}")
    return content


def read_json(path: Path, fix: str = _FIX) -> object:
    """Reads a JSON file of any content; raises as `read_object`."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {fix}")
    if not path.is_file():
        raise UserError(f"{path}: is no regular file; {fix}")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(
            f"{path}: has {path.stat().st_size} bytes, and a JSON file of at most {MAX_BYTES} is read; {fix}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {fix}") from error
    if not text.strip():
        raise UserError(f"{path}: empty, as a full disk leaves a file; {fix}")
    return parse(text, str(path), fix)


def parse(text: str, where: str, fix: str = _FIX) -> object:
    """Returns the content of a JSON text; `where` it stands opens every message, `fix` ends it.

    NaN and infinities are accepted, as Python's own reader does: diffusers writes `-Infinity`.

    Raises:
      UserError: as `read_object`.
    """

    def refuse(problem: str) -> NoReturn:
        raise UserError(f"{where}: not valid JSON ({' '.join(problem.split())}); {fix}")

    def to_object(pairs: list[tuple[str, object]]) -> JsonObject:
        found: JsonObject = {}
        for key, value in pairs:
            if key in found and found[key] != value:
                raise UserError(f"key {shown(key)} is there as {shown(found[key])} and as {shown(value)}")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=to_object)
    except ValueError as error:  # a number of thousands of digits raises no JSONDecodeError
        refuse(str(error))
    except RecursionError:
        refuse("nested too deeply")


def member(
    content: object, key: str, kind: type[_Kind] | tuple[type[_Kind], ...], where: object, fix: str = _FIX
) -> _Kind:
    """Returns the value under a dotted key, such as "splits.train.shards".

    Args:
      content: an object that was read.
      key: of it, or of the objects within it.
      kind: what the value must be; a bool is no number.
      where: the file, for the message.
      fix: the end of the message.

    Raises:
      UserError: it is not there, or of another kind.
    """
    value = content
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise UserError(f"{where}: {key} is missing; {fix}")
        value = value[part]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: {key} = {shown(value)} must be {_KINDS[kind]}; {fix}")
    return value
