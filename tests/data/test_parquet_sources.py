"""Parquet files: which are found, which split they are of, what is read of them, here and on the hub."""

import itertools
from pathlib import Path

import numpy as np
import parquet_files
import pyarrow as pa
import pytest
from image_files import number_of, numbered_image
from parquet_files import pairs, pick_a_pic
from tables import each_row

from dspo_jax.data.sources import decode_pair, get_source
from dspo_jax.errors import UserError
from dspo_jax.images.image_files import BadRow


def make_source(folder):
    """Writes one file and returns its source, of which nothing is held out."""

    def source(columns, **arguments):
        path = parquet_files.write(folder / "mine.parquet", columns)
        return get_source("parquet", **{"path": str(path), "validation_share": 0.0, **arguments})

    return source


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path)


def images(row):
    return [number_of(image) for image in decode_pair(row)]


# --- Rows
# -----------------------------------------------------------------------------------------------------------


def test_rows_have_defaults_for_what_there_is_no_column_of(source):
    chosen = source(pairs(2))
    rows = list(chosen.pairs("train"))
    assert [images(row) for row in rows] == [[0, 1], [2, 3]]
    assert [(row.caption, row.preference, row.key) for row in rows] == [
        ("caption 0", 1.0, "mine/0"),
        ("caption 1", 1.0, "mine/1"),
    ]
    assert (chosen.images_per_example, chosen.splits, dict(chosen.left_out("train"))) == (2, ("train",), {})


def test_preference_and_key_are_read(source):
    rows = source(pairs(3, preference=[0.75, None, 1.0], key=["a", None, "b"])).pairs("train")
    assert [(row.preference, row.key) for row in rows] == [(0.75, "a"), (1.0, "mine/1"), (1.0, "b")]


def test_columns_may_have_other_names(source):
    columns = {
        "prompt": ["a fox", "a dog"],
        "file": [numbered_image(0), numbered_image(2)],
        "row": [numbered_image(1), numbered_image(3)],
        "margin": [0.6, 0.9],
        "list": [5, 6],
    }
    names = {"caption": "prompt", "winner": "file", "loser": "row", "preference": "margin", "key": "list"}
    rows = list(source(columns, **names, one_pair_per_prompt=True).pairs("train"))
    assert [images(row) for row in rows] == [[0, 1], [2, 3]]
    assert [(row.preference, row.key) for row in rows] == [(0.6, "5"), (0.9, "6")]


def test_images_may_be_the_hubs_struct(source):
    columns = pairs(2)
    for name in ("winner", "loser"):
        columns[name] = [{"bytes": data, "path": "x.png"} for data in columns[name]]
    columns["loser"][1] = {"bytes": None, "path": "x.png"}
    good, bad = source(columns).pairs("train")
    assert images(good) == [0, 1]
    with pytest.raises(BadRow, match="missing image file"):
        decode_pair(bad)


def test_an_empty_loser_is_for_single_images(source):
    chosen = source(pairs(1, loser=None), loser="")
    (row,) = chosen.pairs("train")
    assert (chosen.images_per_example, row.loser, images(row)) == (1, None, [0])


def test_ids_tell_which_losers_won_elsewhere(source):
    columns = pairs(4, won=["1", "2", "3", "4"], lost=[2, 5, None, 3])  # text and numbers
    chosen = source(columns, winner_id="won", loser_id="lost")
    assert [row.loser_won for row in chosen.pairs("train")] == [True, False, False, True]
    assert [row.loser_won for row in chosen.pairs("train", 3)] == [True]
    assert [images(row) for row in chosen.pairs("train", 3)] == [[6, 7]]
    with pytest.raises(UserError, match=r"config\.source\.winner_id = 'won': .*name the ids of both"):
        source(columns, winner_id="won")
    with pytest.raises(UserError, match="no column 'third'"):
        source(columns, winner_id="won", loser_id="third").num_examples("train")


