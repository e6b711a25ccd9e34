"""Frozen dataclasses as the schema of a config: a field is a key, with the limit of its value beside it."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from dspo_jax import spelling
from dspo_jax.errors import UserError

Settings = TypeVar("Settings")


class Limit(NamedTuple):
    """A condition on a value: its words, which follow the key in a message, and its test."""

    words: str
    holds: Callable[[Any], bool]


AT_LEAST_1 = Limit("must be at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Limit("must not be negative", lambda value: value >= 0)
FINITE = Limit("must be a finite number", math.isfinite)
FINITE_NOT_NEGATIVE = Limit("must be finite and not negative", lambda value: 0 <= value < math.inf)
PROBABILITY = Limit("must be between 0 and 1", lambda value: 0 <= value <= 1)
DECAY = Limit("must be at least 0 and below 1", lambda value: 0 <= value < 1)


_ELEMENTS = {
    str: Limit("must be a list of texts, each in quotes", lambda each: isinstance(each, str)),
    int: Limit("must be a list of whole numbers", lambda each: type(each) is int),
    float: Limit("must be a list of numbers", lambda each: type(each) in (int, float)),
}
"""Limits of the elements of a `Sequence[...]` field, by their type."""


def limited(limit: Limit) -> Any:
    """Returns a dataclass field whose value must hold a limit."""
    return dataclasses.field(metadata={"limit": limit})


def choice(*allowed: str, optional: bool = False) -> Any:
    """Returns a dataclass field whose value is one of a few names, or None where that is allowed."""
    return dataclasses.field(metadata={"allowed": (*allowed, None) if optional else allowed})


def parse(kind: type[Settings], values: Mapping[str, Any], key: str) -> Settings:
    """Makes a dataclass of settings from a config that has exactly its fields as keys.

    Where `every` is 0, which turns a group off, the limits of the group's other keys are not looked at.

    Args:
      kind: the dataclass. A group of keys is a field that is a dataclass itself, or that has in its metadata
        a function "make" from such a mapping, which checks it. A field with a default is no key.
      values: the config, or a group of it.
      key: name of the group, for messages.

    Raises:
      UserError: a key is unknown or missing, or a value is outside its limit; a value of a field
        `Sequence[...]` is no list, or has an element of another type.
    """
    _check_group(values, key)
    fields = {
        field.name: field
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.default is field.default_factory is dataclasses.MISSING
    }
    for name in values:
        if name not in fields:
            raise UserError(spelling.unknown(f"a key of {key}", name, fields))
    parsed = {}
    for name, field in fields.items():
        if name not in values:
            raise UserError(
                f"{key}.{name}: missing; the recipe must begin with the keys of the common.py beside it"
            )
        value, allowed = values[name], field.metadata.get("allowed")
        if make := field.metadata.get("make"):
            _check_group(value, f"{key}.{name}")
            parsed[name] = make(value)
            continue
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            parsed[name] = parse(field.type, value, f"{key}.{name}")
            continue
        if allowed and value not in allowed:
            names = [each for each in allowed if each is not None]
            raise UserError(spelling.unknown(f"{key}.{name}", value, names))
        limit: Limit | None = field.metadata.get("limit")
        is_off = values.get("every") == 0 and name != "every"
        if limit and not is_off and not _holds(limit, value):
            raise UserError(f"{key}.{name} = {value}: {limit.words}")
        if get_origin(field.type) is Sequence and not is_off:
            elements = _ELEMENTS[get_args(field.type)[0]]
            if not isinstance(value, list | tuple) or not all(map(elements.holds, value)):
                raise UserError(f"{key}.{name} = {value!r}: {elements.words}")
        parsed[name] = value
    return kind(**parsed)


def _check_group(values: object, key: str) -> None:
    if not isinstance(values, Mapping):
        raise UserError(f"{key} = {values!r}: must be a group of keys, as in the common.py beside the recipe")


def _holds(limit: Limit, value: object) -> bool:
    """Returns whether a value, which may be of another type than the limit is for, is within it."""
    try:
        return limit.holds(value)
    except TypeError:
        return False
