"""Every JSON file of a model folder, spoilt in every way: accepted, or refused in one line that names it."""

import contextlib
import copy
import json
import os
import re
import shutil
import time

import numpy as np
import pytest
import tiny_clip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import each_row
from tiny_model import write_model, write_pairs

from dspo_jax import json_files
from dspo_jax.data import shards
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.rewards.clip_folder import read_clip
from dspo_jax.samplers import SAMPLERS, make_sampler
from dspo_jax.weights.components import read_models

NESTED = [[[[[[[[1]]]]]]]]
VALUES = [
    *(None, True, False, 0, 1, 2, -1, 3, 10**9, 10**400, 0.5, 1.0, -0.0, 1e300),
    *(float("nan"), float("inf"), -float("inf"), "", "2", "a\nb", "\ud800", "x" * 10_000),
    *([], [1], [8, 16], [8, 16, 24], [8] * 10_000, [None, None], ["a"], [True], [0.5, 0.5], [[1, 2], [3]]),
    *({}, {"a": 1}, NESTED),
]
SECONDS = 30  # on two busy cores; the largest network that a config may ask for is described in a third


def mutations(content, seed, count):
    """`count` copies of an object: a key that has one of `VALUES`, is gone, or is misspelt or new."""
    draw = np.random.default_rng(seed)
    keys = sorted(content)
    every = [(key, value) for key in [*keys, "new_key", "a b\n"] for value in range(-2, len(VALUES))]
    for number in draw.permutation(len(every))[:count]:
        key, value = every[number]
        changed = copy.deepcopy(content)
        if value >= 0:
            changed[key] = VALUES[value]
        elif value == -1:
            changed.pop(key, None)
        elif key in changed:
            changed[key[:-1]] = changed.pop(key)
        yield changed


@contextlib.contextmanager
def spoilt(path, content):
    """The file with other content for as long as the block lasts."""
    before = path.read_bytes()
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    try:
        yield
    finally:
        path.write_bytes(before)


def is_refused(path, action):
    """Whether `action` refuses the file in one line; anything but that or success fails the test."""
    began = time.monotonic()
    try:
        action()
    except (ValueError, OSError) as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 1500
        message.encode()  # can be printed
        assert str(path.parents[1]) in message  # of another file where two disagree
        assert re.search(r"[\w'}\]] (=|has|is) |missing", message)
        return True
    finally:
        assert time.monotonic() - began < SECONDS
    return False


def describe(component):
    """Opens the model as sampling does, and describes the parameters of one network."""

    def action(folder):
        pipe = load_pipeline(folder)
        assert len(pipe.image_size) == 2
        assert pipe.networks[component].abstract_params()

    return action


