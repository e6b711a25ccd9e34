"""What a source of preference pairs is, and the sources by name."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from dspo_jax import spelling
from dspo_jax.data.sources.pairs import PreferencePair
from dspo_jax.errors import UserError


class Source(Protocol):
    """What every registered source provides, besides being a frozen dataclass of its arguments.

    Whatever these raise about a file (FileNotFoundError, ValueError) is one line that names it and the fix.
    """

    @property
    def splits(self) -> Sequence[str]:
        """The splits there are."""
        ...

    @property
    def images_per_example(self) -> int:
        """The pair axis P: 2 for pairs, 1 for single images."""
        ...

    def num_examples(self, split: str) -> int:
        """How many rows `pairs(split)` yields; learnt without reading an image."""
        ...

    def left_out(self, split: str) -> Mapping[str, int]:
        """How many rows of the files are not among the split's, by reason: a tie, a filter, ..."""
        ...

    def digest(self, split: str) -> str:
        """Changes when the split's rows do, so that what was made of others is not taken for theirs."""
        ...

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        """Yields rows `start` to `stop` of a split, always in the same order; reads no other row's images."""
        ...


T = TypeVar("T")
_SOURCES: dict[str, Any] = {}


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: makes a source (a dataclass) available to `get_source` under `name`."""

    def decorate(cls: type[T]) -> type[T]:
        _SOURCES[name] = cls
        return cls

    return decorate


def get_source(name: str, **arguments: Any) -> Source:
    """Builds the source registered under `name`.

    Raises:
      ValueError: unknown name or argument; the message gives the nearest valid one.
    """
    if name not in _SOURCES:
        raise UserError(spelling.unknown("config.source.name", name, _SOURCES))
    cls = _SOURCES[name]
    fields = [field.name for field in dataclasses.fields(cls)]
    for argument in arguments:
        if argument not in fields:
            problem = spelling.unknown(f"argument of config.source.name = {name!r}", argument, fields)
            raise UserError(
                f"{problem}; a recipe has the arguments of its own source: take one of {name!r} in "
                "configs/encode/"
            )
    return cls(**arguments)
