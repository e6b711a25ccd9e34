"""Columns of parquet files in the types that pandas, polars, datasets and pyarrow leave them in."""

import datetime
import decimal
import json
import re

import numpy as np
import parquet_files
import pyarrow as pa
import pytest
from image_files import number_of, numbered_image
from parquet_files import pairs, pick_a_pic
from tables import each_row

from dspo_jax.data.sources import decode_pair, get_source
from dspo_jax.images.image_files import BadRow

TEXTS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "category": pa.dictionary(pa.int8(), pa.string()),
    "polars' category": pa.dictionary(pa.uint32(), pa.large_string()),
}
BYTES = {
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
}
NUMBERS = {
    "float64": pa.float64(),
    "float32": pa.float32(),
    "float16": pa.float16(),
    "int64": pa.int64(),
    "uint8": pa.uint8(),
    "bool": pa.bool_(),
    "decimal": pa.decimal128(9, 3),
    "category": pa.dictionary(pa.int8(), pa.float64()),
}
OTHERS = {
    "list": pa.array([["a"], ["b"]]),
    "struct": pa.array([{"a": 1}, {"a": 2}]),
    "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    "list of bytes": pa.array([[1, 2], [3]], pa.list_(pa.uint8())),
    "null": pa.nulls(2),
    "fixed": pa.array([b"abcd", b"efgh"], pa.binary(4)),
    "date": pa.array([datetime.date(2024, 1, day) for day in (1, 2)]),
}


def cast(values, kind):
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    if pa.types.is_decimal(kind):
        return pa.array([value if value is None else decimal.Decimal(str(value)) for value in values], kind)
    if pa.types.is_floating(kind) and kind == pa.float16():
        return pa.array([value if value is None else np.float16(value) for value in values], kind)
    return pa.array(values).cast(kind, safe=False) if pa.types.is_boolean(kind) else pa.array(values, kind)


def make_source(folder):
    """Writes one file and returns its source, of which nothing is held out."""

    def source(name, columns, **arguments):
        path = parquet_files.write(folder / "mine.parquet", columns)
        return get_source(name, **{"path": str(path), "validation_share": 0.0, **arguments})

    return source


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path)


def images(row):
    return [number_of(image) for image in decode_pair(row)]


# --- What is converted
# ----------------------------------------------------------------------------------------------


@each_row("kind", TEXTS.values())
def test_captions_and_keys(tmp_path, kind):
    source = make_source(tmp_path)
    columns = pairs(2, caption=cast(["a", "b"], kind), key=cast(["x", "y"], kind))
    rows = source("parquet", columns, one_pair_per_prompt=True).pairs("train")
    assert [(row.caption, row.key) for row in rows] == [("a", "x"), ("b", "y")]


@each_row("kind", BYTES.values())
@each_row("struct", [False, True])
def test_images_as_bytes(tmp_path, kind, struct):
    source = make_source(tmp_path)
    columns = pairs(2)
    for name in ("winner", "loser"):
        array = cast(columns[name], kind)
        if struct and not pa.types.is_dictionary(kind):
            paths = pa.array(["x.png", None])
            array = pa.StructArray.from_arrays([array, paths], names=["bytes", "path"])
        columns[name] = array
    assert [images(row) for row in source("parquet", columns).pairs("train")] == [[0, 1], [2, 3]]


@each_row("kind", NUMBERS.values())
def test_labels_and_preferences(tmp_path, kind):
    source = make_source(tmp_path)
    columns = pick_a_pic([1, 0, None], label_0=cast([1, 0, None], kind), has_label=None)
    chosen = source("pick_a_pic", columns)
    rows = list(chosen.pairs("train"))
    assert [(images(row), row.preference) for row in rows] == [([0, 1], 1.0), ([3, 2], 1.0)]
    assert chosen.left_out("train") == {"no label": 1}
    preferred = source("parquet", pairs(2, preference=cast([1, None], kind)), min_margin=1.0)
    assert [row.preference for row in preferred.pairs("train")] == [1.0, 1.0]


