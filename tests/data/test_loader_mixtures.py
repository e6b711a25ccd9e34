"""Several datasets and images of several sizes: what comes when, for any number of processes."""

import itertools
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from example_shards import MANIFEST, make_example, write_buckets, write_dataset
from tables import each_row

from dspo_jax.data import loader
from dspo_jax.data.datasets import count_examples, read_datasets

# The keys of each dataset, and of each bucket of the last one; 27 examples in all.
SQUARES, MORE = set(range(10)), set(range(100, 104))
TALL = {"16x16": set(range(200, 207)), "8x32": set(range(207, 212)), "32x8": {212}}
KINDS = {
    "one": {"names": ["squares"]},
    "several": {"names": ["squares", "more"]},
    "weighted": {"names": ["squares", "more"], "weights": (3, 1)},
    "buckets": {"names": ["tall"]},
    "all of it": {"names": ["squares", "tall"], "weights": (1.0, 2.0)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three datasets; one has no validation split."""
    folder = tmp_path_factory.mktemp("mixtures")
    write_dataset(folder / "squares")
    write_dataset(folder / "more", train=len(MORE), validation=3, first=100)
    write_buckets(
        folder / "tall",
        {bucket: len(keys) for bucket, keys in TALL.items()},
        validation={"16x16": 3, "8x32": 2},
        first=200,
    )
    return folder


@pytest.fixture
def train_batches(folder):
    """`loader.train_batches` on the datasets of these names; closes what it opened."""
    opened = []

    def open_batches(names, **arguments):
        path = ",".join(str(folder / name) for name in names)
        opened.append(loader.train_batches(read_datasets(path), **{"batch_size": 4, "seed": 0, **arguments}))
        return opened[-1]

    yield open_batches
    for batches in opened:
        batches.close()


def take_keys(batches, count):
    """The keys of the next `count` batches, one list a batch."""
    return [[int(key) for key in next(batches)["key"]] for _ in range(count)]


def test_the_order_of_one_dataset_is_that_of_the_first_release(train_batches):
    """Runs that were started with it must go on in it: these keys and this string are never to change."""
    batches = train_batches(["squares"], batch_size=5)
    assert take_keys(batches, 3) == [[1, 2, 4, 5, 9], [7, 8, 6, 0, 3], [9, 6, 1, 8, 2]]
    state = '{"num_examples": 10, "seed": 0, "batch_size": 5, "next_batch": 3}'
    assert batches.get_state() == state
    again = train_batches(["squares"], batch_size=5)
    again.set_state(state)
    assert take_keys(again, 1) == [[0, 3, 5, 4, 7]]


def test_without_weights_every_example_of_every_dataset_comes_once_an_epoch(train_batches):
    stream = np.concatenate(take_keys(train_batches(["squares", "more"], batch_size=7), 6)).reshape(3, 14)
    for epoch in stream:
        assert set(epoch) == SQUARES | MORE
    assert len({tuple(epoch) for epoch in stream}) == 3
    # They are shuffled together.
    assert not set(stream[0][:10]) <= SQUARES


@pytest.mark.ci
@each_row(("weights", "share"), [((3, 1), 3 / 4), ((1e-3, 3e-3), 1 / 4), ((1, 1), 1 / 2)])
def test_weights_are_the_shares_of_the_datasets(train_batches, weights, share):
    stream = np.concatenate(take_keys(train_batches(["squares", "more"], weights=weights), 100))
    of_first = np.isin(stream, list(SQUARES))
    assert of_first.mean() == pytest.approx(share, abs=0.01)
    # Not only in the long run: within every 40 in a row.
    assert np.convolve(of_first, np.ones(40) / 40, "valid") == pytest.approx(share, abs=0.051)
    # And each dataset has epochs of its own.
    for keys, mine in ((SQUARES, stream[of_first]), (MORE, stream[~of_first])):
        epochs = mine[: len(mine) // len(keys) * len(keys)].reshape(-1, len(keys))
        assert {frozenset(epoch) for epoch in epochs.tolist()} == {frozenset(keys)}
        assert len(np.unique(epochs[:6], axis=0)) > 4  # each in another order


def test_a_batch_is_of_one_bucket_and_a_bucket_has_epochs_of_its_own(train_batches):
    batches = train_batches(["tall"], batch_size=3)
    seen = {bucket: [] for bucket in TALL}
    for _ in range(130):
        batch = next(batches)
        height, width = batch["moments"].shape[2:4]
        seen[f"{4 * height}x{4 * width}"] += [int(key) for key in batch["key"]]
    for bucket, keys in TALL.items():
        epochs = np.reshape(seen[bucket][: len(seen[bucket]) // len(keys) * len(keys)], (-1, len(keys)))
        assert {frozenset(epoch) for epoch in epochs.tolist()} == {frozenset(keys)}
        # In proportion to their sizes: 130 batches are 30 epochs.
        assert len(seen[bucket]) == pytest.approx(30 * len(keys), abs=3)
    assert len(np.unique(np.reshape(seen["16x16"][:35], (5, 7)), axis=0)) == 5


def test_with_weights_and_buckets_both_proportions_hold(train_batches):
    stream = np.concatenate(take_keys(train_batches(**KINDS["all of it"], batch_size=2), 600))
    assert np.isin(stream, list(SQUARES)).mean() == pytest.approx(1 / 3, abs=0.01)
    for keys in TALL.values():
        assert np.isin(stream, list(keys)).mean() == pytest.approx(2 / 3 * len(keys) / 13, abs=0.01)


@each_row("kind", KINDS)
def test_index_counts_the_examples_of_the_run(train_batches, kind):
    batches = train_batches(**KINDS[kind])
    np.testing.assert_array_equal(np.concatenate([next(batches)["index"] for _ in range(20)]), np.arange(80))


@pytest.mark.ci
@each_row("kind", KINDS)
@each_row("process_count", [2, 4])
def test_any_number_of_processes_sees_the_same_batches(train_batches, kind, process_count):
    alone = train_batches(**KINDS[kind])
    together = [
        train_batches(**KINDS[kind], process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    for _ in range(20):
        expected, shares = next(alone), [next(batches) for batches in together]
        for name, joined in expected.items():
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), joined)
    assert {batches.get_state() for batches in together} == {alone.get_state()}


@pytest.mark.ci
@each_row("kind", KINDS)
@each_row("stop_after", [1, 8])
def test_a_run_that_is_resumed_sees_what_one_that_was_not_sees(train_batches, kind, stop_after):
    """And so in each epoch what had not been seen before: 15 batches are two epochs at least."""
    expected = take_keys(train_batches(**KINDS[kind]), 15)
    stopped = train_batches(**KINDS[kind])
    seen = take_keys(stopped, stop_after)
    resumed = train_batches(**KINDS[kind])
    take_keys(resumed, 2)  # whatever it has read ahead is dropped
    resumed.set_state(stopped.get_state())
    seen += take_keys(resumed, 15 - stop_after)
    assert seen == expected
    if kind in ("one", "several"):
        every = SQUARES | (MORE if kind == "several" else set())
        stream = list(itertools.chain(*seen))
        for epoch in range(2):
            assert set(stream[epoch * len(every) :][: len(every)]) == every


@each_row(
    ("saved", "restored", "message"),
    [
        ("one", "several", "num_examples = 10, but this run has 14"),
        ("weighted", "several", r"weights = \[3.0, 1.0\], but this run has None"),
        ("several", "weighted", r"weights = None, but this run has \[3.0, 1.0\]"),
        ("buckets", "one", "num_examples = 13"),
    ],
)
def test_the_position_in_other_data_is_refused(train_batches, saved, restored, message):
    state = train_batches(**KINDS[saved]).get_state()
    with pytest.raises(ValueError, match=rf"data position: saved with {message}"):
        train_batches(**KINDS[restored]).set_state(state)


def test_the_position_in_as_many_examples_of_other_datasets_or_buckets_is_refused(train_batches):
    batches = train_batches(["squares", "tall"])
    state = json.loads(batches.get_state())
    for key, other in (("datasets", [13, 10]), ("buckets", {"16x16": 16, "8x32": 6, "32x8": 1})):
        with pytest.raises(ValueError, match=rf"saved with {key} = .*, but this run has"):
            batches.set_state(json.dumps({**state, key: other}))


def test_an_evaluation_reads_one_dataset_after_another(folder):
    batches = list(
        loader.eval_batches(read_datasets(f"{folder / 'squares'}, {folder / 'more'}"), batch_size=3)
    )
    assert [batch["key"] for batch in batches] == [
        ["0", "1", "2"], ["3", "4", "100"], ["101", "102"]
    ]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate([batch["index"] for batch in batches]), np.arange(8))


def test_an_evaluation_reads_one_bucket_after_another(folder):
    batches = list(
        loader.eval_batches(read_datasets(f"{folder / 'tall'},{folder / 'squares'}"), batch_size=3)
    )
    assert [(batch["key"], batch["moments"].shape[2:4]) for batch in batches] == [
        (["200", "201", "202"], (4, 4)),
        (["0", "1", "2"], (4, 4)),
        (["3", "4"], (4, 4)),
        (["203", "204"], (2, 8)),
    ]
    np.testing.assert_array_equal(np.concatenate([batch["index"] for batch in batches]), np.arange(10))


def test_a_bucket_holds_what_was_written_and_tfds_opens_it_too(folder):
    batch = list(loader.eval_batches(read_datasets(folder / "tall"), batch_size=3))[-1]
    source = tfds.builder_from_directory(folder / "tall").as_data_source("validation_8x32")
    assert len(source) == len(batch["key"]) == 2
    for row, theirs in enumerate(source):
        written = make_example(203 + row, bucket="8x32")
        for name in ("moments", "tokens", "micro_conditioning", "preference", "loser_won"):
            np.testing.assert_array_equal(batch[name][row], written[name])
            np.testing.assert_array_equal(theirs[name], written[name])
        assert batch["caption"][row] == theirs["caption"].decode() == written["caption"]


def test_an_evaluation_passes_over_a_dataset_that_holds_nothing_out(folder, tmp_path):
    write_dataset(tmp_path / "all", validation=0)
    path = f"{tmp_path / 'all'},{folder / 'more'}"
    assert sum(count_examples(read_datasets(path), "validation").values()) == 3
    assert [batch["key"] for batch in loader.eval_batches(read_datasets(path), batch_size=4)] == [
        ["100", "101", "102"]
    ]
    # But what is trained on is trained on.
    with pytest.raises(ValueError, match=rf"^{folder / 'tall'}: split = 'test': unknown"):
        loader.train_batches(read_datasets(f"{folder / 'tall'}"), batch_size=4, seed=0, split="test")
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'all'}: split 'validation' is empty"):
        loader.train_batches(read_datasets(path), batch_size=4, seed=0, split="validation")


@each_row("weights", [(1.0,), (1.0, 2.0, 3.0), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan"))])
def test_weights_that_do_not_fit_are_refused(train_batches, weights):
    with pytest.raises(ValueError, match=r"^config\.data\.weights = \(1\.0.*: must be 2 positive number"):
        train_batches(["squares", "more"], weights=weights)


@each_row(
    ("change", "message"),
    [
        ({"resolution": 32}, "resolution = 16 and 32: datasets of one run must agree"),
        ({"model": {**MANIFEST["model"], "shift": 1}}, "model.shift = None and 1: "),
        ({"model": {**MANIFEST["model"], "scaling_factor": 1}}, "model.scaling_factor = 0.18215 and 1: "),
    ],
)
def test_datasets_that_do_not_fit_one_another_are_refused(folder, tmp_path, change, message):
    write_dataset(tmp_path / "other", manifest={**MANIFEST, **change})
    with pytest.raises(ValueError, match=rf"^{folder / 'squares'}, {tmp_path / 'other'}: {message}"):
        sum(count_examples(read_datasets(f"{folder / 'squares'},{tmp_path / 'other'}"), "train").values())


def test_single_images_do_not_mix_with_pairs(folder, tmp_path):
    write_dataset(tmp_path / "other", images=1)
    with pytest.raises(ValueError, match="images_per_example = 2 and 1"):
        sum(count_examples(read_datasets(f"{folder / 'squares'},{tmp_path / 'other'}"), "train").values())


def test_another_name_of_the_model_fits(folder, tmp_path):
    write_dataset(tmp_path / "other", manifest={**MANIFEST, "model": {**MANIFEST["model"], "model": "copy"}})
    assert (
        sum(count_examples(read_datasets(f"{folder / 'squares'},{tmp_path / 'other'}"), "train").values())
        == 20
    )


def test_a_folder_that_is_no_dataset_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path / 'nothing' / 'manifest.json'}: no such file"):
        sum(count_examples(read_datasets(f"{folder / 'squares'},{tmp_path / 'nothing'}"), "train").values())