def read_samplers(folder):
    """All samplers: what one refuses, another may not read."""
    pipe = load_pipeline(folder)
    for name in SAMPLERS:
        with contextlib.suppress(ValueError):
            make_sampler(name, pipe.schedule, pipe.scheduler_config, 5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models that may be spoilt if they are mended again."""
    out = tmp_path_factory.mktemp("fuzz")
    return {family: write_model(out / family, family=family) for family in ("sd15", "sdxl")}


FILES = {
    "unet/config.json": describe("unet"),
    "vae/config.json": describe("vae"),
    "text_encoder/config.json": describe("text_encoder"),
    "text_encoder_2/config.json": describe("text_encoder_2"),
    "scheduler/scheduler_config.json": read_samplers,
    "model_index.json": load_pipeline,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FILES))
def test_a_mutated_file_of_a_model_is_accepted_or_refused_in_one_line(name, folders):
    family = "sdxl" if name.startswith(("text_encoder_2", "unet")) else "sd15"
    path = folders[family] / name
    verdicts = []
    for changed in mutations(json.loads(path.read_text()), seed=24, count=250):
        with spoilt(path, changed):
            verdicts.append(is_refused(path, lambda: FILES[name](folders[family])))
    assert True in verdicts
    assert False in verdicts


@pytest.mark.slow
def test_a_mutated_config_of_a_reward_is_accepted_or_refused_in_one_line(tmp_path):
    path = tiny_clip.write_clip(tmp_path / "clip") / "config.json"
    content = json.loads(path.read_text())
    verdicts = []
    for part in (None, "text_config", "vision_config"):
        for changed in mutations(content[part] if part else content, seed=7, count=150):
            with spoilt(path, {**content, part: changed} if part else changed):
                verdicts.append(is_refused(path, lambda: read_clip(path.parent).abstract_params()))
    assert True in verdicts
    assert False in verdicts


@pytest.mark.slow
def test_a_mutated_manifest_is_accepted_or_refused_in_one_line(folders, tmp_path):
    path = write_pairs(tmp_path / "pairs", folders["sd15"], train=2, validation=1) / "manifest.json"
    content = json.loads(path.read_text())
    verdicts = []
    for part in (None, "model", "splits"):
        for changed in mutations(content[part] if part else content, seed=3, count=150):
            with spoilt(path, {**content, part: changed} if part else changed):
                verdicts.append(is_refused(path, lambda: shards.read_manifest(path.parent)))
    assert True in verdicts
    assert False in verdicts


@each_row(
    ("content", "message"),
    [
        (b" \n", "empty, as a full disk leaves a file"),
        (b'{"a": 1', "not valid JSON (Expecting ',' delimiter"),
        (b"\xff\xfe{}", "not valid JSON ('utf-8' codec"),
        (b"[" * 100_000, "not valid JSON (nested too deeply)"),
        (b'{"a": ' * 100_000, "not valid JSON (nested too deeply)"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON (Exceeds the limit"),
        (b'{"a": 1, "a": 2}', "not valid JSON (key 'a' is there as 1 and as 2)"),
        (b"[1, 2]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
@each_row("name", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_what_is_no_json_object_is_refused_by_the_file(name, content, message, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_bytes(content)
    line = re.escape(f"{folder / name}: {message}")
    with pytest.raises(ValueError, match=f"^{line}[^\n]*; fetch the model again$"):
        load_pipeline(folder)


@each_row("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_not_opened(make, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "unet" / "config.json"
    path.unlink()
    make(path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: is no regular file; fetch the model"):
        load_pipeline(folder)


def test_a_file_of_gigabytes_is_not_read(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "vae" / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(path))}: has 1099511627776 bytes, and a JSON file"
    ):
        load_pipeline(folder)


def test_what_diffusers_and_editors_write_is_read(tmp_path):
    """An infinity (DPM-Solver's lambda_min_clipped), a byte order mark, a key twice with one value."""
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"lambda_min_clipped": -Infinity, "a": 1, "a": 1}')
    assert json_files.read_object(path) == {"lambda_min_clipped": -float("inf"), "a": 1}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(text=st.text() | JSON.map(json.dumps))
@settings(deadline=None, derandomize=True, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_is_parsed_or_refused_by_its_place(text):
    try:
        content = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match=r"^FILE, line 3: not valid JSON \([^\n]+\); mend it$"):
            json_files.parse(text, "FILE, line 3", "mend it")
    else:
        np.testing.assert_equal(json_files.parse(text, "FILE, line 3", "mend it"), content)


@given(value=JSON)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_what_is_shown_of_a_value_is_one_short_line(value):
    line = json_files.shown(value)
    assert "\n" not in line
    assert len(line) < 1500


def test_a_model_without_its_class_is_the_one_of_the_index(tiny_model, tmp_path):
    """transformers reads `architectures`, diffusers only the index."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("unet", "vae", "text_encoder"):
        path = folder / name / "config.json"
        content = json.loads(path.read_text())
        content.pop("_class_name", None), content.pop("architectures", None)
        path.write_text(json.dumps(content))
    assert (
        read_models(folder, ["unet"])["unet"].settings == read_models(tiny_model, ["unet"])["unet"].settings
    )
    assert load_pipeline(folder).text_encoders["text_encoder"].class_name == "CLIPTextModel"