@each_row("kind", NUMBERS.values())
def test_flags(tmp_path, kind):
    source = make_source(tmp_path)
    columns = pick_a_pic([1, 1, 1], has_label=cast([1, 0, None], kind))
    chosen = source("pick_a_pic", columns)
    assert [images(row) for row in chosen.pairs("train")] == [[0, 1], [4, 5]]
    assert chosen.left_out("train") == {"no label": 1}


@each_row("kind", [*NUMBERS.values(), *TEXTS.values()])
def test_names_of_images_and_lists(tmp_path, kind):
    source = make_source(tmp_path)
    """a beats b, b beats c: only b lost and won."""
    values = [1, 0] if kind in NUMBERS.values() else ["1", "0"]
    uids = {"image_0_uid": cast(values, kind), "image_1_uid": cast([values[1]] * 2, kind)}
    columns = pick_a_pic([1, 1], ["a", "a"], **uids, ranking_id=cast(values, kind))
    rows = list(source("pick_a_pic", columns).pairs("train"))
    assert [row.loser_won for row in rows] == [True, True]  # 1 beats 0, and 0 itself
    assert len(list(source("pick_a_pic", columns, one_pair_per_prompt=True).pairs("train"))) == 1


def test_names_of_two_types_are_compared_as_text(source):
    uids = {"image_0_uid": [1, 2], "image_1_uid": ["2", "3"]}
    rows = source("pick_a_pic", pick_a_pic([1, 1], **uids)).pairs("train")
    assert [row.loser_won for row in rows] == [True, False]


# --- What does not matter, and what is refused
# ----------------------------------------------------------------------


@each_row("other", OTHERS.values())
def test_a_column_that_is_not_used_may_be_of_any_type(tmp_path, other):
    source = make_source(tmp_path)
    names = ("model_0", "model_1", "ranking_id", "image_0_uid", "more")
    columns = pick_a_pic([1, 1], **dict.fromkeys(names, other))
    chosen = source("pick_a_pic", columns, one_pair_per_prompt=True)
    assert [images(row) for row in chosen.pairs("train")] == [[0, 1], [2, 3]]
    mine = source("parquet", pairs(2, key=other, more=other), one_pair_per_prompt=True)
    keys = ["2024-01-01", "2024-01-02"] if pa.types.is_date(other.type) else ["mine/0", "mine/1"]
    assert [row.key for row in mine.pairs("train")] == keys


@each_row("column", ["caption", "winner", "preference"])
@each_row("name", [name for name in OTHERS if name != "null"])
def test_a_column_that_is_used_is_refused_by_file_column_and_type(tmp_path, column, name):
    source = make_source(tmp_path)
    columns = {**pairs(2), column: OTHERS[name]}
    kind = str(OTHERS[name].type).split("<")[0]
    message = rf"mine.parquet: column '{column}' is of type {re.escape(kind)}.* must hold"
    with pytest.raises(ValueError, match=message) as caught:
        source("parquet", columns).num_examples("train")
    assert "\n" not in str(caught.value)


def test_a_struct_without_an_image_is_refused(source):
    for struct in ({"data": b"x"}, {"bytes": 3}, {"bytes": b"x", "path": 3}, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match=r"column 'winner' is of type struct<.*must hold images"):
            source("parquet", pairs(1, winner=[struct]), seed=len(str(struct))).num_examples("train")


def test_columns_of_one_name_are_refused(tmp_path):
    arrays = [pa.array(values) for values in pairs(1).values()]
    table = pa.table([*arrays, pa.array(["b"])], names=["caption", "winner", "loser", "caption"])
    parquet_files.pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: 2 columns are called 'caption'; rename all but one"):
        get_source("parquet", path=str(tmp_path)).num_examples("train")


def test_files_of_different_types_go_together_or_are_named(tmp_path):
    for folder in ("good", "bad"):
        category = pairs(1, caption=cast(["a"], TEXTS["category"]), key=["x"])
        parquet_files.write(tmp_path / folder / "a.parquet", category)
        more = pairs(1, first=1, preference=[1], key=["y"])
        parquet_files.write(tmp_path / folder / "b.parquet", more)
    source = get_source("parquet", path=str(tmp_path / "good"), validation_share=0.0)
    assert [(row.caption, row.key) for row in source.pairs("train")] == [("a", "x"), ("caption 1", "y")]
    parquet_files.write(tmp_path / "bad" / "c.parquet", pairs(1, key=[7]))
    message = r"column 'key': large_string in .*b.parquet, int64 in .*c.parquet; write it in one type"
    with pytest.raises(ValueError, match=message):
        get_source("parquet", path=str(tmp_path / "bad")).num_examples("train")


