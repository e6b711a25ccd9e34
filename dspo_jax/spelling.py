"""The wording of refusals: the key, the value, the nearest valid spelling and what is allowed."""

import difflib
from collections.abc import Iterable

OBJECTIVE_ALIASES = {
    "dpo": "diffusion_dpo",
    "diffusion-dpo": "diffusion_dpo",
    "diffusion_kto": "kto",
    "diffusion-kto": "kto",
}
"""Other names that the field has for some objectives."""


def nearest(value: str, allowed: Iterable[str]) -> str | None:
    """Returns the allowed name that `value` most resembles, or None when nothing is close."""

    def closeness(name: str) -> tuple[float, bool]:
        # Between equally close names the one with the same first letter: 'dpso' is dspo rather than sdpo.
        return difflib.SequenceMatcher(a=name, b=value).ratio(), name[:1] == value[:1]

    return max(difflib.get_close_matches(value, list(allowed), cutoff=0.5), key=closeness, default=None)


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


def fault_of_text(text: str) -> str | None:
    """Says why a string cannot be a text that people wrote, or None where it can.

    JSON can name half a character ("\\ud83d"), and so does the command line for bytes that are not UTF-8;
    UTF-8 cannot hold one. A null character comes of files in UTF-16, or of bytes that are no text.
    """
    if "\0" in text:
        return "a null character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "half a character"
    return None
