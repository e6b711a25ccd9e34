"""A table of inputs, and of what follows from each, that one test goes through."""

import functools
import inspect
import itertools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest


def each_row(names: str | Sequence[str], table: Iterable[Any], ids: Sequence[str] | None = None) -> Callable:
    """Runs a test on every row of a table, as a single case that reports each row that fails.

    For quick rows that test one behaviour; `pytest.mark.parametrize`, whose arguments these are, makes each
    row a case. Several tables on one test are multiplied. A row has a `tmp_path`, `monkeypatch`, `caplog` and
    `capsys` as if it were alone, and copies of the files that fixtures made in `tmp_path`. Other fixtures are
    made once for all rows: a test must not change them.

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
        parameters = inspect.signature(function).parameters
        fixtures = [parameter for name, parameter in parameters.items() if name not in product[0][1]]
        own = [name for name in ("subtests", "tmp_path") if name not in parameters]

        @functools.wraps(test)
        def run(*args: Any, subtests: pytest.Subtests, tmp_path: Path, **given: Any) -> None:
            given |= {} if "tmp_path" in own else {"tmp_path": tmp_path}
            for number, (label, values) in enumerate(product):
                with subtests.test(label), ExitStack() as stack:
                    fresh = _fresh(given, tmp_path, tmp_path / f"row{number}", stack)
                    function(*args, **fresh, **values)

        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in own]
        run.__signature__ = inspect.Signature([*fixtures, *added])  # type: ignore[attr-defined]
        run.table = (function, product)  # type: ignore[attr-defined]
        return run

    return decorate


def _shorten(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)[:80]


def _fresh(given: Mapping[str, Any], made_in: Path, folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The fixtures of one row, those that are files in `made_in` as copies in `folder`."""
    fresh = dict(given)
    folder.mkdir()
    for name, value in given.items():
        if name == "monkeypatch":
            fresh[name] = stack.enter_context(pytest.MonkeyPatch.context())
        elif name == "caplog":
            value.clear()
        elif name == "capsys":
            value.readouterr()
        elif isinstance(value, Path) and value.is_relative_to(made_in):
            fresh[name] = copy = folder / value.relative_to(made_in)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if value.is_dir() and value != made_in:
                shutil.copytree(value, copy, symlinks=True)
            elif value.is_file():
                shutil.copy(value, copy)
    return fresh


def slow(*row: Any) -> Any:
    """Returns a row of `pytest.mark.parametrize` that runs with the slow tests alone."""
    return pytest.param(*row, marks=pytest.mark.slow)
