"""Shards open as a TFDS dataset, appear whole or not at all, and are refused when they do not fit or are
damaged."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from example_shards import FINGERPRINT, MANIFEST, make_example, write_dataset
from tables import each_row

from dspo_jax.data import shards
from dspo_jax.images.image_files import BadRow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that tests only read."""
    out = tmp_path_factory.mktemp("shards") / "numbers"
    write_dataset(out)
    return out


def test_tfds_opens_the_folder_and_gives_back_what_was_written(dataset):
    source = tfds.builder_from_directory(dataset).as_data_source("train")
    assert len(source) == 10
    for i in (0, 5, 9):  # in three shards
        read, written = source[i], make_example(i)
        for name in ("moments", "tokens", "micro_conditioning"):
            assert read[name].dtype == written[name].dtype
            np.testing.assert_array_equal(read[name], written[name])
        assert read["preference"] == written["preference"]
        assert read["loser_won"] == written["loser_won"]
        assert read["caption"].decode() == written["caption"]
        assert read["key"].decode() == written["key"]


def test_manifest_lists_every_file_with_its_size_and_sum(dataset):
    manifest = shards.read_manifest(dataset)
    assert manifest["format_version"] == shards.FORMAT_VERSION
    assert manifest["model"] == FINGERPRINT
    assert manifest["splits"]["train"]["num_examples"] == 10
    assert [shard["num_examples"] for shard in manifest["splits"]["train"]["shards"]] == [4, 4, 2]
    listed = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
    others = {shards.MANIFEST, "dataset_info.json", "features.json"}
    assert {path.name for path in dataset.iterdir()} == listed | others
    shards.verify_shards(dataset, checksums=True)


@each_row("value", [1e5, np.inf, np.nan])
def test_moments_that_float16_cannot_hold_are_a_bad_row(value):
    moments = np.zeros((2, 4, 4, 6), np.float32)
    moments[1, 2, 3, 4] = value
    with pytest.raises(BadRow, match="moments not finite in float16"):
        shards.to_float16(moments)


def test_moments_are_rounded_to_the_nearest_float16():
    moments = np.asarray([1 + 2**-11 + 2**-12, -65504.0, 6e-8], np.float32)
    np.testing.assert_array_equal(
        shards.to_float16(moments), np.asarray([1 + 2**-10, -65504, 2**-24], np.float16)
    )


@each_row(
    ("key", "value"),
    [
        ("vae_sha256", "c" * 64),
        ("scaling_factor", 0.13025),
        ("shift_factor", 0.0609),
        ("tokenizer_sha256", ["b" * 64, "b" * 64]),
    ],
)
def test_shards_of_another_model_are_refused(dataset, key, value):
    manifest = shards.read_manifest(dataset)
    with pytest.raises(ValueError, match=rf"numbers: model.{key} = ") as caught:
        shards.check_manifest(manifest, {**FINGERPRINT, key: value}, path=dataset)
    for part in (str(FINGERPRINT.get(key, 0.0)), str(value), "encode the data again"):
        assert part in str(caught.value)


def test_the_models_name_and_any_resolution_are_accepted(dataset):
    manifest = shards.read_manifest(dataset)
    shards.check_manifest(manifest, {**FINGERPRINT, "model": "a copy"})
    shards.check_manifest(manifest, FINGERPRINT, 16)
    with pytest.raises(ValueError, match=r"resolution = 16, but 32 is expected.*--config.resolution=32"):
        shards.check_manifest(manifest, FINGERPRINT, 32)


def test_a_truncated_shard_is_refused(tmp_path):
    write_dataset(tmp_path / "out")
    victim = tmp_path / "out" / "pairs-train.array_record-00001-of-00003"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(victim))}: .*truncated or altered; delete the folder and run"
    ):
        shards.verify_shards(tmp_path / "out")


def test_an_altered_shard_is_refused_when_sums_are_checked(tmp_path):
    write_dataset(tmp_path / "out")
    victim = tmp_path / "out" / "pairs-train.array_record-00001-of-00003"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    shards.verify_shards(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"{re.escape(str(victim))}: .*sha256"):
        shards.verify_shards(tmp_path / "out", checksums=True)


def test_a_missing_shard_is_refused(tmp_path):
    write_dataset(tmp_path / "out")
    (tmp_path / "out" / "pairs-validation.array_record-00000-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="00000-of-00002: file is missing"):
        shards.verify_shards(tmp_path / "out")


def test_a_folder_without_manifest_is_not_a_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a dataset made by dspo_jax\.encode"):
        shards.read_manifest(tmp_path)


@each_row(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list, not an object"),
        ("{}", "damaged manifest .manifest: missing key.s. format_version, model, "),
        ('{"format_version": 0}', "reads 2"),
    ],
)
def test_a_damaged_or_foreign_manifest_is_refused(tmp_path, text, message):
    (tmp_path / shards.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=message):
        shards.read_manifest(tmp_path)


SPLITS = ["train", "validation"]


def test_an_output_folder_may_be_absent_empty_or_hold_the_same_dataset(dataset, tmp_path):
    assert not shards.is_complete(tmp_path / "absent", MANIFEST, SPLITS)
    assert not shards.is_complete(tmp_path, MANIFEST, SPLITS)
    assert shards.is_complete(dataset, MANIFEST, SPLITS)
    with_tuple = {**MANIFEST, "model": {**FINGERPRINT, "tokenizer_sha256": ("b" * 64,)}}
    assert shards.is_complete(dataset, with_tuple, SPLITS)


def test_an_output_folder_with_anything_else_is_refused(dataset, tmp_path):
    other = json.loads(json.dumps(MANIFEST))
    other["source"]["arguments"]["seed"] = 1
    with pytest.raises(ValueError, match=r"another dataset \(source.arguments.seed = 0 there, 1 here\)"):
        shards.is_complete(dataset, other, SPLITS)
    with pytest.raises(ValueError, match=r"another dataset \(splits = "):
        shards.is_complete(dataset, MANIFEST, ["train"])
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match="not empty and not an encoded dataset"):
        shards.is_complete(tmp_path, MANIFEST, SPLITS)
    with pytest.raises(ValueError, match="not a folder"):
        shards.is_complete(tmp_path / "thesis.txt", MANIFEST, SPLITS)
