"""Overrides of a recipe's keys on the command line: `None` unsets, and a new name drops the old arguments."""

from collections.abc import Collection
from typing import Any

from absl import flags
from ml_collections import config_dict
from ml_collections.config_flags import config_flags, config_path, tuple_parser

from dspo_jax import spelling
from dspo_jax.errors import UserError

_UNSET = "None"


def accept_none() -> None:
    """Lets `--config.KEY=None` parse, for a key of any type; `settle` refuses it where None means nothing."""
    parsers: dict[type, Any] = {bool: flags.BooleanParser, float: flags.FloatParser, int: flags.IntegerParser}
    for kind, parser in {**parsers, str: flags.ArgumentParser}.items():
        config_flags.register_flag_parser_for_type(kind, _or_none(parser, None)())
    config_flags.register_flag_parser_for_type(tuple, _or_none(tuple_parser.TupleParser, ())())


def _or_none(parser: Any, unset: Any) -> Any:
    """Returns a parser like the given one that takes `None` for `unset`."""

    class OrNone(parser):
        def parse(self, argument: object) -> Any:
            return unset if argument == _UNSET else super().parse(argument)

    return OrNone


def settle(values: flags.FlagValues) -> list[str]:
    """Finishes the configs of all config flags after their overrides were parsed.

    Where an override changes the `name` of a group of keys, such as `config.objective.name`, what the recipe
    set for the old name among the group's optional keys is unset; what was overridden stays. Where `steps` is
    overridden, the recipe's `epochs` are unset.

    Args:
      values: the parsed flags; their configs are changed.

    Returns:
      What was dropped, a line for each changed name.

    Raises:
      UserError: an override unsets a key that needs a value.
    """
    lines = []
    for flag_name in values:
        flag = values[flag_name]
        if not config_flags.is_config_flag(flag) or flag.value is None:
            continue
        overridden = config_flags.get_override_values(flag)
        if "steps" in overridden and "epochs" not in overridden and flag.value.get("epochs") is not None:
            lines.append(f"{flag_name}.steps: dropped what the recipe sets: epochs = {flag.value.epochs:g}")
            flag.value.epochs = None
        for key, value in overridden.items():
            *path, last = config_path.split(key)
            group = flag.value
            for part in path:
                group = group[part]
            if value is None and last not in _optional_keys(group):
                raise UserError(
                    f"--{flag_name}.{key}=None: needs a value; without the option it is the recipe's"
                )
            if key == "objective.name":
                group[last] = value = spelling.OBJECTIVE_ALIASES.get(value, value)
            old_name = values[f"{flag_name}.{key}"].default
            if last == "name" and value != old_name:
                given = {name for *where, name in map(config_path.split, overridden) if where == path}
                if dropped := _unset_optional(group, given):
                    lines.append(
                        f"{flag_name}.{key} = {value!r}: dropped what the recipe sets for {old_name!r}: "
                        f"{dropped}"
                    )
    return lines


def _unset_optional(group: config_dict.ConfigDict, given: Collection[str]) -> str:
    """Unsets the optional keys of a group that are not `given`; returns them with their values."""
    unset = {key: group[key] for key in _optional_keys(group) if key not in given and group[key] is not None}
    for key in unset:
        group[key] = None
    return ", ".join(f"{key} = {value!r}" for key, value in unset.items())


def _optional_keys(group: object) -> list[str]:
    """Returns the keys of a group that may be None: its placeholders."""
    if not isinstance(group, config_dict.ConfigDict):
        return []
    items = group.items(preserve_field_references=True)
    return [key for key, value in items if isinstance(value, config_dict.FieldReference)]
