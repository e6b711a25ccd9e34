"""Pick-a-Pic: who won, what is left out, and what a file must have."""

import dataclasses

import parquet_files
import pyarrow as pa
import pytest
from image_files import number_of
from parquet_files import pick_a_pic
from tables import each_row

from dspo_jax.data.sources import decode_pair, get_source
from dspo_jax.images.image_files import BadRow


def make_source(folder):
    """Writes one file and returns its source, of which nothing is held out."""

    def source(columns, **arguments):
        parquet_files.write(folder / "train-00000-of-00001-abc.parquet", columns)
        return get_source("pick_a_pic", **{"path": str(folder), "validation_share": 0.0, **arguments})

    return source


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path)


def images(row):
    return [number_of(image) for image in decode_pair(row)]


def test_the_label_says_who_won_and_how_surely(source):
    rows = list(source(pick_a_pic([1.0, 0.0, 0.75, 0.25])).pairs("train"))
    assert [images(row) for row in rows] == [[0, 1], [3, 2], [4, 5], [7, 6]]
    assert [row.preference for row in rows] == [1.0, 1.0, 0.75, 0.75]
    assert [row.caption for row in rows] == [f"caption {i}" for i in range(4)]


def test_labels_may_be_whole_numbers(source):
    rows = list(source(pick_a_pic([1, 0], label_0=[1, 0])).pairs("train"))
    assert [images(row) for row in rows] == [[0, 1], [3, 2]]


def test_ties_and_rows_without_a_label_are_left_out(source):
    chosen = source(pick_a_pic([1, 0.5, 0, 0.5, None, 1], has_label=[True, True, False, False, True, None]))
    assert [row.key for row in chosen.pairs("train")] == [
        "train-00000-of-00001-abc/0",
        "train-00000-of-00001-abc/5",
    ]
    assert chosen.num_examples("train") == 2
    assert chosen.left_out("train") == {"no label": 3, "tie": 1}
    assert chosen.images_per_example == 2


def test_what_is_known_of_the_images_follows_winner_and_loser(source):
    _, row = source(pick_a_pic([1, 0])).pairs("train")
    assert row.meta == {
        "winner_uid": "uid 3",
        "loser_uid": "uid 2",
        "winner_model": "sd21",
        "loser_model": "sdxl",
        "ranking_id": 1,
    }


def test_a_loser_that_won_another_kept_pair_is_marked(source):
    uids = {"image_0_uid": ["a", "b", "d", "e", None], "image_1_uid": ["b", "c", "c", "a", None]}
    # a>b, b>c, a tie of d and c, a>e, unknown: only b lost and won
    rows = source(pick_a_pic([1, 1, 0.5, 0, 1], **uids)).pairs("train")
    assert [row.loser_won for row in rows] == [True, False, False, False]


def test_winners_that_a_filter_removed_do_not_count(source):
    columns = pick_a_pic([1, 1], ["x", "y"], image_0_uid=["a", "b"], image_1_uid=["b", "c"])
    assert [row.loser_won for row in source(columns).pairs("train")] == [True, False]
    assert [row.loser_won for row in source(columns, caption_pattern="x").pairs("train")] == [False]


def test_only_the_columns_that_matter_are_needed(source):
    optional = ("label_1", "has_label", "image_0_uid", "image_1_uid", "model_0", "model_1", "ranking_id")
    (row,) = source(pick_a_pic([0], **dict.fromkeys(optional))).pairs("train")
    assert (images(row), row.loser_won, set(row.meta.values())) == ([1, 0], False, {None})


def test_columns_of_nothing_count_as_absent(source):
    empty = {name: [None] for name in ("image_0_uid", "image_1_uid", "model_0", "model_1", "ranking_id")}
    (row,) = source(pick_a_pic([0], **empty), one_pair_per_prompt=True).pairs("train")
    assert (images(row), row.loser_won, set(row.meta.values())) == ([1, 0], False, {None})


