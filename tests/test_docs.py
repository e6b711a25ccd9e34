"""The commands of the documentation: all are understood, and those that can be are run."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folders import publish
from PIL import Image
from processes import ROOT

from dspo_jax.objectives import OBJECTIVES

PAGES = [ROOT / name for name in ("README.md", "benchmarks/README.md", "examples/emoji/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))

# Reads the flags of each command as the command would and stops there; names those that end with an error.
# Each in a process of its own, as flags and recipes are global.
READ_FLAGS = """
import importlib, json, os, runpy, sys, warnings
from dspo_jax import cli

warnings.simplefilter("ignore")  # imported before it is run
asked = json.load(sys.stdin)
for module in {command[0] for command in asked}:
    importlib.import_module(module)
cli.run = lambda main, **how: cli._parse_flags(sys.argv)  # the last line of a command's module
for command in asked:
    if os.fork() == 0:
        sys.argv = command
        runpy.run_module(command[0], run_name="__main__")
        os._exit(0)
    if os.wait()[1]:
        print(json.dumps(command))
"""


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of commands, each with the reason why it is not run here, or nothing."""
    text = page.read_text(encoding="utf-8")
    # Those of other languages are matched too, or the end of one would be taken for a beginning.
    reason, fence = r"(?:<!-- not run by the tests: ([^\n]*) -->\n)?", r"^ *```(\w*)\n(.*?)^ *```$"
    found = re.findall(reason + fence, text, re.MULTILINE | re.DOTALL)
    return [(block, reason) for reason, language, block in found if not language]


