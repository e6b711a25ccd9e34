"""Paths that are URLs: refused for all commands alike, before anything is loaded, compiled or written."""

import re
from collections.abc import Iterator, Mapping

from absl import flags
from ml_collections import config_dict

from dspo_jax.errors import UserError

# With one slash, too: pathlib writes gs://bucket so.
_URL = re.compile(r"(?:[^:/=]*=)?([A-Za-z][A-Za-z0-9+-]+:/.*)", re.DOTALL)
# Texts and addresses, which name no file.
_NO_PATHS = ("negative_prompt", "coordinator_address", "config.samples.prompts")
# Several paths, separated by commas; a prompt may hold commas, too.
_SEVERAL = ("config.data.path", "data")


def refuse_urls(values: flags.FlagValues) -> None:
    """Refuses every flag and key of a config that names a URL in place of a local path.

    Args:
      values: the parsed flags.

    Raises:
      UserError: names the flag and the URL.
    """
    for name in values:
        for key, path in _walk(name, values[name].value):
            if key not in _NO_PATHS:
                for part in path.split(",") if key in _SEVERAL else [path]:
                    refuse_url(f"--{key}", part.strip())


def refuse_url(name: str, path: str) -> None:
    """Raises UserError where the value of `name` is a URL, or NAME=URL."""
    if match := _URL.fullmatch(path):
        raise UserError(
            f"{name}={match[1]}: a URL; only local paths are read and written: mount the bucket or copy it "
            "to a disk, and name that path (docs/launch.md, Data and workdir)"
        )


def _walk(name: str, value: object) -> Iterator[tuple[str, str]]:
    """The strings in the value of a flag, each with the dotted name it is set by."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping | config_dict.ConfigDict):
        for key, inner in value.items():
            yield from _walk(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(name, inner)