@pytest.mark.parametrize("encode", [lambda text: text, lambda text: text.dictionary_encode()])
def test_text_that_is_not_utf_8_is_named_by_its_row(source, encode):
    text = pa.array([b"caf\xc3\xa9", b"caf\xe9"]).view(pa.string())
    with pytest.raises(ValueError, match=r"mine.parquet: row 1: column 'caption' is not UTF-8") as caught:
        source("parquet", pairs(2, caption=encode(text))).num_examples("train")
    assert "\n" not in str(caught.value)


# --- Images as files beside the parquet
# -----------------------------------------------------------------------------


@pytest.fixture
def beside(tmp_path):
    """A folder with parts/mine.parquet and parts/images/0.png to 3.png; returns what writes its columns."""
    for number in range(4):
        path = tmp_path / "data" / "parts" / "images" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(numbered_image(number))

    def write(winner, loser, **arguments):
        columns = pairs(2, winner=winner, loser=loser)
        parquet_files.write(tmp_path / "data" / "parts" / "mine.parquet", columns)
        return get_source("parquet", path=str(tmp_path / "data"), validation_share=0.0, **arguments)

    return write


@pytest.mark.parametrize(
    "wrap",
    [
        lambda paths: paths,
        lambda paths: cast(paths, TEXTS["category"]),
        lambda paths: [{"bytes": None, "path": path} for path in paths],
        lambda paths: [{"bytes": b"", "path": path} for path in paths],
        lambda paths: [{"path": path} for path in paths],
        lambda paths: pa.StructArray.from_arrays(
            [pa.nulls(2, pa.large_binary()), pa.array(paths)], names=["bytes", "path"]
        ),
    ],
    ids=["text", "category", "no bytes", "empty bytes", "path alone", "datasets"],
)
def test_images_are_read_by_their_paths(beside, wrap):
    source = beside(wrap(["images/0.png", "images/2.png"]), wrap(["images/1.png", "images/9.png"]))
    good, bad = source.pairs("train")
    assert images(good) == [0, 1]
    with pytest.raises(BadRow, match=r"missing image file: .*parts/images/9\.png"):
        decode_pair(bad)


def test_paths_may_not_leave_the_source_unless_told(beside, tmp_path):
    (tmp_path / "0.png").write_bytes(numbered_image(7))
    inside = str(tmp_path / "data" / "parts" / "images" / "1.png")
    winner, loser = ["../../0.png"] * 2, [inside, "../parts/images/1.png"]
    with pytest.raises(
        ValueError, match=r"0\.png: leads out of .*data, to .*--config\.source\.allow_outside"
    ):
        list(beside(winner, loser).pairs("train"))
    rows = beside(winner, loser, allow_outside=True).pairs("train")
    assert [images(row) for row in rows] == [[7, 1], [7, 1]]


def test_paths_on_the_hub_are_refused_in_one_line(tmp_path, monkeypatch):
    hub = parquet_files.Hub(tmp_path / "hub")
    path = tmp_path / "hub/datasets/someone/files/train.parquet"
    parquet_files.write(path, pairs(1, winner=["0.png"]))
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: hub)
    monkeypatch.chdir(tmp_path)
    source = get_source("parquet", path="someone/files", validation_share=0.0)
    with pytest.raises(ValueError, match=r"someone/files/train.parquet: row 0: .* '0.png', .*; download the"):
        next(source.pairs("train"))


def test_pick_a_pic_has_paths_too(tmp_path):
    (tmp_path / "a.png").write_bytes(numbered_image(5))
    parquet_files.write(tmp_path / "train.parquet", pick_a_pic([1], jpg_0=[json.loads('{"path": "a.png"}')]))
    (row,) = get_source("pick_a_pic", path=str(tmp_path), validation_share=0.0).pairs("train")
    assert images(row) == [5, 1]