@pytest.mark.parametrize("labels", [[True, None, False], [1, None, 0], [1.0, None, 0.0]])
def test_single_images_may_have_labels(source, labels):
    columns = pairs(3, loser=None, liked=labels)
    chosen = source(columns, loser="", preference="liked")
    assert [row.preference for row in chosen.pairs("train")] == [1.0, 0.0]
    assert [images(row) for row in chosen.pairs("train")] == [[0], [4]]
    assert chosen.left_out("train") == {"no label": 1}


def test_margins_are_of_the_preference(source):
    chosen = source(pairs(3, preference=[0.75, None, 0.6]), min_margin=0.5)
    assert [row.preference for row in chosen.pairs("train")] == [0.75, 1.0]
    assert chosen.left_out("train") == {"min_margin": 1}


def test_with_keys_one_pair_of_a_prompt_does_not_depend_on_the_order(tmp_path):
    table = pa.table(
        pairs(40, caption=[f"caption {i % 4}" for i in range(40)], key=[f"{i}" for i in range(40)])
    )
    kept = []
    for name, order in {"a": range(40), "b": range(39, -1, -1)}.items():
        path = parquet_files.write(tmp_path / f"{name}.parquet", table.take(list(order)).to_pydict())
        source = get_source("parquet", path=str(path), one_pair_per_prompt=True, validation_share=0.0)
        kept.append({row.key for row in source.pairs("train")})
    assert kept[0] == kept[1]
    assert len(kept[0]) == 4


def test_a_preference_out_of_range_is_a_bad_row(source):
    (row,) = source(pairs(1, preference=[0.3])).pairs("train")
    with pytest.raises(BadRow, match="preference outside"):
        decode_pair(row)


