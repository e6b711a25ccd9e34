"""The wheel: what is in it, and that it works in a folder without a clone."""

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from processes import ROOT

import dspo_jax

pytestmark = pytest.mark.ci


COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "dspo_jax").rglob("*.py")
    if "\n    cli.run(" in path.read_text()
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as a build leaves folders beside its source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dspo_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    result = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs a command of the wheel, in an empty folder."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def run(*command):
        return subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            cwd=tmp_path_factory.mktemp("empty"),
            env={**os.environ, "PYTHONPATH": str(site), "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
        )

    return run


def test_the_wheel_holds_the_package_the_recipes_and_nothing_else(wheel):
    def modules(folder, prefix):
        return {f"{prefix}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}

    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"dspo_jax-{dspo_jax.__version__}.dist-info"
    of_package = {name for name in names if not name.startswith(info)}
    page = {f"dspo_jax/people/page/{path.name}" for path in (ROOT / "dspo_jax/people/page").iterdir()}
    recipes = modules("configs", "dspo_jax/recipes/configs")
    assert of_package == modules("dspo_jax", "dspo_jax") | recipes | page
    assert f"{info}/licenses/LICENSE" in names


def test_the_version_is_one(wheel):
    version = dspo_jax.__version__
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"dspo_jax-{version}.dist-info/METADATA"))
    assert metadata["Version"] == version
    assert {
        "gpu",
        "gpu-cuda13",
        "tpu",
        "plan",
        "plan-gpu",
        "demo",
        "people",
        "quant",
        "wandb",
        "test",
    } == set(metadata.get_all("Provides-Extra"))
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def admits(lines, python, **versions):
    """Whether what the lines require of these packages, on that Python, lets these versions in."""
    requirements = [Requirement(line) for line in lines]
    return all(
        requirement.specifier.contains(versions[requirement.name])
        for requirement in requirements
        if requirement.name in versions
        and (requirement.marker is None or requirement.marker.evaluate({"python_version": python}))
    )


def test_no_pair_of_jax_and_flax_that_cannot_be_imported_is_allowed():
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for python, jax, flax in [
        ("3.11", "0.10.0", "0.12.0"),
        ("3.12", "0.10.2", "0.12.0"),
        ("3.12", "0.11.2", "0.12.8"),
        ("3.12", "0.12.0.1", "0.12.8"),
        ("3.13", "0.12.0.1", "0.12.9"),
    ]:
        assert not admits(allowed, python, jax=jax, flax=flax), (python, jax, flax)
    for python, jax, flax in [
        ("3.11", "0.10.0", "0.12.1"),
        ("3.11", "0.10.2", "0.12.8"),
        ("3.12", "0.10.0", "0.12.10"),
        ("3.13", "0.12.0.1", "0.12.12"),
    ]:
        assert admits(allowed, python, jax=jax, flax=flax), (python, jax, flax)


def test_a_recipe_is_found_without_a_clone(run):
    result = run("dspo_jax.train", "--config=configs/sd15_dspo.py:paper", "--workdir=run")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: give --config.model=DIR, a diffusers folder; "
        "--config.data.path=DIR, written by dspo_jax.encode\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps(run, command):
    result = run(command, "--help")
    assert result.stdout.startswith(f"usage: python -m {command} ")
    assert result.stderr == ""


@pytest.mark.slow
def test_the_wheel_trains_and_exports(run, shallow_model, tiny_pairs, tmp_path):
    changes = {"batch_size": 4, "steps": 2, "validation.draws": 1, "samples.every": 0}
    changes |= {"model": shallow_model, "data.path": tiny_pairs}
    result = run(
        *("dspo_jax.train", "--config=configs/emoji_dspo.py", f"--workdir={tmp_path / 'run'}"),
        *(f"--config.{key}={value}" for key, value in changes.items()),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'run'}: step 2\n")
    result = run("dspo_jax.convert", "export", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'model'}")
    assert result.returncode == 0, result.stderr
    assert (Path(tmp_path) / "model" / "model_index.json").is_file()
