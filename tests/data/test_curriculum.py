"""Easy pairs first: what a curriculum draws when, and that it resumes."""

import itertools

import numpy as np
import pytest
from example_shards import MANIFEST, conditioning_shapes, make_example

from dspo_jax.data import loader, shards
from dspo_jax.data.datasets import read_datasets
from dspo_jax.data.writer import DatasetWriter
from dspo_jax.errors import UserError

# Scores of winner and loser by key, which are apart by 1, 0, 9, 4, 9, 2, 7 (the loser's is higher), one that
# is missing, and 5.
SCORES = [(1, 0), (3, 3), (9, 0), (4, 0), (0, -9), (2, 0), (0, 7), (1, np.nan), (5, 0)]
WIDEST_FIRST = [2, 4, 6, 8, 3, 5, 0, 1, 7]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Nine pairs with scores in three shards."""
    folder = tmp_path_factory.mktemp("curriculum") / "pairs"
    features = shards.feature_spec((2, 4, 4, 6), conditioning_shapes(1, 2), scored=True)
    manifest = {**MANIFEST, "score": {"name": "numbers", "version": "1"}}
    writer = DatasetWriter(folder, features, manifest, {"train": 3}, ())
    for shard in range(3):
        examples = [
            make_example(i) | {"scores": np.asarray(SCORES[i], np.float32)}
            for i in range(3 * shard, 3 * shard + 3)
        ]
        writer.write_shard("train", shard, examples)
    writer.commit()
    return read_datasets(str(folder))


def open_batches(dataset, **arguments):
    """Batches of three; three groups, of which one joins after every two batches."""
    curriculum = loader.Curriculum(groups=3, every=2)
    return loader.train_batches(
        dataset, **{"batch_size": 3, "seed": 0, "curriculum": curriculum, **arguments}
    )


def take(batches, count):
    """The keys of the next batches."""
    return [[int(key) for key in next(batches)["key"]] for _ in range(count)]


def test_groups_join_widest_gap_first(dataset):
    first, second, third, fourth, *rest = take(open_batches(dataset), 10)
    assert set(first) == set(second) == set(WIDEST_FIRST[:3])
    assert sorted(third + fourth) == sorted(WIDEST_FIRST[:6])
    for epoch in (rest[:3], rest[3:6]):
        assert sorted(itertools.chain(*epoch)) == list(range(9))
    other = take(open_batches(dataset, seed=1), 10)
    assert [set(keys) for keys in other[:2]] == [set(first)] * 2
    assert other[4:] != rest


def test_it_resumes_and_is_shared_by_processes(dataset):
    whole = take(open_batches(dataset), 8)
    stopped = open_batches(dataset)
    take(stopped, 3)
    resumed = open_batches(dataset)
    resumed.set_state(stopped.get_state())
    assert take(resumed, 5) == whole[3:]
    shares = [take(open_batches(dataset, process_index=i, process_count=3), 8) for i in range(3)]
    assert [list(itertools.chain(*keys)) for keys in zip(*shares, strict=True)] == whole


def test_another_order_is_not_resumed(dataset):
    stopped = open_batches(dataset)
    for curriculum in (None, loader.Curriculum(groups=3, every=1)):
        with pytest.raises(UserError, match="saved with curriculum = "):
            open_batches(dataset, curriculum=curriculum).set_state(stopped.get_state())


def test_more_groups_than_examples_are_refused(dataset):
    with pytest.raises(UserError, match=r"config\.data\.curriculum_groups = 10: more than the 9 examples"):
        open_batches(dataset, curriculum=loader.Curriculum(groups=10, every=1))
