"""Folders of images: notes of how they were drawn that are damaged, and scores that were kept."""

import json

import numpy as np
import pytest
from image_files import image_bytes

from dspo_jax.evaluation.image_folders import ImageFolder, find_images
from dspo_jax.rewards import load_reward
from dspo_jax.rewards.scores import score_files
from dspo_jax.sampling.prompts import Prompt

RECORD = {"file": "0-m/00000_0.png", "prompt": "a", "prompt_index": 0}


@pytest.fixture
def drawn(tmp_path):
    """The file and the manifest line that `sample` writes for one prompt and seed."""
    (tmp_path / "0-m").mkdir()
    (tmp_path / "0-m" / "00000_0.png").write_bytes(image_bytes())
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 3, "models": [{"model": "m"}]}))
    (tmp_path / "manifest.jsonl").write_text(json.dumps(RECORD) + "\n")
    return tmp_path


def test_what_sample_noted_is_read(drawn):
    found = find_images(ImageFolder(drawn), [Prompt("a")], 1)
    assert (found.how["steps"], found.how["model"]) == (3, "m")
    with pytest.raises(ValueError, match="is of 'a', but that prompt is 'b'"):
        find_images(ImageFolder(drawn), [Prompt("b")], 1)


@pytest.mark.parametrize(
    "text", ["", '{"models": [{', "7", "null", '{"models": []}', '{"models": [3]}', "{}"]
)
def test_settings_that_are_damaged_are_named_with_what_to_do(drawn, text):
    (drawn / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings.json: .*; draw the images again, or move them") as caught:
        find_images(ImageFolder(drawn), [Prompt("a")], 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        b'{"file": "0-m/000',
        b"7",
        b"null",
        b"",
        b"[" * 100_000,
        b"\xff",
        json.dumps({**RECORD, "file": 3}).encode(),
        json.dumps({**RECORD, "prompt_index": "0"}).encode(),
        json.dumps({"file": "0-m/00000_0.png"}).encode(),
    ],
)
def test_a_damaged_line_of_the_manifest_is_named_with_what_to_do(drawn, line):
    (drawn / "manifest.jsonl").write_bytes(line + b"\n" + json.dumps(RECORD).encode() + b"\n")
    message = r"manifest.jsonl, line 1: not what sample writes; draw the images again, or move them"
    with pytest.raises(ValueError, match=message) as caught:
        find_images(ImageFolder(drawn), [Prompt("a")], 1)
    assert "\n" not in str(caught.value)


def test_kept_scores_that_are_none_are_passed_over(drawn):
    files, reward = [drawn / "0-m" / "00000_0.png"], load_reward("compressibility", "unused")
    first = score_files(files, ["a"], [reward], drawn / "scores")["compressibility"]
    (kept,) = (drawn / "scores").iterdir()
    good = kept.read_text()
    kept.write_text(
        "7\nnull\n{}\n" + "[" * 100_000 + "\n" + good.replace('"score": ', '"score": "x", "y": ', 1) + good
    )
    again = score_files(files, ["a"], [reward], drawn / "scores")["compressibility"]
    np.testing.assert_array_equal(again, first)
