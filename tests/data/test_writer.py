"""Shards are written whole or not at all, by any number of processes, in any order, and never twice."""

import json
import os
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from example_shards import MANIFEST, feature_spec, make_example, start_dataset, write_dataset
from tables import each_row
from tensorflow_datasets.core import example_serializer

from dspo_jax.data import shards
from dspo_jax.data.records import to_record
from dspo_jax.data.writer import DatasetWriter
from dspo_jax.errors import UserError


def keys(out, split):
    source = tfds.builder_from_directory(out).as_data_source(split)
    return [source[i]["key"].decode() for i in range(len(source))]


def test_rerun_is_byte_identical(tmp_path):
    for name in ("once", "again"):
        write_dataset(tmp_path / name)
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_split_may_have_an_empty_shard(tmp_path):
    writer = start_dataset(tmp_path / "out", {"train": 3})
    for number, examples in enumerate(([0, 1], [], [2])):
        assert writer.write_shard("train", number, map(make_example, examples)) == len(examples)
    writer.commit()
    assert keys(tmp_path / "out", "train") == ["0", "1", "2"]


def test_what_was_skipped_and_left_out_is_in_the_manifest(tmp_path):
    writer = start_dataset(tmp_path / "out", {"train": 2, "validation": 1})
    writer.write_shard("train", 1, [make_example(1)], {"identical images": 2, "empty caption": 1})
    writer.write_shard("train", 0, [make_example(0)], {"identical images": 1})
    writer.write_shard("validation", 0, [make_example(0)])
    assert writer.skipped("train") == {"identical images": 3, "empty caption": 1}
    assert writer.commit({"train": {"tie": 7}}) == shards.read_manifest(tmp_path / "out")
    train, validation = shards.read_manifest(tmp_path / "out")["splits"].values()
    assert train["skipped"] == {"empty caption": 1, "identical images": 3}
    assert train["left_out"] == {"tie": 7}
    assert validation["skipped"] == validation["left_out"] == {}


def test_a_second_writer_goes_on_where_the_first_was(tmp_path):
    """As two processes, or one that was killed and started again; the order does not matter."""
    write_dataset(tmp_path / "whole", train=3, validation=0, rows_per_shard=1)
    splits = {"train": 3, "validation": 1}
    first, second = (start_dataset(tmp_path / "out", splits) for _ in range(2))
    second.write_shard("train", 2, [make_example(2)])
    first.write_shard("train", 0, [make_example(0)])
    assert first.finished() == second.finished() == {("train", 0), ("train", 2)}
    third = start_dataset(tmp_path / "out", splits)
    assert [third.is_written("train", number) for number in range(3)] == [True, False, True]
    with pytest.raises(FileNotFoundError, match=r"is not finished; run dspo_jax\.encode again"):
        third.commit()
    third.write_shard("train", 1, [make_example(1)])
    third.write_shard("validation", 0, [])
    manifest = third.commit()
    assert first.commit() == manifest  # too late, and no harm done
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_an_error_leaves_the_finished_shards_and_no_part_of_another(tmp_path):
    def failing():
        yield make_example(0)
        raise KeyboardInterrupt

    writer = start_dataset(tmp_path / "out", {"train": 2})
    writer.write_shard("train", 0, [make_example(0)])
    with pytest.raises(KeyboardInterrupt):
        writer.write_shard("train", 1, failing())
    assert writer.finished() == {("train", 0)}
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"pairs-train.array_record-00000-of-00002", "plan.json", "train-00000.json"}
    with pytest.raises(FileNotFoundError, match="not finished"):
        shards.read_manifest(tmp_path / "out")


def test_what_a_killed_process_left_does_not_stay(tmp_path):
    writer = start_dataset(tmp_path / "out", {"train": 1})
    (tmp_path / "out" / shards.UNFINISHED / "pairs-train.array_record-00000-of-00001.123").write_bytes(
        b"half"
    )
    writer.write_shard("train", 0, [make_example(0)])
    writer.commit()
    assert not (tmp_path / "out" / shards.UNFINISHED).exists()
    assert keys(tmp_path / "out", "train") == ["0"]


