"""Ids of the model hub's repositories, the layout of its cache, and paths as they are shown elsewhere.

In the cache REPOSITORY/snapshots/REVISION links to files in REPOSITORY/blobs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KINDS = ("models--", "datasets--")
_TEXTS = ("prompts", "negative_prompt")
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w.-]+))?")


def is_hub_id(path: str | Path) -> bool:
    """Returns whether it is written like `owner/name` or `owner/name@revision`, and no such path is here."""
    return bool(_ID.fullmatch(str(path))) and not Path(path).exists()


def split_hub_id(text: str) -> tuple[str, str | None]:
    """Splits `owner/name@revision`, a commit, branch or tag; without one the hub gives its newest commit.

    An id that is not written so comes back whole: huggingface_hub says what is wrong with it.
    """
    found = _ID.fullmatch(text)
    return (found[1], found[2]) if found else (text, None)


def find_repository(path: Path) -> Path | None:
    """Finds the cached repository, such as `models--org--name`, of a path in a snapshot; None elsewhere."""
    for parent in (path, *path.parents):
        snapshots = parent.parent
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith(_KINDS):
            return snapshots.parent
    return None


def hide_folders(value: Any) -> Any:
    """Returns a JSON value in which absolute paths are cut to their last part: for what leaves this machine.

    A path in the hub's cache becomes the id of its repository; relative paths stay. A text may hold several
    paths, separated by commas; prompts stay as they are.
    """
    if isinstance(value, Mapping):
        return {key: inner if key in _TEXTS else hide_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [hide_folders(inner) for inner in value]
    if isinstance(value, str):
        return ",".join(map(_hide_folder, value.split(",")))
    return value


def _hide_folder(text: str) -> str:
    path = Path(text.strip())
    if not path.is_absolute():
        return text
    repository = find_repository(path)
    return repository.name.partition("--")[2].replace("--", "/") if repository else path.name