@each_row(
    ("columns", "arguments", "message"),
    [
        (pairs(1, caption=None), {}, r"no column 'caption' .*; name it with --config.source.caption=COLUMN"),
        (
            pairs(1, loser=None),
            {},
            r"no column 'loser' \(found: caption, winner\); .* --config.source.loser=''",
        ),
        (pairs(1), {"preference": "p"}, r"no column 'p' .*--config.source.preference=COLUMN"),
        (pairs(1, preference=["0.7"]), {}, r"column 'preference' is of type string, but must hold numbers"),
        (
            pairs(3, key=["a", "b", "a"]),
            {},
            r"config.source.key = 'key': this column .* several rows .* alike",
        ),
    ],
)
def test_faulty_columns_are_refused(tmp_path, columns, arguments, message):
    source = make_source(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        source(columns, **arguments).num_examples("train")
    assert "\n" not in str(caught.value)


# --- Files and splits
# -----------------------------------------------------------------------------------------------


@each_row(
    ("name", "split"),
    [
        ("train-00000-of-00645-b66ac786bf6fb553.parquet", "train"),
        ("data/validation_unique-00000-of-00001-33ead111845fc9c4.parquet", "validation_unique"),
        ("test/0003.parquet", "test"),
        ("deep/Validation/parts/a.parquet", "validation"),
        ("val.parquet", "validation"),
        ("pickapic-dev_2.parquet", "validation"),
        ("test.v2.parquet", "test"),
        ("testimony.parquet", "train"),
        ("part-00000-of-00002.parquet", "train"),
        ("train/test-0.parquet", "test"),
    ],
)
def test_the_split_is_told_by_the_name_of_a_file_or_its_folder(tmp_path, name, split):
    parquet_files.write(tmp_path / name, pairs(1))
    parquet_files.write(tmp_path / "test-9.parquet", pairs(2, first=1))
    source = get_source("parquet", path=str(tmp_path))
    assert set(source.splits) == {split, "test"}
    assert "caption 0" in {row.caption for row in source.pairs(split)}


def test_where_files_come_in_splits_nothing_is_held_out(tmp_path):
    for i, split in enumerate(("test", "validation", "train")):
        parquet_files.write(tmp_path / f"{split}.parquet", pairs(10, first=10 * i))
    source = get_source("parquet", path=str(tmp_path), validation_share=0.5)
    assert source.splits == ("train", "validation", "test")
    assert [source.num_examples(split) for split in source.splits] == [10, 10, 10]


def test_where_all_is_train_captions_are_held_out(tmp_path):
    parquet_files.write(tmp_path / "a.parquet", pairs(10))
    parquet_files.write(tmp_path / "b.parquet", pairs(10))
    source = get_source("parquet", path=str(tmp_path), validation_share=0.3)
    train, validation = ([row.caption for row in source.pairs(split)] for split in source.splits)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(2 * [f"caption {i}" for i in range(10)])
    assert len(validation) >= 2


def test_files_without_rows_do_no_harm(tmp_path):
    empty = pa.table(pairs(1))[:0]
    parquet_files.pq.write_table(empty, tmp_path / "a.parquet")
    source = get_source("parquet", path=str(tmp_path))
    assert (source.splits, source.num_examples("train"), list(source.pairs("train"))) == (("train",), 0, [])
    parquet_files.write(tmp_path / "more" / "b.parquet", pairs(2))
    parquet_files.pq.write_table(empty, tmp_path / "more" / "a.parquet")
    both = get_source("parquet", path=str(tmp_path / "more"), validation_share=0.0)
    assert [row.key for row in both.pairs("train")] == ["b/0", "b/1"]


def test_keys_are_unique_where_file_names_are_not(tmp_path):
    for name in ("a/0.parquet", "b/0.parquet", "test/a/0.parquet"):
        parquet_files.write(tmp_path / name, pairs(2))
    source = get_source("parquet", path=str(tmp_path))
    assert [row.key for row in source.pairs("train")] == ["a/0/0", "a/0/1", "b/0/0", "b/0/1"]
    assert [row.key for row in source.pairs("test")] == ["0/0", "0/1"]


@each_row("name", ["parquet", "pick_a_pic"])
def test_paths_without_parquet_files_are_refused(tmp_path, name):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no .parquet file in it or its subfolders"):
        get_source(name, path=str(tmp_path)).splits  # noqa: B018
    for path in ("nowhere", str(tmp_path / "not" / "there"), "three/part/name"):
        with pytest.raises(
            FileNotFoundError, match=r"no such file or folder, nor the id of a dataset \(OWNER/NAME or"
        ):
            get_source(name, path=path).splits  # noqa: B018


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(OSError, match=r"train.parquet: cannot be read as parquet \(.*\); fetch it again"):
        get_source("parquet", path=str(tmp_path)).num_examples("train")
    path = parquet_files.write(tmp_path / "b" / "train.parquet", pairs(4))
    parquet_files.destroy_images(path, ("winner",))
    source = get_source("parquet", path=str(tmp_path / "b"), validation_share=0.0)
    with pytest.raises(OSError, match=r"train.parquet: cannot be read as parquet"):
        list(source.pairs("train"))


# --- What is read
# ---------------------------------------------------------------------------------------------------


def test_ranges_are_parts_of_the_whole(tmp_path):
    for i in range(3):
        parquet_files.write(tmp_path / f"{i}.parquet", pick_a_pic([1, 0.5, 0] * 25, first=75 * i), 20)
    source = get_source("pick_a_pic", path=str(tmp_path), validation_share=0.0)
    whole = [(row.key, *images(row)) for row in source.pairs("train")]
    assert len(whole) == len(set(whole)) == source.num_examples("train") == 150
    assert whole[:3] == [("0/0", 0, 1), ("0/2", 5, 4), ("0/3", 6, 7)]
    for bounds in ([0, 1, 2, 150], [0, 13, 14, 50, 51, 99, 150], [0, 150, 200]):
        parts = [
            (row.key, *images(row))
            for start, stop in itertools.pairwise(bounds)
            for row in source.pairs("train", start, stop)
        ]
        assert parts == whole
    assert [row.key for row in source.pairs("train", 148)] == [key for key, *_ in whole[148:]]


def test_only_row_groups_that_hold_rows_of_the_range_are_read(tmp_path):
    columns = pick_a_pic([1.0] * 40)
    paths = [parquet_files.write(tmp_path / f"{name}.parquet", columns, 10) for name in "ab"]
    parquet_files.destroy_images(paths[0], ("jpg_0", "jpg_1"), spare=(1, 2))
    parquet_files.destroy_images(paths[1], ("jpg_0", "jpg_1"))
    source = get_source("pick_a_pic", path=str(tmp_path), validation_share=0.0)
    assert source.num_examples("train") == 80  # the index reads no image
    rows = source.pairs("train", 15, 30)
    assert [images(row) for row in rows] == [[2 * i, 2 * i + 1] for i in range(15, 30)]
    with pytest.raises(OSError, match="cannot be read"):
        next(source.pairs("train", 9, 30))


def test_of_a_huge_row_group_little_is_in_memory(tmp_path):
    noise = [np.random.default_rng(i).bytes(100_000) for i in range(400)]
    table = pa.table({"caption": ["a"] * 400, "winner": noise, "loser": noise})
    parquet_files.pq.write_table(table, tmp_path / "a.parquet", write_batch_size=8)
    source = get_source("parquet", path=str(tmp_path), validation_share=0.0)
    before, most = pa.total_allocated_bytes(), 0
    for row in source.pairs("train"):
        assert len(row.winner) == 100_000
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 80_000_000 / 3


# --- The hub
# --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the dataset someone/pairs: two files of 20 rows in four row groups each."""
    hub = parquet_files.Hub(tmp_path / "hub")
    for i in range(2):
        columns = pick_a_pic([1.0] * 20, first=20 * i)
        for name in ("jpg_0", "jpg_1"):
            columns[name] = [data + bytes(50_000) for data in columns[name]]
        table = pa.table(columns)
        path = tmp_path / "hub/datasets/someone/pairs/data" / f"train-0000{i}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet_files.pq.write_table(table, path, row_group_size=5, compression="none", use_dictionary=False)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: hub)
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.mark.parametrize("name", ["pick_a_pic", "parquet"])
def test_a_dataset_on_the_hub_is_read_in_place(hub, name):
    columns = {} if name == "pick_a_pic" else {"winner": "jpg_0", "loser": "jpg_1", "preference": "label_0"}
    source = get_source(name, path="someone/pairs", validation_share=0.0, **columns)
    assert (source.splits, source.num_examples("train")) == (("train",), 40)
    files = [f"datasets/someone/pairs/data/train-0000{i}-of-00002.parquet" for i in range(2)]
    of_index = dict(hub.bytes_read)
    assert set(of_index) == set(files)
    assert max(of_index.values()) < 200_000  # of two megabytes
    rows = list(source.pairs("train", 6, 9))
    assert [images(row) for row in rows] == [[12, 13], [14, 15], [16, 17]]
    assert rows[0].key == "train-00000-of-00002/6"
    assert hub.bytes_read[files[1]] == of_index[files[1]]
    assert 500_000 < hub.bytes_read[files[0]] - of_index[files[0]] < 800_000  # one row group of four


def test_a_revision_of_a_dataset_is_read(hub):
    here = Path("hub/datasets/someone")
    (here / "pairs").rename(here / "pairs@0123abc")
    source = get_source("pick_a_pic", path="someone/pairs@0123abc", validation_share=0.0)
    assert source.num_examples("train") == 40
    assert set(hub.bytes_read) == {
        f"datasets/someone/pairs@0123abc/data/train-0000{i}-of-00002.parquet" for i in range(2)
    }


def test_a_dataset_that_the_hub_does_not_have_is_refused_in_one_line(hub):
    with pytest.raises(
        OSError, match=r"'some/one': no such file or folder, and the hub gave no dataset of"
    ) as caught:
        get_source("parquet", path="some/one").splits  # noqa: B018
    assert "\n" not in str(caught.value)
