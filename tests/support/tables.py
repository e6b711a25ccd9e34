"""A table of inputs, and of what follows from each, that one test goes through."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest


def each_row(names: str | Sequence[str], table: Iterable[Any], ids: Sequence[str] | None = None) -> Callable:
    """Runs a test on every row of a table, as a single case that reports each row that fails.

    For quick rows that test one behaviour; `pytest.mark.parametrize`, whose arguments these are, makes each
    row a case. Several tables on one test are multiplied. A row has a `tmp_path`, `monkeypatch`, `caplog` and
    `capsys` as if it were alone. Other fixtures are made once for all rows: a test must not change them.

    Args:
      names: the arguments of the test that a row gives, as a list or separated by commas.
      table: the rows; plain values where there is one name.
      ids: names of the rows in a report; by default their values.
    """
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    values = [dict(zip(names, row if len(names) > 1 else (row,), strict=True)) for row in table]
    labels = list(ids) if ids else [", ".join(map(_shorten, row.values())) for row in values]
    assert values, f"no row for {', '.join(names)}"

    def decorate(test: Callable) -> Callable:
        function, below = getattr(test, "table", (test, [("", {})]))
        product = [
            (f"{of_row}; {label}".removeprefix("; "), of_values | given)
            for (label, given), (of_row, of_values) in itertools.product(
                zip(labels, values, strict=True), below
            )
        ]

        @functools.wraps(test)
        def run(*args: Any, subtests: pytest.Subtests, **fixtures: Any) -> None:
            for number, (label, given) in enumerate(product):
                with subtests.test(label), ExitStack() as stack:
                    function(*args, **_fresh(fixtures, number, stack), **given)

        parameters = inspect.signature(function).parameters
        fixtures = [parameter for name, parameter in parameters.items() if name not in product[0][1]]
        subtests = inspect.Parameter("subtests", inspect.Parameter.KEYWORD_ONLY)
        run.__signature__ = inspect.Signature([*fixtures, subtests])  # type: ignore[attr-defined]
        run.table = (function, product)  # type: ignore[attr-defined]
        return run

    return decorate


def _shorten(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)[:80]


def _fresh(fixtures: dict[str, Any], number: int, stack: ExitStack) -> dict[str, Any]:
    """The fixtures of one row."""
    mine = dict(fixtures)
    if "tmp_path" in mine:
        folder: Path = mine["tmp_path"] / f"row{number}"
        folder.mkdir()
        mine["tmp_path"] = folder
    if "monkeypatch" in mine:
        mine["monkeypatch"] = stack.enter_context(pytest.MonkeyPatch.context())
    if "caplog" in mine:
        mine["caplog"].clear()
    if "capsys" in mine:
        mine["capsys"].readouterr()
    return mine
