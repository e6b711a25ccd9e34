"""The layout of the model hub's cache: REPOSITORY/snapshots/REVISION links to files in REPOSITORY/blobs."""

from pathlib import Path

_KINDS = ("models--", "datasets--")


def find_repository(path: Path) -> Path | None:
    """Finds the cached repository, such as `models--org--name`, of a path in a snapshot; None elsewhere."""
    for parent in (path, *path.parents):
        snapshots = parent.parent
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith(_KINDS):
            return snapshots.parent
    return None
