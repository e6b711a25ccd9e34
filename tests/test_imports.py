"""Training and sampling need neither TensorFlow nor torch, and do not load them where they are installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from example_shards import write_dataset

TESTS = Path(__file__).parent

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
