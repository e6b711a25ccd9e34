"""A second command on an output is refused before it reads a model, and what a full disk left is named."""

import contextlib
import errno
import importlib
import json
import os
from types import SimpleNamespace

import pytest

from configs import common
from configs.encode import common as encode_common
from dspo_jax import files, locks
from dspo_jax.data import shards
from dspo_jax.data.encoding import encode
from dspo_jax.data.writer import DatasetWriter
from dspo_jax.evaluation.image_folders import ImageFolder, find_images
from dspo_jax.parallel import processes
from dspo_jax.planning import compilation
from dspo_jax.sampling.folder import claim_output
from dspo_jax.training.run import train
from dspo_jax.training.workdir import claim_workdir

# What writes a folder that grows, and what writes one, or a file, that must not be there before.
FOLDERS = [
    "dspo_jax.sample",
    "dspo_jax.evaluate",
    "dspo_jax.data.label",
    "examples.emoji.demo",
    "examples.emoji.closed_loop",
    "examples.studies.sweep",
    "examples.studies.study",
    "benchmarks.encode",
]
NEW = [("dspo_jax.convert", "import"), ("dspo_jax.convert", "export"), ("dspo_jax.rewards.convert", "")]


class Flags(dict):
    """Flags of a command line, by attribute as values and by key as absl's; what is not given is None."""

    def __getattr__(self, name):
        return self.get(name)

    def __getitem__(self, name):
        return SimpleNamespace(present=name in self, value=self.get(name))


@pytest.fixture
def run(monkeypatch):
    """Calls a module's `main` with flags; there is no model that it could read."""

    def call(module, command="", **values):
        values = {"lora": [], **values}
        module = importlib.import_module(module)
        monkeypatch.setattr(module, "flags", SimpleNamespace(FLAGS=Flags(values)))
        monkeypatch.setattr(processes, "initialize_from_flags", lambda: None)
        module.main(["program", command])

    return call


@pytest.fixture
def by_another(monkeypatch):
    """Holds a lock as another process would, and gives what a second command is then told."""
    monkeypatch.setattr(locks, "_SECONDS_TO_WAIT", 0.0)

    @contextlib.contextmanager
    def hold(lock):
        with lock:
            monkeypatch.setattr(locks, "_held", {})
            yield pytest.raises(ValueError, match=rf"in use by process {os.getpid()} \(.*\) on .* since 2")

    return hold


@pytest.mark.parametrize("module", FOLDERS)
def test_a_command_on_a_folder_in_use_is_refused(module, run, by_another, tmp_path):
    with by_another(locks.claim(tmp_path)) as refused, refused:
        run(module, out=str(tmp_path), model="absent", prompts="absent", reward="absent")


@pytest.mark.parametrize(("module", "command"), NEW)
def test_a_command_on_a_new_name_in_use_is_refused(module, command, run, by_another, tmp_path):
    given = {"run" if command == "export" else "model": "absent"} if command else {"reward": "absent"}
    with by_another(locks.reserve(tmp_path / "new")) as refused, refused:
        run(module, command, out=str(tmp_path / "new"), **given)
    with pytest.raises((ValueError, OSError), match="absent"):
        run(module, command, out=str(tmp_path / "new"), **given)
    assert not list(tmp_path.iterdir())


def test_a_run_in_a_workdir_in_use_is_refused(by_another, tmp_path):
    config = common.get_config()
    config.model = "absent"
    with by_another(locks.claim(tmp_path / "run")) as refused, refused:
        train(config, tmp_path / "run")
    with pytest.raises(OSError, match="absent"):
        train(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_encoding_into_a_folder_in_use_is_refused_but_for_other_shares(by_another, tmp_path):
    config = encode_common.get_config()
    config.model, config.source.name = "absent", "none"
    with by_another(locks.claim(tmp_path, (0, 2))) as refused:
        for share in (None, (0, 2), (1, 3)):
            with refused:
                encode(config, tmp_path, share)
        with pytest.raises(ValueError, match=r"config\.source\.name = 'none': unknown"):
            encode(config, tmp_path, (1, 2))


def no_space(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_was_full_is_in_nobodys_way(monkeypatch, tmp_path):
    out = tmp_path / "out"
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_space)
        with pytest.raises(files.NotWritten, match=r"settings\.json: not written: no space left"):
            claim_output(out, {"steps": 2}, overwrite=False)
        config = {"optimizer": {"schedule": "constant"}}
        with pytest.raises(files.NotWritten, match=r"config\.json: not written: no space left"):
            claim_workdir(tmp_path / "run", config)
        with pytest.raises(files.NotWritten, match=r"plan\.json: not written: no space left"):
            DatasetWriter(tmp_path / "pairs", {}, {"model": "m"}, {"train": 1})
    assert not list(out.iterdir())
    claim_output(out, {"steps": 2}, overwrite=False)
    claim_workdir(tmp_path / "run", config)
    DatasetWriter(tmp_path / "pairs", {}, {"model": "m"}, {"train": 1})
    assert json.loads((out / "settings.json").read_text()) == {"steps": 2}


def test_an_empty_file_of_ours_is_named_with_the_remedy(tmp_path):
    settings = tmp_path / "settings.json"
    (tmp_path / "0-model").mkdir()
    (tmp_path / "0-model" / "00000_0.png").touch()
    settings.touch()
    message = r"settings\.json: empty, as a full disk leaves a file; delete .*, or choose another folder"
    with pytest.raises(ValueError, match=message):
        claim_output(tmp_path, {"steps": 2}, overwrite=False)
    with pytest.raises(ValueError, match=r"settings\.json: empty, .*; draw the images again"):
        find_images(ImageFolder(tmp_path), [], 1)

    (tmp_path / "config.json").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    config = {"optimizer": {"schedule": "constant"}}
    with pytest.raises(ValueError, match=r"config\.json: empty, .*; it says how the run was started"):
        claim_workdir(tmp_path, config)

    unfinished = tmp_path / "pairs" / shards.UNFINISHED
    unfinished.mkdir(parents=True)
    (unfinished / "plan.json").touch()
    (unfinished / "train-00000.json").touch()
    with pytest.raises(ValueError, match=r"plan\.json: empty, .*; delete the folder"):
        DatasetWriter(tmp_path / "pairs", {}, {"model": "m"}, {"train": 1})
    (unfinished / "plan.json").unlink()
    writer = DatasetWriter(tmp_path / "pairs", {}, {"model": "m"}, {"train": 1})
    with pytest.raises(ValueError, match=r"train-00000\.json: empty, .*; delete it, and its shard"):
        writer.is_written("train", 0)


def test_an_empty_file_of_kept_facts_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation, "compile_facts", lambda lowered, trips: {"peak_bytes": 1})
    lowered, device = (
        SimpleNamespace(as_text=lambda: "text"),
        SimpleNamespace(platform="cpu", device_kind="cpu"),
    )
    assert compilation.kept_facts(lowered, device) == {"peak_bytes": 1}
    [path] = (tmp_path / "dspo_jax" / "plans").iterdir()
    monkeypatch.setattr(compilation, "compile_facts", None)
    assert compilation.kept_facts(lowered, device) == {"peak_bytes": 1}
    path.write_text("")
    with pytest.raises(ValueError, match=r"\.json: empty, .*; delete it, and the program is compiled again"):
        compilation.kept_facts(lowered, device)
