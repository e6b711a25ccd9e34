"""The order of examples depends on seed and position only, and a restored position continues at the next
unseen example."""

import json
import os
import re
import shutil
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from example_shards import MANIFEST, make_example, write_dataset
from tables import each_row

from dspo_jax.data import loader, shards
from dspo_jax.data.datasets import read_datasets
from dspo_jax.data.writer import DatasetWriter
from dspo_jax.errors import UserError

NUM_TRAIN, NUM_VALIDATION = 10, 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """10 training and 5 validation examples, in several shards each."""
    out = tmp_path_factory.mktemp("loader") / "numbers"
    write_dataset(out, train=NUM_TRAIN, validation=NUM_VALIDATION)
    return out


@pytest.fixture
def train_batches(dataset):
    """`loader.train_batches` on the dataset; closes what it opened."""
    opened = []

    def open_batches(**arguments):
        opened.append(
            loader.train_batches(read_datasets(dataset), **{"batch_size": 4, "seed": 0, **arguments})
        )
        return opened[-1]

    yield open_batches
    for batches in opened:
        batches.close()


def take_keys(batches, count):
    """The keys of the next batches, one list a batch."""
    return [next(batches)["key"] for _ in range(count)]


def test_a_batch_has_the_documented_arrays(train_batches):
    batch = next(train_batches(batch_size=3))
    expected = {
        "moments": ((3, 2, 4, 4, 6), np.float16),
        "tokens": ((3, 1, 77), np.int32),
        "micro_conditioning": ((3, 2, 6), np.int32),
        "preference": ((3,), np.float32),
        "loser_won": ((3,), np.bool_),
        "index": ((3,), np.int64),
        "row": ((3,), np.int64),
    }
    assert {name: (batch[name].shape, batch[name].dtype) for name in expected} == expected
    assert batch.keys() == expected.keys() | {"key", "caption"}
    for row, key in enumerate(batch["key"]):
        written = make_example(int(key))
        assert batch["row"][row] == int(key)
        assert batch["caption"][row] == written["caption"]
        for name in ("moments", "tokens", "micro_conditioning", "preference", "loser_won"):
            np.testing.assert_array_equal(batch[name][row], written[name])


def test_a_model_may_be_conditioned_on_other_arrays(tmp_path):
    """A family whose text encoder is too large to run at each step has its states stored."""
    conditioning = {
        "tokens_of_both": np.arange(10, dtype=np.int32).reshape(2, 5),
        "states": np.linspace(-1, 1, 12, dtype=np.float16).reshape(3, 4),
    }
    common = {name: value for name, value in make_example(0).items() if name in shards.COMMON_FEATURES}
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in conditioning.items()}
    features = shards.feature_spec(common["moments"].shape, shapes)
    writer = DatasetWriter(tmp_path / "out", features, MANIFEST, {"train": 1})
    writer.write_shard("train", 0, [common | conditioning])
    writer.commit()
    stored = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")[0]
    with closing(loader.train_batches(read_datasets(tmp_path / "out"), batch_size=2, seed=0)) as batches:
        batch = next(batches)
    assert batch.keys() == common.keys() | conditioning.keys() | {"index", "row"}
    for name, array in conditioning.items():
        assert batch[name].dtype == array.dtype
        np.testing.assert_array_equal(batch[name], np.stack([array] * 2))
        np.testing.assert_array_equal(stored[name], array)


@each_row(
    ("spoil", "kind", "message"),
    [
        (lambda text: None, FileNotFoundError, "no such file"),
        (lambda text: text[:100], UserError, r"damaged \(.*\)"),
        (lambda text: "[]", UserError, r"damaged \(.*\)"),
        (lambda text: text.replace("featuresDict", "other"), UserError, r"damaged \(.*\)"),
        (lambda text: text.replace('"int32"', '"int3"'), UserError, r"damaged \(.*\)"),
        (lambda text: text.replace('"moments"', '"others"'), UserError, r"damaged \(no 'moments'\)"),
        (lambda text: text.replace("features_dict.FeaturesDict", "text_feature.Text"), UserError, "damaged"),
    ],
)
def test_a_dataset_without_a_schema_is_refused(spoil, kind, message, dataset, tmp_path):
    out = shutil.copytree(dataset, tmp_path / "out")
    schema = out / "features.json"
    spoilt = spoil(schema.read_text())
    schema.unlink() if spoilt is None else schema.write_text(spoilt)
    with pytest.raises(kind, match=rf"^{re.escape(str(schema))}: {message}[^\n]*; delete the folder and run"):
        loader.eval_batches(read_datasets(out), batch_size=2)


def test_every_epoch_is_a_new_permutation_of_all_examples(train_batches):
    # 10 batches of 4 are 4 epochs of 10; epochs end within batches.
    stream = np.concatenate(take_keys(train_batches(), 10)).reshape(4, NUM_TRAIN)
    for epoch in stream:
        assert sorted(epoch, key=int) == [str(i) for i in range(NUM_TRAIN)]
    assert len({tuple(epoch) for epoch in stream}) == 4
    assert list(stream[0]) != [str(i) for i in range(NUM_TRAIN)]


