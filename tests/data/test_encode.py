"""The encode command, with a stand-in for the model: what goes into the shards, what is refused, what is
kept."""

import dataclasses
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from stub_pipeline import StubPipeline, png
from tables import each_row

from configs.encode import common
from dspo_jax.data import encoder, encoding, loader, row_progress, shards, sources
from dspo_jax.data.datasets import read_datasets
from dspo_jax.data.encoding import encode
from dspo_jax.data.sources import PreferencePair
from dspo_jax.encode import parse_share, training_command

REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Greys:
    """Pair i: a winner of grey level 10 i + 1, a loser one darker. `broken` lists training rows with a
    corrupt loser; `sizes` are taken in turn."""

    count: int = 10
    broken: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ((8, 8),)

    version: ClassVar[int] = 1

    splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    images_per_example: ClassVar[int] = 2

    def num_examples(self, split: str) -> int:
        return self.count if split == "train" else 2

    def left_out(self, split: str) -> dict[str, int]:
        return {}

    def digest(self, split: str) -> str:
        return f"{split}, version {self.version}"

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        for i in range(self.num_examples(split))[start:stop]:
            grey = 10 * i + 1
            size = self.sizes[i % len(self.sizes)]
            broken = split == "train" and i in self.broken
            loser = b"corrupt" if broken else png((grey - 1,) * 3, size)
            winner = png((grey,) * 3, size)
            yield PreferencePair("x" * (i + 1), winner, loser, 0.9, f"{split}-{i}", i % 2 == 1)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> StubPipeline:
    """Makes the command load the stub, whatever folder it is given."""
    stub = StubPipeline()
    monkeypatch.setattr(encoding, "load_pipeline", lambda path, **text: stub)
    return stub


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch):
    """A recipe for `Greys` at 16 pixels."""
    monkeypatch.setitem(sources.SOURCES, "greys", Greys)
    config = common.get_config()
    common.set_source(config, "greys")
    config.update(model="a model", resolution=16, batch_size=4, rows_per_shard=6, num_workers=0)
    return config


def read(out: Path, split: str) -> list[dict]:
    source = tfds.builder_from_directory(out).as_data_source(split)
    return [source[i] for i in range(len(source))]


def keys(out: Path, split: str) -> list[str]:
    return [row["key"].decode() for row in read(out, split)]


def test_shards_hold_the_rows_in_order(pipe, config, tmp_path):
    assert encode(config, tmp_path / "out")
    manifest = shards.read_manifest(tmp_path / "out")
    rows = read(tmp_path / "out", "train")
    assert [row["key"].decode() for row in rows] == [f"train-{i}" for i in range(10)]
    for i, row in enumerate(rows):
        assert row["caption"].decode() == "x" * (i + 1)
        assert row["preference"] == np.float32(0.9)
        assert row["loser_won"] == (i % 2 == 1)
        assert row["tokens"][:, 0].tolist() == [i + 1, -i - 1]
        expected = np.asarray([10 * i + 1, 10 * i]) / 127.5 - 1
        np.testing.assert_allclose(
            row["moments"][..., :3], np.broadcast_to(expected[:, None, None, None], (2, 4, 4, 3)), atol=1e-3
        )
        np.testing.assert_array_equal(row["moments"][..., 3:], 1)
        np.testing.assert_array_equal(row["micro_conditioning"], [[8, 8, 0, 0, 16, 16]] * 2)
    assert manifest["splits"]["train"]["num_examples"] == 10
    assert [shard["num_examples"] for shard in manifest["splits"]["train"]["shards"]] == [6, 4]
    assert manifest["source"] == {
        "name": "greys",
        "arguments": {"count": 10, "broken": [], "sizes": [[8, 8]]},
        "rows_sha256": {"train": "train, version 1", "validation": "validation, version 1"},
    }
    shards.check_manifest(shards.read_manifest(tmp_path / "out"), pipe.fingerprint(), 16)


def test_the_loader_reads_what_was_encoded(pipe, config, tmp_path):
    encode(config, tmp_path / "out")
    batch = next(loader.eval_batches(read_datasets(tmp_path / "out"), batch_size=2))
    assert batch["key"] == ["validation-0", "validation-1"]
    assert batch["moments"].shape == (2, 2, 4, 4, 6)


