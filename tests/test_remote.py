"""Paths that are URLs are refused by every command before anything is loaded or written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags
from processes import ROOT
from tables import each_row

from dspo_jax import urls

ENCODE = f"--config={ROOT}/configs/encode/folder.py"
TRAIN = f"--config={ROOT}/configs/sd15_dspo.py"
ADVICE = (
    "a URL; only local paths are read and written: mount the bucket or copy it to a disk, and name that path "
    "(docs/launch.md, Data and workdir)"
)


def refuse_as_a_process(folder, command, arguments, refused):
    result = subprocess.run(
        [sys.executable, "-m", f"dspo_jax.{command}", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (2, f"error: {refused}=gs://bucket/run: {ADVICE}\n")
    assert not list(folder.iterdir())


@pytest.mark.ci
@each_row(
    ("command", "arguments", "refused"),
    [
        ("convert", ["export", "--run=gs://bucket/run", "--out=new"], "--run"),
        ("data.inspect", ["gs://bucket/run"], "DIR"),
        ("train", ["--config=gs://bucket/run", "--workdir=run"], "--config"),
    ],
)
def test_a_url_is_refused_and_nothing_made(tmp_path, command, arguments, refused):
    refuse_as_a_process(tmp_path, command, arguments, refused)


@pytest.mark.slow
@each_row(
    ("command", "arguments", "refused"),
    [
        ("train", [TRAIN, "--workdir=gs://bucket/run"], "--workdir"),
        ("plan", [TRAIN, "--config.data.path=data,gs://bucket/run"], "--config.data.path"),
        ("encode", [ENCODE, "--out=new", "--config.source.path=gs://bucket/run"], "--config.source.path"),
        ("sample", ["--model=absent", "--prompts=a cat", "--out=gs://bucket/run"], "--out"),
        (
            "evaluate",
            ["--base=m", "--model=ours=gs://bucket/run", "--prompts=p", "--rewards=clip", "--out=new"],
            "--model",
        ),
        ("validate", ["--model=absent", "--data=gs://bucket/run"], "--data"),
        ("data.label", ["--model=m", "--prompts=gs://bucket/run", "--reward=clip", "--out=new"], "--prompts"),
        ("rewards.convert", ["--reward=clip", "--weights=gs://bucket/run", "--out=new"], "--weights"),
    ],
)
def test_so_does_every_command(tmp_path, command, arguments, refused):
    refuse_as_a_process(tmp_path, command, arguments, refused)


@pytest.fixture
def parse(monkeypatch):
    def parse(*arguments):
        """The flags of a command with one flag of each kind."""
        monkeypatch.setattr(sys, "argv", ["command", *arguments])  # where config_flags looks for overrides
        values = flags.FlagValues()
        flags.DEFINE_string("out", None, "", flag_values=values)
        flags.DEFINE_string("negative_prompt", None, "", flag_values=values)
        flags.DEFINE_integer("steps", 1, "", flag_values=values)
        flags.DEFINE_multi_string("model", [], "", flag_values=values)
        config = ConfigDict({"data": {"path": ""}, "samples": {"prompts": ("",)}, "folders": ("",)})
        config_flags.DEFINE_config_dict("config", config, flag_values=values)
        values(sys.argv)
        return values

    return parse


@each_row(
    "argument",
    [
        "--out=s3://bucket/x",
        "--out=gs:/bucket/x",  # str(Path("gs://bucket/x"))
        "--out=file:///x",
        "--out=https://host/x",
        "--model=gs://bucket/x",
        "--model=ours=gs://bucket/x",
        "--config.data.path=gs://bucket/x",
        "--config.folders=('gs://bucket/x',)",
    ],
)
def test_a_url_is_refused_wherever_a_path_stands(parse, argument):
    name = argument.split("=")[0]
    with pytest.raises(ValueError, match=f"^{name}=[a-z0-9]+:/+[a-z/]*x: a URL; only local paths"):
        urls.refuse_urls(parse("--model=here", argument))


def test_local_paths_hub_names_and_texts_are_taken(parse):
    values = parse(
        f"--out={Path('/tmp/a:b/c')}",
        "--model=ours=org/name",
        "--model=./gs:/folder",
        "--model=a cat: 1/2",
        "--out=a cat, style:/sketch",
        "--negative_prompt=http://watermark",
        "--config.samples.prompts=('see http://x', 'gs://text')",
    )
    urls.refuse_urls(values)
