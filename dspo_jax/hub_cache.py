"""The layout of the model hub's cache, and paths as they are shown elsewhere.

REPOSITORY/snapshots/REVISION links to files in REPOSITORY/blobs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KINDS = ("models--", "datasets--")
_TEXTS = ("prompts", "negative_prompt")


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
