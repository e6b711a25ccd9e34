"""One wording for every refused name: the key, the value, the nearest valid spelling and what is allowed."""

import difflib
from collections.abc import Iterable


def nearest(value: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that `value` most resembles, or None when nothing is close."""
    matches = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(key: str, value: str, allowed: Iterable[str]) -> str:
    """Says that `value` is not among the `allowed` values of `key`, and which of them was probably meant.

    Args:
      key: what was being named, e.g. `"config.objective.name"`.
      value: the refused value.
      allowed: every valid value.

    Returns:
      One line, e.g. `config.objective.name = 'dpso': unknown; did you mean 'dspo'? (allowed: ddpm, dspo,
      sft)`.
    """
    names = sorted(allowed)
    guess = nearest(value, names)
    hint = f"; did you mean {guess!r}?" if guess else ""
    return f"{key} = {value!r}: unknown{hint} (allowed: {', '.join(names)})"