def test_the_vae_is_compiled_once(pipe, config, tmp_path):
    """Whatever the last batch of a shard holds, and whatever rows are skipped."""
    config.source.broken, config.source.max_skipped = (2,), 0.2
    encode(config, tmp_path / "out")
    assert pipe.batch_shapes == [(8, 16, 16, 3)]  # of tracing


def test_the_speed_that_is_shown_leaves_compiling_out(pipe, config, tmp_path, monkeypatch, capsys):
    compiling = 0.0

    def encode_moments(params, images):  # called where it is compiled
        nonlocal compiling
        compiling += 1000
        return StubPipeline.encode_moments(pipe, params, images)

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + compiling, sleep=time.sleep)
    monkeypatch.setattr(pipe, "encode_moments", encode_moments)
    monkeypatch.setattr(encoder, "time", clock)
    monkeypatch.setattr(row_progress, "time", clock)
    encode(config, tmp_path / "out")
    said = capsys.readouterr().err
    assert said.startswith("encode 0/12 (0%)  compiling\n")
    (speed,) = re.findall(r"12/12 .* images/s (\S+)", said)
    assert compiling == 1000
    assert float(speed) > 24 / 500


def test_a_batch_is_filled_up_to_the_devices(pipe, config, tmp_path):
    config.batch_size = 3
    encode(config, tmp_path / "out")
    assert pipe.batch_shapes == [(8, 16, 16, 3)]  # six images, eight devices
    assert [row["key"].decode() for row in read(tmp_path / "out", "train")] == [
        f"train-{i}" for i in range(10)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_vae_computes_in_the_dtype_of_the_config(pipe, config, tmp_path, dtype):
    config.vae_dtype = dtype
    encode(config, tmp_path / "out")
    levels = np.asarray([row["moments"][0, 0, 0, 0] for row in read(tmp_path / "out", "train")])
    errors = np.abs(levels - (10 * np.arange(10) + 1) / 127.5 + 1)
    assert (errors.max() > 5e-4) == (dtype == "bfloat16")
    assert errors.max() < 4e-3


@pytest.mark.ci
def test_a_second_run_keeps_the_dataset_and_a_fresh_one_is_byte_identical(pipe, config, tmp_path):
    encode(config, tmp_path / "out")
    calls = len(pipe.batch_shapes)
    config.num_workers = 1  # decides how fast, not what
    assert encode(config, tmp_path / "out")
    assert len(pipe.batch_shapes) == calls
    encode(config, tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_folder_with_another_dataset_is_refused_and_left_alone(pipe, config, tmp_path):
    encode(config, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    config.resolution = 32
    with pytest.raises(ValueError, match=r"holds another dataset \(resolution = 16 there, 32 here\)"):
        encode(config, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_rows_that_changed_since_are_not_taken_for_those_of_then(pipe, config, tmp_path, monkeypatch):
    encode(config, tmp_path / "whole")
    assert not encode(config, tmp_path / "part", (0, 2))
    monkeypatch.setattr(Greys, "version", 2)
    changed = r"source.rows_sha256.train = 'train, version 1' there, 'train, version 2' here"
    for out in ("whole", "part"):
        with pytest.raises(ValueError, match=changed):
            encode(config, tmp_path / out)


def test_a_corrupt_image_is_skipped_counted_and_listed(pipe, config, tmp_path):
    config.source.broken, config.source.max_skipped = (0, 7), 0.2
    encode(config, tmp_path / "out")
    manifest = shards.read_manifest(tmp_path / "out")
    assert keys(tmp_path / "out", "train") == [f"train-{i}" for i in (1, 2, 3, 4, 5, 6, 8, 9)]
    assert manifest["splits"]["train"]["skipped"] == {"undecodable image": 2}
    assert manifest["splits"]["train"]["num_examples"] == 8


def test_too_many_corrupt_images_stop_the_run_and_finished_shards_stay(pipe, config, tmp_path):
    config.source.broken, config.source.max_skipped = (3, 8), 0.1
    too_many = (
        r"max_skipped = 0.1: exceeded by 2 of 10 rows of split 'train' \(undecodable image: 2\).*'train-8'"
    )
    with pytest.raises(ValueError, match=too_many):
        encode(config, tmp_path / "out")
    with pytest.raises(
        ValueError, match=too_many
    ):  # the first shard is not encoded again, but its row counts
        encode(config, tmp_path / "out")
    config.source.max_skipped = 0.2
    assert encode(config, tmp_path / "out")
    assert keys(tmp_path / "out", "train") == [f"train-{i}" for i in (0, 1, 2, 4, 5, 6, 7, 9)]


def test_each_share_may_have_few_bad_rows_and_all_too_many(pipe, config, tmp_path):
    config.source.broken, config.source.max_skipped = (3, 8), 0.1
    config.splits = ("train",)
    assert not encode(config, tmp_path / "out", (0, 2))
    with pytest.raises(ValueError, match="exceeded by 2 of 10 rows"):
        encode(config, tmp_path / "out", (1, 2))


def test_latents_beyond_float16_are_a_bad_row(pipe, config, tmp_path):
    pipe.scale = 1e5  # beyond it for levels under 44
    config.update(splits=("train",), source={"max_skipped": 0.5})
    encode(config, tmp_path / "out")
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest["splits"]["train"]["skipped"] == {"moments not finite in float16": 5}
    assert [row["key"].decode() for row in read(tmp_path / "out", "train")] == [
        f"train-{i}" for i in range(5, 10)
    ]


def test_an_empty_source_is_refused(pipe, config, tmp_path):
    config.source.count = 0
    with pytest.raises(ValueError, match="split 'train' is empty"):
        encode(config, tmp_path / "out")


def test_images_have_the_models_size_if_nothing_is_said(pipe, config, tmp_path):
    config.resolution = None
    encode(config, tmp_path / "out")
    assert shards.read_manifest(tmp_path / "out")["resolution"] == 32
    assert read(tmp_path / "out", "train")[0]["moments"].shape == (2, 8, 8, 6)


def test_no_process_waits_for_the_first_where_that_is_refused(pipe, config, tmp_path, monkeypatch):
    config.source.broken, config.source.max_skipped = tuple(range(10)), 1.0

    def wait(seconds):
        raise AssertionError("waits for a manifest that no process writes")

    monkeypatch.setattr(encoding.processes, "is_first", lambda: False)
    monkeypatch.setattr(encoding.time, "sleep", wait)
    with pytest.raises(ValueError, match="split 'train' of source 'greys': no usable row"):
        encode(config, tmp_path / "out")


def test_a_split_without_a_usable_row_is_refused(pipe, config, tmp_path):
    config.source.broken, config.source.max_skipped = tuple(range(10)), 1.0
    with pytest.raises(
        ValueError, match=r"split 'train' of source 'greys': no usable row .*undecodable image': 10"
    ):
        encode(config, tmp_path / "out")
    assert not (tmp_path / "out" / shards.MANIFEST).exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", None, "config.model is not set"),
        ("resolution", 18, "config.resolution = 18: must be a multiple of 4"),
        ("resolution", 0, "config.resolution = 0: must be at least 1"),
        ("batch_size", 0, "config.batch_size = 0: must be at least 1"),
        ("flip", "randm", "config.flip = 'randm': unknown; did you mean 'random'"),
        ("vae_dtype", "float16", "config.vae_dtype = 'float16': unknown"),
        (
            "text.t5_dtype",
            "bfloat16",
            "config.text.t5_dtype = 'bfloat16': [^\n]* stored; leave it 'float32'$",
        ),
        ("num_workers", -1, "config.num_workers = -1: must be at least 0"),
        ("max_aspect_ratio", 0.5, "config.max_aspect_ratio = 0.5: must be at least 1"),
        ("splits", ("trian",), "config.splits = 'trian': unknown; did you mean 'train'"),
        ("source.name", "grays", "config.source.name = 'grays': unknown; did you mean 'greys'"),
        ("source.name", None, "config.source.name is not set"),
    ],
)
def test_a_wrong_setting_is_refused_by_key(pipe, config, tmp_path, key, value, message):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        encode(config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_the_chosen_splits_are_encoded(pipe, config, tmp_path):
    config.splits = ("validation",)
    encode(config, tmp_path / "out")
    manifest = shards.read_manifest(tmp_path / "out")
    assert list(manifest["splits"]) == ["validation"]


@each_row("recipe", ["emoji", "emoji_images"])
def test_the_recipes_name_real_sources(recipe):
    config = __import__(f"configs.encode.{recipe}", fromlist=["get_config"]).get_config()
    arguments = config.source.to_dict()
    del arguments["max_skipped"]
    assert sources.get_source(**arguments).images_per_example == (2 if recipe == "emoji" else 1)
    assert config.keys() == common.get_config().keys()


def test_two_shares_make_the_dataset_of_one(pipe, config, tmp_path):
    encode(config, tmp_path / "one")
    assert not encode(config, tmp_path / "two", (1, 2))
    with pytest.raises(FileNotFoundError, match="is not finished"):
        shards.read_manifest(tmp_path / "two")
    assert encode(config, tmp_path / "two", (0, 2))
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        path.name for path in (tmp_path / "two").iterdir()
    }
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@each_row("share", ["2/2", "1", "a/b", "-1/2"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=f"--shard={share}: must be I/N with I from 0 to N - 1"):
        parse_share(share)
    assert parse_share("3/4") == (3, 4)
    assert parse_share(None) is None


def test_both_ways_round_are_stored_on_request(pipe, config, tmp_path):
    config.flip = "both"
    encode(config, tmp_path / "out")
    found = keys(tmp_path / "out", "validation")
    assert found == ["validation-0", "validation-0|mirrored", "validation-1", "validation-1|mirrored"]


def test_images_of_several_shapes_go_into_buckets(pipe, config, tmp_path):
    config.update(resolution=16, bucket_step=4, max_aspect_ratio=4.0)
    config.source.sizes = ((8, 8), (30, 10), (8, 9), (10, 44))
    encode(config, tmp_path / "out")
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest["buckets"] == ["16x16", "8x32", "32x8"]  # height x width; nothing fell into 12 x 20
    assert manifest["splits"]["train"]["num_examples"] == 10
    found = {
        bucket: [int(key.split("-")[1]) for key in keys(tmp_path / "out", f"train_{bucket}")]
        for bucket in manifest["buckets"]
    }
    assert found == {"16x16": [0, 2, 4, 6, 8], "8x32": [1, 5, 9], "32x8": [3, 7]}


@pytest.mark.ci
def test_an_unknown_key_on_the_command_line_is_one_line_with_the_nearest_spelling(tmp_path):
    command = [
        sys.executable,
        "-m",
        "dspo_jax.encode",
        "--config=configs/encode/emoji.py",
        f"--out={tmp_path}/out",
    ]
    done = subprocess.run(
        [*command, "--config.resolutoin=64"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "config.resolution" in done.stderr


def test_leave_to_read_outside_the_folder_is_not_part_of_the_dataset(tmp_path, pipe, config):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "a.png").write_bytes(png((1, 2, 3)))
    (tmp_path / "b.png").write_bytes(png((4, 5, 6)))
    (data / "b.png").symlink_to("../b.png")
    (data / "pairs.jsonl").write_text('{"caption": "a", "winner": "a.png", "loser": "b.png"}\n')
    config.source = {"max_skipped": 0.0}
    common.set_source(config, "folder")
    config.source.path = str(data)
    with pytest.raises(ValueError, match=r"b\.png: leads out of .*; .* --config\.source\.allow_outside=True"):
        encode(config, out)
    config.source.allow_outside = True
    assert encode(config, out)  # goes on in the same folder
    config.source.allow_outside = False
    assert encode(config, out)
    assert "allow_outside" not in shards.read_manifest(out)["source"]["arguments"]


def test_the_command_that_comes_next_reads_captions_as_they_were_encoded(tmp_path):
    """Without these keys training refuses the dataset."""
    config = common.get_config()
    config.model = "a model"
    command = training_command(config, tmp_path)
    assert "'--config.model=a model'" in command
    assert "--config.text" not in command
    config.text.max_chunks, config.text.max_sequence_length = 3, 0
    words = shlex.split(training_command(config, tmp_path))
    assert {"--config.text.max_chunks=3", "--config.text.max_sequence_length=0"} < set(words)
