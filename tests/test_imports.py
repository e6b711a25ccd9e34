"""Training and sampling need neither TensorFlow nor torch, and do not load them where they are installed; and
imports go one way."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest
from example_shards import write_dataset

TESTS = Path(__file__).parent
ROOT = TESTS.parent

IMPORT_EVERYTHING_AND_READ_SHARDS = """
import importlib, pkgutil, sys
import blocked_imports

blocked_imports.install()
import dspo_jax

names = [module.name for module in pkgutil.walk_packages(dspo_jax.__path__, "dspo_jax.")]
for name in names:
    importlib.import_module(name)

import tensorflow_datasets as tfds
from dspo_jax.data import loader

source = tfds.builder_from_directory(sys.argv[1]).as_data_source("train")
print(len(names), len(source), source[0]["moments"].shape)
batch = next(iter(loader.eval_batches(sys.argv[1], batch_size=2)))
print(batch["tokens"].shape)
"""


def run(*arguments):
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_every_module_and_the_shards_work_without_tensorflow_and_torch(tmp_path):
    write_dataset(tmp_path / "shards")
    result = run("-c", IMPORT_EVERYTHING_AND_READ_SHARDS, str(tmp_path / "shards"))
    assert result.returncode == 0, result.stderr
    modules, rest = result.stdout.split(maxsplit=1)
    assert int(modules) >= 10
    assert rest == "10 (2, 4, 4, 6)\n(2, 1, 77)\n"


@pytest.mark.parametrize("name", ["tensorflow", "torch"])
def test_the_block_works(name):
    if name == "torch":
        pytest.importorskip(name)
    result = run("-c", f"import blocked_imports; blocked_imports.install(); import {name}")
    assert result.returncode == 1
    assert result.stderr.endswith(f"AssertionError: {name} was imported\n")


def test_imports_go_up_the_table_of_rooms():
    table = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| `")]
    rows = {
        Path(name).name: number
        for number, line in enumerate(table)
        for name in re.findall("`([^`]+)`", line.split("|")[1])
    }
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): next(
            (rows[part] for part in path.relative_to(ROOT).parts[1:] if part in rows), None
        )
        for path in (ROOT / "dspo_jax").rglob("*.py")
    }
    assert {name for name, row in modules.items() if row is None} == {"dspo_jax", "dspo_jax.data"}
    downwards = [
        f"{name} imports {imported}"
        for name, row in modules.items()
        for imported in imports_of(name, modules)
        if row is not None and (modules[imported] or 0) > row
    ]
    assert not downwards


def imports_of(name: str, modules: Container[str]) -> Iterator[str]:
    """Those of the modules that one of them imports, wherever in its file."""
    path = ROOT / name.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            inside = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (each if each in modules else node.module for each in inside)