def test_models_and_margins_select(source):
    models = {"model_0": ["a", "a", "b", None], "model_1": ["a", "b", "c", "a"]}
    columns = pick_a_pic([1, 0.8, 0, 1], **models)
    assert source(columns, models=("a",)).left_out("train") == {"models": 3}
    assert [row.meta["ranking_id"] for row in source(columns, models=("a", "b")).pairs("train")] == [0, 1]
    chosen = source(columns, min_margin=0.7)
    assert [row.preference for row in chosen.pairs("train")] == [1, 1, 1]
    assert chosen.left_out("train") == {"min_margin": 1}
    with pytest.raises(ValueError, match=r"config.source.models = \('a',\): .* no column 'model_0'"):
        source(pick_a_pic([1], model_0=None, model_1=None), models=("a",), seed=1).num_examples("train")
    with pytest.raises(ValueError, match=r"config.source.models = 'a': must be a tuple of names"):
        get_source("pick_a_pic", models="a")


def test_one_pair_of_a_prompt_does_not_depend_on_the_files(tmp_path):
    columns = pick_a_pic([1] * 30, [f"caption {i % 6}" for i in range(30)])
    kept = []
    for name, order in {"a": range(30), "b": reversed(range(30))}.items():
        table = pa.table(columns).take(list(order))
        parquet_files.write(tmp_path / name / f"{name}0.parquet", table[:11].to_pydict())
        parquet_files.write(tmp_path / name / f"{name}1.parquet", table[11:].to_pydict())
        source = get_source(
            "pick_a_pic", path=str(tmp_path / name), one_pair_per_prompt=True, validation_share=0.0
        )
        kept.append({row.meta["ranking_id"] for row in source.pairs("train")})
        assert source.left_out("train") == {"one_pair_per_prompt": 24}
    assert kept[0] == kept[1]
    assert len({number % 6 for number in kept[0]}) == 6


@each_row(
    ("change", "reason"),
    [
        ({"caption": ["", "x"]}, "empty caption"),
        ({"caption": [None, "x"]}, "empty caption"),
        ({"jpg_1": [b"", b"x"]}, "undecodable image"),
        ({"jpg_0": [None, b"x"]}, "undecodable image"),
        ({"label_0": [3.0, 1.0]}, "preference outside [0.5, 1]"),
    ],
)
def test_a_faulty_row_is_yielded_and_found_bad(tmp_path, change, reason):
    source = make_source(tmp_path)
    row = next(source(pick_a_pic([1, 1], **change)).pairs("train"))
    with pytest.raises(BadRow) as caught:
        decode_pair(row)
    assert caught.value.reason == reason


@each_row("column", ["caption", "jpg_0", "jpg_1", "label_0"])
def test_a_missing_column_is_named_with_the_file(tmp_path, column):
    source = make_source(tmp_path)
    with pytest.raises(
        ValueError, match=rf"00001-abc.parquet: no column '{column}' \(found: .*model_1"
    ) as caught:
        source(pick_a_pic([1], **{column: None})).num_examples("train")
    assert "\n" not in str(caught.value)


@each_row(
    ("column", "values", "message"),
    [
        ("caption", [1], "must hold text"),
        ("jpg_0", [7], "'jpg_0' is of type int64, but must hold images, as bytes, as paths or as the hub's"),
        ("label_0", ["1"], "'label_0' is of type string, but must hold numbers"),
        ("has_label", ["yes"], "'has_label' is of type string, but must hold true and false"),
    ],
)
def test_a_column_of_another_type_is_refused(tmp_path, column, values, message):
    source = make_source(tmp_path)
    with pytest.raises(ValueError, match=message):
        source({**pick_a_pic([1]), column: values}).num_examples("train")


def test_a_path_is_asked_for():
    unset = get_source("pick_a_pic")
    for ask in (
        lambda: unset.splits,
        lambda: unset.num_examples("train"),
        lambda: next(unset.pairs("train")),
    ):
        with pytest.raises(ValueError, match=r"config.source.path is not set: give --config.source.path="):
            ask()


def test_sources_with_other_arguments_do_not_share_an_index(source):
    whole = source(pick_a_pic([1, 0.5]))
    assert whole.num_examples("train") == 1
    assert dataclasses.replace(whole, caption_pattern="nothing").num_examples("train") == 0