def commands(text: str) -> list[str]:
    """The commands among lines, those that go on over several as one, without their comments."""
    return [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def all_commands(packages: str) -> list[str]:
    """Every command that runs a module of these packages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        inline = [
            " ".join(span.split())
            for span in re.findall(r"`([^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
        ]
        lines = [line for block, _ in blocks(page) for line in commands(block)]
        for command in (*lines, *inline):
            if match := re.search(rf"python -m ({packages})\.", command):
                found.append(" ".join(command[match.start() :].split()))
    return list(dict.fromkeys(found))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("packages", "count"),
    # Benchmarks import torch and what they compare with, which takes a while.
    [("dspo_jax|examples", 25), pytest.param("benchmarks", 10, marks=pytest.mark.slow)],
)
def test_the_flags_and_keys_of_every_command_are_there(packages, count):
    asked = []
    for command in all_commands(packages):
        words = [word.replace("RECIPE", "folder") for word in shlex.split(command)[2:]]
        if words[1:]:  # else the page only names it
            asked.append([word for word in words if word != "..."])
    assert len(asked) >= count
    wrong = [
        ["dspo_jax.sample", "--modle=x"],
        ["dspo_jax.train", "--config=configs/sd15_dspo.py", "--config.lm=1"],
    ]
    result = subprocess.run(
        [sys.executable, "-c", READ_FLAGS],
        cwd=ROOT,
        input=json.dumps(asked + wrong),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == wrong, result.stderr


def run(line: str, folder: Path) -> None:
    """Runs a line that begins with "python"."""
    [python, *words] = shlex.split(line)
    assert python == "python"
    result = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": ""},  # not the tests' eight devices
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{line}\n{result.stderr[-3000:]}"


def run_page(page: Path, folder: Path, change: Callable[[str], str] = str) -> int:
    """Runs the commands of a page, in their order, but for those that say why not; returns how many."""
    lines = [line for block, reason in blocks(page) if not reason for line in commands(block)]
    ours = [change(line) for line in lines if line.startswith("python")]
    for line in ours:
        run(line, folder)
    return len(ours)


@pytest.mark.slow
def test_the_quickstart_as_it_stands(tmp_path):
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert run_page(ROOT / "docs" / "quickstart.md", tmp_path) == 8
    wins = json.loads((tmp_path / "runs/quickstart/evaluation/win_rates.json").read_text())
    assert wins


# What a tiny model on ten pairs needs to be quick, by module; what comes last counts.
SMALL = {
    "train": "--config.batch_size=2 --config.accumulation=1 --config.steps=2 --config.samples.every=0 "
    "--config.validation.draws=1",
    "encode": "--config.resolution=16 --config.num_workers=0 --config.source.validation_share=0.3",
    "sample": "--steps=2",
    "evaluate": "--steps=2",
    "data.label": "--steps=2",
}


def on_a_tiny_model(line: str) -> str:
    """A command with what is here in place of what is not: published models, rewards and prompts."""
    for there, here in (
        ("HUB_ID_OR_FOLDER", "SOURCE"),
        ("organisation/name", "SOURCE"),
        ("pickscore", "compressibility"),
        ("parti=PartiPrompts.tsv", "prompts.txt"),
    ):
        line = line.replace(there, here)
    drawn = "_images" in line  # what was drawn elsewhere is drawn no more
    module = line.split()[2].removeprefix("dspo_jax.")
    return line if drawn else f"{line} {SMALL.get(module, '')}"


@pytest.fixture(scope="module")
def after_the_readme(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, ten pairs, prompts, and what the commands of README.md leave."""
    folder = tmp_path_factory.mktemp("docs")
    publish(Path(shutil.copytree(tiny_model, folder / "SOURCE")))
    draw = np.random.default_rng(0)

    def picture(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(path)

    rows = []
    for number in range(10):
        winner, loser = f"{number}a.png", f"{number}b.png"
        for name in (winner, loser):
            picture(folder / "DIR" / name)
        rows.append(json.dumps({"caption": f"picture {number}", "winner": winner, "loser": loser}))
    (folder / "DIR" / "pairs.jsonl").write_text("\n".join(rows))
    (folder / "prompts.txt").write_text("a picture\nanother\n")
    for name in ("THEIRS", "MINE"):
        for prompt, seed in itertools.product(range(2), range(5)):
            picture(folder / name / f"{prompt:05}_{seed}.png")
    (folder / "own.py").write_text("def my_reward(images, prompts):\n    return [x.mean() for x in images]\n")
    assert run_page(ROOT / "README.md", folder, on_a_tiny_model) == 5
    assert (folder / "eval" / "index.html").is_file()
    (folder / "DATA_DIR").symlink_to("data/pairs")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [("data", 8), ("evaluation", 2), ("recipes", 1), ("sampling", 1), ("training", 1), ("weights", 5)],
)
def test_the_commands_of_a_page_on_a_tiny_model(name, count, after_the_readme, tmp_path):
    folder = Path(shutil.copytree(after_the_readme, tmp_path / "here", symlinks=True))
    shutil.rmtree(folder / "eval")
    if name == "weights":
        shutil.rmtree(folder / "exported")
        pairs = "--config.model=MODEL_DIR --config.data.path=DATA_DIR --config.lora.rank=2"
        train = f"python -m dspo_jax.train --config configs/sd15_dspo.py {pairs} --workdir runs/lora"
        run(on_a_tiny_model(train), folder)
        run("python -m dspo_jax.convert export --run=runs/mine --out=fine_tune.safetensors", folder)
    assert run_page(ROOT / "docs" / f"{name}.md", folder, on_a_tiny_model) == count


def test_every_page_is_run_or_says_why_not():
    run_here = {"README", "quickstart", "data", "evaluation", "recipes", "sampling", "training", "weights"}
    for page in PAGES:
        left = [block for block, reason in blocks(page) if not reason and "python -m dspo_jax" in block]
        assert not left or page.stem in run_here, page


@pytest.mark.ci
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_of_a_page_trains_a_model(page, shallow_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("MODEL_DIR").symlink_to(shallow_model)
    Path("pictures").mkdir()
    draw = np.random.default_rng(0)
    for name in (f"{n}{which}.png" for n in range(8) for which in "ab"):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(Path("pictures") / name)
    text = (ROOT / page).read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, page, "exec"), found)
    OBJECTIVES.pop("exponential", None)  # the page's own, which other tests do not know
    assert int(found["state"].step) == (11 if page == "docs/python.md" else 10)
    before = found["pipe"].read_params("unet")["conv_in"]["kernel"]
    assert np.abs(found["state"].params["unet"]["conv_in"]["kernel"] - before).max() > 0
    if page == "docs/python.md":
        with Image.open("fox.png") as drawn:
            assert drawn.size == (16, 16)
        assert found["loss"].shape == (4,)
