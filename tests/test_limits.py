"""Settings parsed from a config: what is refused, by key, and what is not looked at."""

import dataclasses
from collections.abc import Sequence

import pytest
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.limits import AT_LEAST_1, NOT_NEGATIVE, choice, limited, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    every: int = limited(NOT_NEGATIVE)
    draws: int = limited(AT_LEAST_1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists:
    every: int
    names: Sequence[str]
    weights: Sequence[float]
    seeds: Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    kind: str = choice("plain", "fancy")
    group: Group
    total: int = dataclasses.field(metadata={"make": lambda keys: sum(keys.values())})
    note: str = "no key"


CONFIG = {"kind": "plain", "group": {"every": 5, "draws": 2}, "total": {"a": 1, "b": 2}}


def test_a_config_becomes_values():
    expected = Whole(kind="plain", group=Group(every=5, draws=2), total=3)
    assert parse(Whole, CONFIG, "config") == expected


@each_row(
    ("changes", "message"),
    [
        ({"kind": "plian"}, r"config\.kind = 'plian': unknown; did you mean 'plain'\?"),
        ({"knid": 1}, r"a key of config = 'knid': unknown; did you mean 'kind'\?"),
        ({"note": "a"}, r"a key of config = 'note': unknown \(allowed: group, kind, total\)"),
        ({"total": 3}, r"config\.total = 3: must be a group of keys"),
        ({"group": 0}, r"config\.group = 0: must be a group of keys"),
        ({"group": None}, r"config\.group = None: must be a group of keys"),
        ({"group": {"every": 5}}, r"config\.group\.draws: missing"),
        ({"group": {"every": 5, "draws": 0}}, r"config\.group\.draws = 0: must be at least 1"),
        ({"group": {"every": 5, "draws": None}}, r"config\.group\.draws = None: must be at least 1"),
        ({"group": {"every": "5", "draws": 1}}, r"config\.group\.every = 5: must not be negative"),
        ({"group": {"every": -1, "draws": 1}}, r"config\.group\.every = -1: must not be negative"),
    ],
)
def test_other_keys_and_values_are_refused(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        parse(Whole, CONFIG | changes, "config")


def test_limits_of_a_group_that_is_off_are_not_looked_at():
    assert parse(Whole, CONFIG | {"group": {"every": 0, "draws": 0}}, "config").group.draws == 0


LISTS = {"every": 1, "names": ("a", "b"), "weights": (1, 0.5), "seeds": [0, 2]}


@each_row(
    ("changes", "message"),
    [
        ({"names": (1, 2)}, r"config\.names = \(1, 2\): must be a list of texts, each in quotes"),
        ({"names": ("a", None)}, r"config\.names = \('a', None\): must be a list of texts"),
        ({"names": "ab"}, r"config\.names = 'ab': must be a list of texts"),
        ({"names": None}, r"config\.names = None: must be a list of texts"),
        ({"weights": ("a",)}, r"config\.weights = \('a',\): must be a list of numbers"),
        ({"weights": (True,)}, r"config\.weights = \(True,\): must be a list of numbers"),
        ({"weights": 1.0}, r"config\.weights = 1\.0: must be a list of numbers"),
        ({"seeds": (0.5,)}, r"config\.seeds = \(0\.5,\): must be a list of whole numbers"),
    ],
)
def test_elements_of_another_type_are_refused(changes, message):
    assert parse(Lists, LISTS, "config") == Lists(**LISTS)
    with pytest.raises(UserError, match=f"^{message}"):
        parse(Lists, LISTS | changes, "config")
    assert parse(Lists, LISTS | changes | {"every": 0}, "config")