def test_the_seed_decides_the_order(train_batches):
    first, again, other = (take_keys(train_batches(seed=seed), 3) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_the_order_does_not_depend_on_threads_or_batch_size(train_batches):
    expected = np.concatenate(take_keys(train_batches(), 6))
    np.testing.assert_array_equal(np.concatenate(take_keys(train_batches(num_threads=4), 6)), expected)
    np.testing.assert_array_equal(np.concatenate(take_keys(train_batches(batch_size=12), 2)), expected)


def test_index_counts_the_examples_of_the_run(train_batches):
    batches = train_batches()
    indices = np.concatenate([next(batches)["index"] for _ in range(6)])
    np.testing.assert_array_equal(indices, np.arange(24))


@each_row("process_count", [1, 2, 4])
def test_processes_share_the_same_global_batches(train_batches, process_count):
    alone = train_batches()
    together = [train_batches(process_index=p, process_count=process_count) for p in range(process_count)]
    for _ in range(6):
        expected = next(alone)
        shares = [next(batches) for batches in together]
        assert [key for share in shares for key in share["key"]] == expected["key"]
        np.testing.assert_array_equal(np.concatenate([share["index"] for share in shares]), expected["index"])
    assert {batches.get_state() for batches in together} == {alone.get_state()}


@each_row("stop_after", [1, 2, 3, 6])  # 2.5 batches an epoch: before and after its ends
def test_a_restored_position_continues_at_the_next_unseen_example(train_batches, stop_after):
    whole = train_batches()
    expected = take_keys(whole, 9)
    stopped = train_batches()
    take_keys(stopped, stop_after)
    state = stopped.get_state()
    assert isinstance(state, str)
    json.loads(state)
    resumed = train_batches()
    take_keys(resumed, 2)  # whatever it has read ahead is dropped
    resumed.set_state(state)
    assert take_keys(resumed, 9 - stop_after) == expected[stop_after:]
    assert resumed.get_state() == whole.get_state()


def test_a_position_can_be_restored_by_another_number_of_processes(train_batches):
    alone = train_batches()
    take_keys(alone, 3)
    second = train_batches(process_index=1, process_count=2)
    second.set_state(alone.get_state())
    assert next(second)["key"] == next(alone)["key"][2:]


@each_row(
    ("change", "message"),
    [({"seed": 1}, "seed = 0, but this run has 1"), ({"batch_size": 2}, "batch_size = 4")],
)
def test_the_position_of_a_different_run_is_refused(train_batches, change, message):
    state = train_batches().get_state()
    with pytest.raises(ValueError, match=message):
        train_batches(**change).set_state(state)


def test_evaluation_passes_once_in_stored_order_with_a_smaller_last_batch(dataset):
    batches = list(loader.eval_batches(read_datasets(dataset), batch_size=2))
    assert [batch["key"] for batch in batches] == [["0", "1"], ["2", "3"], ["4"]]
    np.testing.assert_array_equal(
        np.concatenate([batch["index"] for batch in batches]), np.arange(NUM_VALIDATION)
    )


def test_single_images_have_a_pair_axis_of_one(tmp_path):
    write_dataset(tmp_path / "out", images=1)
    batch = next(loader.eval_batches(read_datasets(tmp_path / "out"), batch_size=2))
    assert batch["moments"].shape == (2, 1, 4, 4, 6)


def test_an_empty_split_is_refused(tmp_path):
    write_dataset(tmp_path / "out", validation=0)
    with pytest.raises(ValueError, match="split 'validation' is empty"):
        loader.eval_batches(read_datasets(tmp_path / "out"), batch_size=2)


def test_an_unknown_split_is_refused_with_the_nearest_name(dataset):
    with pytest.raises(ValueError, match=r"split = 'valid': unknown; did you mean 'validation'\?"):
        loader.eval_batches(read_datasets(dataset), batch_size=2, split="valid")


def test_a_truncated_shard_is_refused_before_anything_is_read(tmp_path):
    write_dataset(tmp_path / "out")
    victim = tmp_path / "out" / "pairs-train.array_record-00002-of-00003"
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(ValueError, match="00002-of-00003: 100 bytes, the manifest says"):
        loader.train_batches(read_datasets(tmp_path / "out"), batch_size=2, seed=0)


@each_row(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch size 0: must be a positive multiple"),
        (
            {"batch_size": 3, "process_count": 2},
            r"batch size 3: must be a positive multiple of the 2 process\(es\)",
        ),
        ({"process_index": 2, "process_count": 2}, "process index 2: must be between 0 and 1"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(train_batches, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_batches(**arguments)


@each_row(
    ("damage", "message"),
    [
        (lambda shard: shard.unlink(), None),  # an open file stays readable
        (lambda shard: os.truncate(shard, 1000), r"{shard}: .*truncated"),
        (
            lambda shard: shard.write_bytes(bytes(shard.stat().st_size)),
            r"{data}: a shard cannot be read: Corrupted.*; encode the data again$",
        ),
    ],
    ids=["deleted", "cut short", "overwritten"],
)
def test_a_shard_that_is_damaged_during_a_run_is_one_clear_line(tiny_pairs, tmp_path, damage, message):
    data = Path(shutil.copytree(tiny_pairs, tmp_path / "pairs"))
    shard = next(data.glob("*-train.array_record-*"))
    with closing(loader.train_batches(read_datasets(data), batch_size=8, seed=0, num_threads=1)) as batches:
        next(batches)
        damage(shard)

        def read_on():
            return [next(batches)["key"] for _ in range(40)]

        if message is None:
            assert len({key for keys in read_on() for key in keys}) == 24
            return
        with pytest.raises((OSError, ValueError), match=message.format(shard=shard, data=data)) as caught:
            read_on()
        assert "\n" not in str(caught.value)
