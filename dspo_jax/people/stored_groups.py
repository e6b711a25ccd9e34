"""Groups of images in the SQLite file of votes, with folders that can be moved together with the file."""

import dataclasses
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from dspo_jax.people.groups import Group, ImageFile

_VERSION, _OLDER = 2, 1  # the older one has no init_image and no disagreement, and all folders absolute
VERSIONS = (_VERSION, _OLDER)
"""Versions of a file, as `PRAGMA user_version` has them, that are read."""

_NEW_COLUMNS = ("init_image TEXT", "disagreement REAL NOT NULL DEFAULT 0")
SCHEMA = f"""
CREATE TABLE groups (
  id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, images TEXT NOT NULL, answer INTEGER,
  {", ".join(_NEW_COLUMNS)}
);
PRAGMA user_version = {_VERSION};
"""


def version_of(connection: sqlite3.Connection) -> int:
    """Returns the version of a file, 0 where it is no file of votes."""
    [version] = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def read(connection: sqlite3.Connection, path: Path) -> list[Group]:
    """Reads the groups of the file at `path`, with absolute folders."""
    root = path.resolve().parent
    newer = "NULL, 0.0" if version_of(connection) == _OLDER else "init_image, disagreement"
    rows = connection.execute(f"SELECT prompt, images, answer, {newer} FROM groups ORDER BY id")
    return [
        Group(
            prompt,
            tuple(_unpack(image, root) for image in json.loads(images)),
            answer,
            None if init_image is None else _unpack(json.loads(init_image), root),
            disagreement,
        )
        for prompt, images, answer, init_image, disagreement in rows
    ]


def write(connection: sqlite3.Connection, groups: Sequence[Group], path: Path) -> None:
    """Writes the groups, in place of those that are there; an older file becomes one of this version."""
    root = path.resolve().parent
    if version_of(connection) == _OLDER:
        for column in _NEW_COLUMNS:
            connection.execute(f"ALTER TABLE groups ADD COLUMN {column}")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
    connection.executemany(
        "INSERT OR REPLACE INTO groups (id, prompt, images, answer, init_image, disagreement) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        [
            (
                number,
                group.prompt,
                json.dumps([_pack(image, root) for image in group.images]),
                group.answer,
                None if group.init_image is None else json.dumps(_pack(group.init_image, root)),
                group.disagreement,
            )
            for number, group in enumerate(groups)
        ],
    )


def are_same(ours: Sequence[Group], theirs: Sequence[Group]) -> bool:
    """Tells whether groups show the same, wherever the images lie and whatever their models are called."""
    return list(map(_content, ours)) == list(map(_content, theirs))


def _content(group: Group) -> tuple[object, ...]:
    init_image = None if group.init_image is None else group.init_image.sha256
    return group.prompt, [image.sha256 for image in group.images], group.answer, init_image


def _pack(image: ImageFile, root: Path) -> tuple[str, ...]:
    """Returns the fields of an image; a folder beneath that of the votes is relative, to be moved with it."""
    folder = Path(image.folder)
    if folder.is_relative_to(root):
        image = dataclasses.replace(image, folder=str(folder.relative_to(root)))
    return dataclasses.astuple(image)


def _unpack(fields: Sequence[str], root: Path) -> ImageFile:
    image = ImageFile(*fields)
    return dataclasses.replace(image, folder=str(root / image.folder))
