"""Datasets of TensorFlow Datasets: read by position, images undecoded, and what is refused."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from image_files import number_of, numbered_image
from tensorflow_datasets.core import example_serializer, naming

from dspo_jax.data.sources import decode_pair, get_source
from dspo_jax.errors import UserError
from dspo_jax.images.image_files import BadRow

FEATURES = {
    "caption": tfds.features.Text(),
    "winner": tfds.features.Image(),
    "loser": tfds.features.Image(),
}
LABELLED = {**FEATURES, "preference": tfds.features.Scalar(np.float32), "key": tfds.features.Text()}


@pytest.fixture
def dataset(tmp_path):
    """Writes a dataset `my_pairs` of some sizes; returns a function that makes its source."""

    def dataset(sizes, features=FEATURES, suffix="array_record", columns=None, caption=None):
        name, columns = "my_pairs", columns or {}
        folder = tmp_path / name / "1.0.0"
        folder.mkdir(parents=True)
        spec = tfds.features.FeaturesDict(features)
        serializer = example_serializer.ExampleSerializer(spec.get_serialized_info())
        first, infos = 0, []
        for split, size in sizes.items():
            path = folder / f"{name}-{split}.{suffix}-00000-of-00001"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for i in range(first, first + size):
                example = {
                    "caption": caption or f"caption {i % 50}",
                    "winner": io.BytesIO(numbered_image(2 * i)),
                    "loser": io.BytesIO(numbered_image(2 * i + 1)),
                    "preference": 0.5 + i / 256,
                    "key": f"key {i}",
                }
                example = {column: example[columns.get(column, column)] for column in features}
                writer.write(serializer.serialize_example(spec.encode_example(example)))
            writer.close()
            first += size
            template = naming.ShardedFileTemplate(
                data_dir=folder, dataset_name=name, split=split, filetype_suffix=suffix
            )
            infos.append(
                tfds.core.SplitInfo(name=split, shard_lengths=[size], num_bytes=1, filename_template=template)
            )
        tfds.folder_dataset.write_metadata(
            data_dir=folder, features=spec, split_infos=infos, version="1.0.0", check_data=False
        )
        return lambda **arguments: get_source(
            "tfds", **{"dataset": f"{name}:1.0.0", "data_dir": str(tmp_path), **arguments}
        )

    return dataset


def images(row):
    return [number_of(image) for image in decode_pair(row)]


def test_examples_are_pairs_with_their_images_undecoded(dataset):
    source = dataset({"train": 3, "test": 2})()
    assert (source.splits, source.images_per_example) == (("train", "test"), 2)
    rows = list(source.pairs("train"))
    assert rows[1].winner == numbered_image(2)
    assert [images(row) for row in rows] == [[0, 1], [2, 3], [4, 5]]
    assert [(row.caption, row.preference, row.key) for row in rows] == [
        (f"caption {i}", 1.0, str(i)) for i in range(3)
    ]
    assert [images(row) for row in source.pairs("test")] == [[6, 7], [8, 9]]


def test_preferences_and_keys_are_read(dataset):
    rows = list(dataset({"train": 2}, LABELLED)(validation_share=0.0).pairs("train"))
    assert [(row.preference, row.key) for row in rows] == [(0.5, "key 0"), (0.50390625, "key 1")]


def test_features_may_have_other_names(dataset):
    names = {"caption": "text", "winner": "good", "loser": "bad", "preference": "p", "key": "name"}
    features = {names[name]: feature for name, feature in LABELLED.items()}
    source = dataset({"train": 2}, features, columns={column: name for name, column in names.items()})(
        **names
    )
    rows = sorted((row for split in source.splits for row in source.pairs(split)), key=lambda row: row.key)
    assert [(row.caption, row.key, *images(row)) for row in rows] == [
        ("caption 0", "key 0", 0, 1),
        ("caption 1", "key 1", 2, 3),
    ]


def test_an_empty_loser_is_for_single_images(dataset):
    features = {name: FEATURES[name] for name in ("caption", "winner")}
    source = dataset({"train": 1}, features)(loser="")
    (row,) = source.pairs("train")
    assert (source.images_per_example, row.loser, images(row)) == (1, None, [0])


def test_ids_tell_which_losers_won_elsewhere(dataset):
    ids = {"winner_id": "caption", "loser_id": "key"}
    features = {**FEATURES, **dict.fromkeys(ids, tfds.features.Text())}
    source = dataset({"train": 3}, features, columns=ids, caption="key 1")
    marked = source(winner_id="winner_id", loser_id="loser_id", validation_share=0.0)
    assert [row.loser_won for row in marked.pairs("train")] == [False, True, False]
    assert [row.loser_won for row in marked.pairs("train", 1, 2)] == [True]
    assert not any(row.loser_won for row in source(validation_share=0.0).pairs("train"))
    with pytest.raises(UserError, match=r"config\.source\.loser_id = 'loser_id': .*name the ids of both"):
        source(loser_id="loser_id")


def test_captions_are_held_out_whole_where_there_is_only_train(dataset):
    source = dataset({"train": 100})(validation_share=0.3)
    train, validation = ([row.caption for row in source.pairs(split)] for split in source.splits)
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 100
    assert len(validation) >= 10


def test_filters_and_ranges(dataset):
    source = dataset({"train": 100, "validation": 1}, LABELLED)(
        caption_pattern=r"caption 1", min_margin=0.2, one_pair_per_prompt=True
    )
    # Captions 1, 10 to 19; 2p - 1 = i / 128 >= 0.2 from i = 26: numbers 51 and 60 to 69.
    whole = list(source.pairs("train"))
    assert [row.key for row in whole] == [f"key {i}" for i in (51, *range(60, 70))]
    assert source.left_out("train") == {"caption_pattern": 78, "min_margin": 11}
    assert [*source.pairs("train", 0, 4), *source.pairs("train", 4)] == whole


def test_only_what_is_yielded_is_read_where_nothing_is_selected(dataset, monkeypatch):
    source = dataset({"train": 20, "test": 20})()
    read = []
    of_class = tfds.core.data_sources.array_record.ArrayRecordDataSource
    original = of_class.__getitem__
    monkeypatch.setattr(of_class, "__getitem__", lambda self, i: read.append(i) or original(self, i))
    assert source.num_examples("train") == 20
    assert [images(row)[0] for row in source.pairs("train", 5, 8)] == [10, 12, 14]
    assert read == [5, 6, 7]


def test_other_examples_of_the_same_number_have_another_digest(dataset):
    source = dataset({"train": 4, "validation": 4})()
    both = {split: source.digest(split) for split in ("train", "validation")}
    assert len(set(both.values())) == 2
    assert {split: source.digest(split) for split in both} == both


def test_a_preference_out_of_range_is_a_bad_row(dataset):
    *_, row = dataset({"train": 130, "test": 1}, LABELLED)().pairs("train")
    with pytest.raises(BadRow, match="preference outside"):
        decode_pair(row)


def test_a_caption_that_is_not_utf_8_is_refused_in_one_line(dataset):
    source = dataset({"train": 1}, caption=b"caf\xe9")
    for ask in (source(), source(validation_share=0.0)):
        with pytest.raises(ValueError, match=r"'my_pairs:1.0.0': example 0: feature 'caption' is not UTF-8"):
            list(ask.pairs("train"))


def test_a_dataset_that_is_not_there_is_refused_in_one_line(dataset, tmp_path):
    dataset({"train": 1})
    for name in ("others", "my_pairs:2.0.0", "my_pairs/large", "not a name"):
        with pytest.raises(
            FileNotFoundError, match=rf"config.source.dataset = '{name}': not found in "
        ) as caught:
            get_source("tfds", dataset=name, data_dir=str(tmp_path)).splits  # noqa: B018
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"config.source.dataset is not set: give --config.source.dataset="):
        get_source("tfds").splits  # noqa: B018


def test_another_file_format_is_refused_in_one_line(dataset):
    source = dataset({"train": 1}, suffix="tfrecord")()
    with pytest.raises(ValueError, match=r"its files are of format 'tfrecord'; prepare it with file_format="):
        source.splits  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"winner": "chosen"},
            r"no feature 'chosen' \(found: caption, loser, winner\); .*source.winner=FEATURE",
        ),
        ({"key": "id"}, r"no feature 'id'"),
        ({"loser": "caption"}, r"feature 'caption' is of type Text, not Image"),
        ({"caption": "winner"}, r"feature 'winner' is of type Image, not Text"),
    ],
)
def test_features_of_other_names_or_types_are_refused(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        dataset({"train": 1})(**arguments).splits  # noqa: B018
