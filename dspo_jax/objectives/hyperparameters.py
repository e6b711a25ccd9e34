"""Fields of a loss with the values that they may have, and the refusal of all others."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.limits import Limit

ZERO_OR_ABOVE = Limit("zero or above", lambda value: value >= 0)
ABOVE_ZERO = Limit("above zero", lambda value: value > 0)
BETWEEN_0_AND_1 = Limit("between 0 and 1", lambda value: 0 <= value <= 1)
ABOVE_0_UP_TO_1 = Limit("above 0 and at most 1", lambda value: 0 < value <= 1)
INSIDE_0_AND_1 = Limit("above 0 and below 1", lambda value: 0 < value < 1)


def number(default: float | None, limit: Limit = ZERO_OR_ABOVE) -> Any:
    """Returns a field for a finite number within a limit; it may be None where its default is None."""
    return dataclasses.field(default=default, metadata={"limit": limit})


def choice(*allowed: str) -> Any:
    """Returns a field for one of a few words, the first of which is the default."""
    return dataclasses.field(default=allowed[0], metadata={"allowed": allowed})


def check(
    fields: Iterable[dataclasses.Field], name: str, given: Mapping[str, object], group: str = "objective"
) -> dict[str, Any]:
    """Returns the arguments of a loss for its class, numbers as floats.

    Args:
      fields: of the class, each a `number`, a `choice`, or True or False by default.
      name: of the loss.
      given: name of a field -> value.
      group: of the config's keys that the fields are, `config.GROUP.FIELD`.

    Raises:
      UserError: an unknown argument, or a value that its field does not allow.
    """
    by_name = {field.name: field for field in fields}
    kind = group.replace("_", " ")
    for argument in given:
        if argument not in by_name:
            problem = spelling.unknown(f"argument of {kind} {name!r}", argument, by_name)
            raise UserError(
                f"{problem}; leave config.{group}.{argument} unset, or change config.{group}.name"
            )
    return {
        argument: _check_value(f"config.{group}.{argument}", by_name[argument], value)
        for argument, value in given.items()
    }


def _check_value(key: str, field: dataclasses.Field, value: object) -> object:
    if allowed := field.metadata.get("allowed"):
        if value not in allowed:
            raise UserError(spelling.unknown(key, str(value), allowed))
        return value
    if isinstance(field.default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{key} = {value!r}: must be True or False")
        return value
    if value is None and field.default is None:
        return None
    limit: Limit = field.metadata.get("limit", ZERO_OR_ABOVE)
    given = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        given = float(value)
    if not math.isfinite(given) or not limit.holds(given):
        raise UserError(f"{key} = {value!r}: must be a finite number, {limit.words}")
    return given