@each_row("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 10)])
def test_a_finished_shard_that_is_damaged_is_written_again(tmp_path, damage):
    writer = start_dataset(tmp_path / "out", {"train": 1})
    writer.write_shard("train", 0, [make_example(0)])
    damage(tmp_path / "out" / "pairs-train.array_record-00000-of-00001")
    assert not writer.is_written("train", 0)
    assert writer.finished() == set()


def test_an_unfinished_dataset_of_other_settings_is_refused(tmp_path):
    start_dataset(tmp_path / "out", {"train": 2})
    features = feature_spec(2, 4, 4)
    other = json.loads(json.dumps(MANIFEST))
    other["source"]["arguments"]["seed"] = 1
    # Nothing is written yet, so nothing is lost.
    DatasetWriter(tmp_path / "out", features, other, {"train": 2}).write_shard("train", 0, [make_example(0)])
    with pytest.raises(ValueError, match=r"source.arguments.seed = 1 there, 0 here\); choose another folder"):
        start_dataset(tmp_path / "out", {"train": 2})
    with pytest.raises(ValueError, match=r"num_shards.train = 2 there, 3 here"):
        DatasetWriter(tmp_path / "out", features, other, {"train": 3})


@pytest.mark.parametrize(("model", "message"), [({}, "model is missing"), ({"model": 3}, "model = 3 must")])
def test_a_damaged_plan_is_named(tmp_path, model, message):
    start_dataset(tmp_path / "out", {"train": 2}).write_shard("train", 0, [make_example(0)])
    plan = tmp_path / "out" / shards.UNFINISHED / "plan.json"
    rest = {key: value for key, value in json.loads(plan.read_text()).items() if key != "model"}
    plan.write_text(json.dumps(rest | model))
    with pytest.raises(UserError, match=rf"plan\.json: {message}.*; delete the folder$"):
        start_dataset(tmp_path / "out", {"train": 2})


def test_a_shard_that_cannot_be_written_is_an_os_error_that_names_the_file(tmp_path):
    writer = start_dataset(tmp_path / "out", {"train": 1})
    (tmp_path / "out" / shards.UNFINISHED / "plan.json").unlink()
    (tmp_path / "out" / shards.UNFINISHED).rmdir()
    with pytest.raises(OSError, match=r"pairs-train.array_record-00000-of-00001.*: cannot be written"):
        writer.write_shard("train", 0, [make_example(0)])


def sized(i, height, width):
    moments = np.full((2, height // 4, width // 4, 6), i, np.float16)
    micro_conditioning = np.tile(np.asarray([50, 60, 0, 0, height, width], np.int32), (2, 1))
    return {**make_example(i), "moments": moments, "micro_conditioning": micro_conditioning}


def test_images_of_several_sizes_have_files_and_tfds_splits_of_their_own(tmp_path):
    features = feature_spec(2, None, None)
    buckets = ["16x16", "8x32", "32x8"]
    writer = DatasetWriter(tmp_path / "out", features, MANIFEST, {"train": 2, "validation": 1}, buckets)
    writer.write_shard("train", 0, [sized(0, 16, 16), sized(1, 8, 32), sized(2, 16, 16)])
    writer.write_shard("train", 1, [sized(3, 8, 32)])
    writer.write_shard("validation", 0, [sized(4, 16, 16)])
    manifest = writer.commit()
    assert manifest["buckets"] == ["16x16", "8x32"]
    train = manifest["splits"]["train"]
    assert train["num_examples"] == 4
    assert [(shard["bucket"], shard["num_examples"]) for shard in train["shards"]] == [
        ("16x16", 2),
        ("16x16", 0),
        ("8x32", 1),
        ("8x32", 1),
    ]
    out = tmp_path / "out"
    assert keys(out, "train_16x16") == ["0", "2"]
    assert keys(out, "train_8x32") == ["1", "3"]
    assert keys(out, "validation_16x16") == ["4"]
    example = tfds.builder_from_directory(out).as_data_source("train_8x32")[1]
    np.testing.assert_array_equal(example["moments"], sized(3, 8, 32)["moments"])
    listed = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
    assert {path.name for path in out.iterdir()} == listed | {
        "manifest.json",
        "dataset_info.json",
        "features.json",
    }
    assert not any(re.search("32x8|validation_8x32", path.name) for path in out.iterdir())
    shards.verify_shards(out, checksums=True)


@each_row("bucket", ["16x16", "8x32"])
def test_records_are_the_bytes_that_tfds_makes(bucket):
    features = feature_spec(2, *((4, 4) if bucket == "16x16" else (None, None)))
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    example = make_example(3, bucket=bucket)
    theirs = serializer.get_tf_example(features.encode_example(example))
    assert to_record(example, sized=bucket != "16x16") == theirs.SerializeToString(deterministic=True)
