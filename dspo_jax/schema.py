"""Keys of a config.json as data: their defaults, types and limits, and the refusal of everything else.

One table stands beside each class. An absent key has the default of the class in diffusers or transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Final, TypedDict, Unpack

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.json_files import shown

REQUIRED: Final = object()
"""The default of a key that has none."""

_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a short string",
    dict: "an object",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config: its default, and the values that it may have.

    Attributes:
      default: value where the key is absent, or `REQUIRED`.
      kind: int, float (which takes an int too), bool, str or dict; None for any type.
      low, high: bounds of a number, both included.
      allowed: the values that are supported; empty for all.
      listed: "never", one value; "also", one value or a list of them; "always", a list.
      length: how many entries a list may have.
      null: whether it may be null.
    """

    default: object
    kind: type | None = None
    low: float = -math.inf
    high: float = math.inf
    allowed: tuple[object, ...] = ()
    listed: str = "never"
    length: range = range(1, 9)
    null: bool = False

    def problem(self, value: object) -> str | None:
        """Says what is wrong with a value, to follow the key's name in a message; None if nothing is."""
        if value is None and self.null:
            return None
        listed = list(value) if self.listed != "never" and isinstance(value, list | tuple) else None
        is_list, entries = listed is not None, [value] if listed is None else listed
        well_formed = len(entries) in self.length if is_list else self.listed != "always"
        if not (well_formed and all(map(self._is_of_kind, entries))):
            return f"= {shown(value)} must be {self._words()}"
        wrong = [entry for entry in entries if self.allowed and not self._is_allowed(entry)]
        if not wrong:
            return None
        allowed = ", ".join(map(repr, self.allowed))
        if is_list:
            return f"has {shown(wrong[0])}; supported: {allowed}"
        return f"= {shown(value)} is not supported; allowed: {allowed}"

    def _is_of_kind(self, value: object) -> bool:
        if self.kind is str:
            return isinstance(value, str) and len(value) <= 200
        if self.kind in (None, bool, dict):
            return self.kind is None or isinstance(value, self.kind)
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return False
        return self.low <= value <= self.high  # so not where it is NaN

    def _is_allowed(self, value: object) -> bool:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.allowed)

    def _words(self) -> str:
        if self.kind is None:
            words = "one of " + ", ".join(map(repr, self.allowed)) if self.allowed else "of any kind"
        else:
            words = _WORDS[self.kind]
        if self.low > -math.inf:
            words += f" from {self.low:g} to {self.high:g}"
        if self.listed == "always":
            shortest, longest = self.length[0], self.length[-1]
            count = f"{shortest} to {longest}" if shortest < longest else str(longest)
            words = f"a list of {count} entries, each {words}"
        elif self.listed == "also":
            words += f", or a list of at most {self.length[-1]} of them"
        return words + (", or null" if self.null else "")


class _More(TypedDict, total=False):
    allowed: tuple[object, ...]
    listed: str
    length: range
    null: bool


def integer(default: object = REQUIRED, *, low: int = 1, high: int = 1 << 16, **more: Unpack[_More]) -> Key:
    """Makes a key for an integer from `low` to `high`."""
    return Key(default, int, low, high, **more)


def number(default: object = REQUIRED, *, low: float = 0.0, high: float = 1.0, **more: Unpack[_More]) -> Key:
    """Makes a key for a number from `low` to `high`."""
    return Key(default, float, low, high, **more)


def flag(default: bool, **more: Unpack[_More]) -> Key:
    """Makes a key for true or false."""
    return Key(default, bool, **more)


def fixed(*allowed: object) -> Key:
    """Makes a key for a few values that are computed as by the class; the first is the default."""
    return Key(allowed[0], allowed=allowed)


def off(default: bool | None = None) -> Key:
    """Returns a part of the class that is not implemented here, and must be switched off."""
    return Key(default, allowed=(None, False))


def _name(key: str) -> str:
    return key if key.isidentifier() else shown(key)


def check(what: str, config: Mapping[str, object], keys: Mapping[str, Key]) -> None:
    """Refuses a config that lacks a key without a default, or in which a key has a value that is not allowed.

    Keys that are not in the table are not looked at.

    Args:
      what: name of the config, with which the message begins.
      config: the parsed file.
      keys: the table.

    Raises:
      UserError: `WHAT: KEY = VALUE must be ...`.
    """
    missing = [key for key, entry in keys.items() if entry.default is REQUIRED and key not in config]
    if missing:
        raise UserError(f"{what}: missing key(s) {', '.join(missing)}; is the file complete?")
    for key, value in config.items():
        if key in keys and (problem := keys[key].problem(value)):
            raise UserError(f"{what}: {_name(key)} {problem}")


def fill(
    what: str, config: Mapping[str, object], keys: Mapping[str, Key], ignored: Collection[str] = ()
) -> dict[str, object]:
    """Returns the value of every key of a table: the config's, or else the default.

    Args:
      what: name of the config, with which the message begins.
      config: the parsed file.
      keys: the table.
      ignored: keys that may hold anything, as may those that begin with an underscore.

    Raises:
      UserError: as `check`; an unknown key that is not switched off (null, false or 0).
    """
    check(what, config, keys)
    for key, value in config.items():
        if key in keys or key in ignored or key.startswith("_") or value in (None, False):
            continue
        near = spelling.nearest(key, keys)
        hint = f"; did you mean {near!r}?" if near else ""
        raise UserError(f"{what}: unknown key {_name(key)} = {shown(value)} is not supported{hint}")
    return {key: config.get(key, entry.default) for key, entry in keys.items()}
