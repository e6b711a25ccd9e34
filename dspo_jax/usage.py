"""The help of a command: its docstring, then its flags in groups, each with its default."""

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from absl import flags
from ml_collections.config_flags import config_flags

from dspo_jax import __version__

# Modules that define flags for several commands, by the heading of their flags.
_GROUPS = {
    "dspo_jax.sampling.drawing_flags": "How images are drawn",
    "dspo_jax.parallel.process_flags": "Several processes as one run",
}
_OPTIONS = "Options"
_OF_LIBRARIES = ("absl.", "ml_collections.", "tensorflow", "orbax", "grain", "etils")
_INDENT = 26

VERSION_FLAG = "--version"


def asks_for_help(argument: str) -> bool:
    """Tells whether a word of a command line asks for help, in any of absl's spellings."""
    return bool(re.fullmatch(r"--?(h|\?|help|helpshort|helpfull)(=(1|t|true))?", argument))


def version() -> str:
    """Returns a line with the versions of this package and of those that decide its numbers."""
    others = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax"))
    return f"dspo_jax {__version__} ({others})"


def own_flags() -> list[str]:
    """Returns the names of the flags that a command defines, without those of libraries."""
    return [
        name
        for name in flags.FLAGS
        if not (flags.FLAGS.find_module_defining_flag(name) or "").startswith(_OF_LIBRARIES)
    ]


def program(main: Callable[..., object]) -> str:
    """Returns what a user types to start the command of `main`."""
    module = sys.modules[main.__module__]
    spec = module.__spec__
    if main.__module__ != "__main__":  # started by a console script, or by `python -m dspo_jax NAME`
        name = Path(sys.argv[0]).name
        return name if name.startswith("dspo-") else f"python -m {main.__module__}"
    return f"python -m {spec.name}" if spec is not None else f"python {Path(sys.argv[0]).name}"


def line(main: Callable[..., object], required: Sequence[str], argument: str = "") -> str:
    """Returns the shortest form of the command, on one line.

    Args:
      main: of the command.
      required: the flags that it cannot do without.
      argument: what stands before the flags.
    """
    needed = [f"--{name}={name.upper()}" for name in required]
    return " ".join([program(main), *([argument] if argument else []), *needed, "[options]"])


def text(main: Callable[..., object], required: Sequence[str], argument: str = "") -> str:
    """Returns the help of a command, for a terminal; arguments as of `line`."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    groups: dict[str, list[str]] = {"Required": list(required), _OPTIONS: []}
    for name in own_flags():
        if name not in required:
            module = flags.FLAGS.find_module_defining_flag(name) or ""
            groups.setdefault(_GROUPS.get(module, _OPTIONS), []).append(name)
    parts = [f"usage: {line(main, required, argument)}", (sys.modules[main.__module__].__doc__ or "").strip()]
    for heading, names in groups.items():
        rows = [row for name in names for row in _rows(flags.FLAGS[name], name in required, width)]
        if any(config_flags.is_config_flag(flags.FLAGS[name]) for name in names):
            rows += _row(
                "--config.KEY=VALUE",
                "Changes a key of it; `python -m dspo_jax list --only=keys`: all of train.",
                width,
            )
        if heading == _OPTIONS:
            rows += _row("-h, --help", "This text.", width)
            rows += _row(VERSION_FLAG, "Versions of this package, jax and flax.", width)
            rows += _row(
                "--verbosity=0", "1 shows more, and the traceback of an error; -1 warnings alone.", width
            )
        if rows:
            parts.append("\n".join([f"{heading}:", *rows]))
    return "\n\n".join(parts)


def _rows(flag: flags.Flag, required: bool, width: int) -> Iterator[str]:
    """Lines for a flag: its name with the default, and what it means."""
    if flag.boolean:
        name = f"--[no]{flag.name}" if flag.default else f"--{flag.name}"
    elif required or flag.default in (None, []):
        name = f"--{flag.name}"
    else:
        name = f"--{flag.name}={(flag.default_as_str or '').strip(chr(39))}"
    meaning = flag.help.split(";\n    repeat this option")[0]  # absl's own addition
    if choices := getattr(flag.parser, "enum_values", None):
        meaning = f"{meaning.split('>: ', 1)[1]} One of: {', '.join(choices)}."
    yield from _row(name, meaning, width)


def _row(name: str, meaning: str, width: int) -> list[str]:
    meant = textwrap.wrap(meaning, width - _INDENT, break_on_hyphens=False)
    if len(name) > _INDENT - 4:
        meant.insert(0, "")
    return [f"  {name if not i else '':{_INDENT - 2}}{part}".rstrip() for i, part in enumerate(meant)]
