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
from tables import each_row

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
from dspo_jax.data import datasets, loader

source = tfds.builder_from_directory(sys.argv[1]).as_data_source("train")
print(len(names), len(source), source[0]["moments"].shape)
batch = next(iter(loader.eval_batches(datasets.read_datasets(sys.argv[1]), batch_size=2)))
print(batch["tokens"].shape)
"""


def run(*arguments):
    path = os.pathsep.join([str(TESTS / "support"), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.ci
def test_every_module_and_the_shards_work_without_tensorflow_and_torch(tmp_path):
    write_dataset(tmp_path / "shards")
    result = run("-c", IMPORT_EVERYTHING_AND_READ_SHARDS, str(tmp_path / "shards"))
    assert result.returncode == 0, result.stderr
    modules, rest = result.stdout.split(maxsplit=1)
    assert int(modules) >= 10
    assert rest == "10 (2, 4, 4, 6)\n(2, 1, 77)\n"


@each_row("name", ["tensorflow", "torch"])
def test_the_block_works(name):
    if name == "torch":
        pytest.importorskip(name)
    result = run("-c", f"import blocked_imports; blocked_imports.install(); import {name}")
    assert result.returncode == 1
    assert result.stderr.endswith(f"AssertionError: {name} was imported\n")


def read_rooms() -> dict[str, int]:
    """Dotted names of the packages and modules in CONTRIBUTING's table of rooms, with their rows."""
    table = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| `")]
    return {
        name.removesuffix("/").removesuffix(".py").replace("/", "."): row
        for row, line in enumerate(table)
        for name in re.findall("`(dspo_jax/[^`]+)`", line.split("|")[1])
    }


def find_room(module: str, rooms: Container[str]) -> str | None:
    """The room that is named nearest above a module; None where there is none."""
    while module and module not in rooms:
        module = module.rpartition(".")[0]
    return module or None


def find_modules() -> set[str]:
    paths = (ROOT / "dspo_jax").rglob("*.py")
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths}


def test_imports_go_up_the_table_of_rooms():
    rooms, modules = read_rooms(), find_modules()
    room_of = {module: find_room(module, rooms) for module in modules}
    assert {module for module, room in room_of.items() if room is None} == {"dspo_jax"}
    commands = {room for room, row in rooms.items() if row == max(rooms.values())}
    assert commands <= modules
    imports = [(module, imported) for module in modules for imported in imports_of(module, modules)]
    assert not [
        f"{module} imports {imported}"
        for module, imported in imports
        if imported in commands
        or (imported != "dspo_jax" and room_of[module] and rooms[room_of[imported]] > rooms[room_of[module]])
    ]


def test_no_module_imports_itself_in_a_circle():
    modules = find_modules()
    left = {module: set(imports_of(module, modules)) - {module, "dspo_jax"} for module in modules}
    while free := {module for module, imported in left.items() if not imported}:
        left = {module: imported - free for module, imported in left.items() if module not in free}
    assert not left


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
