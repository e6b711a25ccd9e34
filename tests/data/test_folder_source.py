"""A folder of one's own pairs: what its file may say, what is refused, and what is a bad row."""

import json
from dataclasses import replace

import pytest
from image_files import image_bytes
from tables import each_row

from dspo_jax.data.sources import decode_pair, get_source
from dspo_jax.errors import UserError
from dspo_jax.images.image_files import BadRow

PAIR = {"caption": "a red fox", "winner": "images/a.png", "loser": "images/b.png"}
SINGLE = {"caption": "a red fox", "winner": "images/a.png"}


def make_write(folder):
    """Writes images a.png and b.png and a file of rows; returns its source, which holds nothing out."""

    def write(*rows, name="pairs.jsonl", **arguments):
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / "a.png").write_bytes(image_bytes("red"))
        (folder / "images" / "b.png").write_bytes(image_bytes("blue"))
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return get_source("folder", **{"path": str(folder), "validation_share": 0.0, **arguments})

    return write


@pytest.fixture
def write(tmp_path):
    return make_write(tmp_path)


def colors(row):
    return [image.getpixel((0, 0)) for image in decode_pair(row)]


def test_each_of_several_captions_makes_a_row_and_all_are_held_out_together(write):
    rows = [
        {"caption": [f"fox {i}", f"a red animal, {i}", f"{i}"], "winner": f"{i}.png", "loser": "x.png"}
        for i in range(40)
    ]
    source = write(*rows, {"caption": "one", "winner": "40.png", "loser": "x.png", "key": "k"})
    both = replace(source, validation_share=0.3)
    splits = {split: list(both.pairs(split)) for split in both.splits}
    assert sorted(splits) == ["train", "validation"]
    found = {(row.caption, row.winner.name) for of_split in splits.values() for row in of_split}
    expected = {(caption, row["winner"]) for row in rows for caption in row["caption"]}
    assert found == expected | {("one", "40.png")}
    train, validation = ({row.winner.name for row in splits[split]} for split in ("train", "validation"))
    assert not train & validation
    assert len(validation) > 1
    whole = replace(source, validation_share=0.0)
    assert [row.key for row in whole.pairs("train")][:4] == ["1/0", "1/1", "1/2", "2/0"]
    assert [row.key for row in whole.pairs("train")][-1] == "k"
    one_each = replace(whole, one_pair_per_prompt=True)
    assert [row.winner.name for row in one_each.pairs("train")] == [f"{i}.png" for i in range(41)]
    first = replace(whole, caption_pattern="^fox 7$")
    assert [row.caption for row in first.pairs("train")] == ["fox 7", "a red animal, 7", "7"]


def test_a_pair_is_a_caption_and_two_paths_relative_to_the_file(write, tmp_path):
    source = write(PAIR)
    (row,) = source.pairs("train")
    assert (row.caption, row.winner, row.loser) == (
        "a red fox",
        tmp_path / "images" / "a.png",
        tmp_path / "images" / "b.png",
    )
    assert (row.preference, row.key, row.loser_won) == (1.0, "1", False)
    assert colors(row) == [(255, 0, 0), (0, 0, 255)]
    assert (source.splits, source.images_per_example) == (("train",), 2)
    assert (source.num_examples("train"), dict(source.left_out("train"))) == (1, {})


def test_a_file_may_be_named_itself(write, tmp_path):
    write(PAIR, name="other.jsonl")
    source = get_source("folder", path=str(tmp_path / "other.jsonl"))
    assert [colors(row) for row in source.pairs("train")] == [[(255, 0, 0), (0, 0, 255)]]


def test_every_column_is_read(write):
    source = write(
        {**PAIR, "preference": 0.75, "key": "fox", "split": "test"},
        {**PAIR, "preference": None, "key": 7, "winner": "images/b.png", "loser": "images/a.png"},
    )
    assert source.splits == ("train", "test")
    (test,) = source.pairs("test")
    (train,) = source.pairs("train")
    assert (test.preference, test.key) == (0.75, "fox")
    assert (train.preference, train.key) == (1.0, "7")


def test_csv_says_the_same(write):
    source = write(
        "caption,winner,loser,preference,key,split",
        '"a fox, red",images/a.png,images/b.png,0.75,fox,',
        '"two\nlines",images/b.png,images/a.png,,,validation',
        name="pairs.csv",
    )
    assert source.splits == ("train", "validation")
    (train,) = source.pairs("train")
    (validation,) = source.pairs("validation")
    assert (train.caption, train.preference, train.key) == ("a fox, red", 0.75, "fox")
    assert (validation.caption, validation.preference, validation.key) == ("two\nlines", 1.0, "4")
    assert colors(validation) == [(0, 0, 255), (255, 0, 0)]


@each_row("column", ["winner", "image"])
def test_rows_without_a_loser_are_single_images(tmp_path, column):
    write = make_write(tmp_path)
    source = write({"caption": "a red fox", column: "images/a.png"})
    (row,) = source.pairs("train")
    assert (source.images_per_example, row.loser, colors(row)) == (1, None, [(255, 0, 0)])


def test_single_images_may_have_labels(write):
    rows = [{**SINGLE, "label": label} for label in (True, False, 0.25, 1, None)]
    source = write(*rows, SINGLE)
    assert [row.preference for row in source.pairs("train")] == [1, 0, 0.25, 1]
    assert source.left_out("train") == {"no label": 2}
    assert [len(decode_pair(row)) for row in source.pairs("train")] == [1] * 4


def test_labels_in_a_csv_may_be_words_and_their_size_is_the_margin(write, tmp_path):
    lines = [f"a fox,images/a.png,{label}" for label in ("True", "false", "0.25", "", "0.5")]
    source = write("caption,image,label", *lines, name="pairs.csv", min_margin=0.5)
    assert [row.preference for row in source.pairs("train")] == [1, 0, 0.25]
    assert source.left_out("train") == {"no label": 1, "min_margin": 1}
    path = str(tmp_path / "other.csv")
    other = write("caption,image,label", "a fox,images/a.png,perhaps", name="other.csv", path=path)
    with pytest.raises(UserError, match=r"other\.csv:2: label = 'perhaps': must be a number$"):
        other.num_examples("train")


@each_row(
    ("row", "message"),
    [
        ({**PAIR, "label": True}, "pairs.jsonl:1: has a label, .*beside a loser; keep one"),
        ({**SINGLE, "label": 1, "preference": 1}, "has a label, .*beside a preference; keep one"),
        ({**SINGLE, "label": "yes"}, "label = 'yes': must be a number"),
    ],
)
def test_a_label_that_means_nothing_is_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        make_write(tmp_path)(row).num_examples("train")


def test_a_label_out_of_range_is_a_bad_row(write):
    for row in write({**SINGLE, "label": -0.1}, {**SINGLE, "label": 7}).pairs("train"):
        with pytest.raises(BadRow, match=r"preference outside \[0, 1\]"):
            decode_pair(row)


def test_an_empty_column_of_losers_is_none(write):
    source = write("caption,winner,loser", "a fox,images/a.png,", name="pairs.csv")
    assert source.images_per_example == 1


def test_a_loser_that_won_elsewhere_in_its_split_is_marked(write):
    def row(winner, loser, split="train"):
        return {"caption": "a fox", "winner": winner, "loser": loser, "split": split}

    source = write(row("a", "b"), row("b", "c"), row("c", "d", "test"), row("b", "a", "test"))
    assert [row.loser_won for row in source.pairs("train")] == [True, False]
    assert [row.loser_won for row in source.pairs("test")] == [False, False]


def test_ranges_are_parts_of_the_whole(write):
    source = write(*({**PAIR, "caption": f"fox {i}"} for i in range(10)))
    whole = list(source.pairs("train"))
    assert [row.caption for row in whole] == [f"fox {i}" for i in range(10)]
    assert [*source.pairs("train", 0, 3), *source.pairs("train", 3, 9), *source.pairs("train", 9)] == whole


def test_blank_lines_and_a_byte_order_mark_do_no_harm(write):
    source = write("\ufeff" + json.dumps(PAIR), "", json.dumps(PAIR))
    assert [row.key for row in source.pairs("train")] == ["1", "3"]


@each_row(
    ("change", "reason"),
    [
        ({"caption": " "}, "empty caption"),
        ({"caption": None}, "empty caption"),
        ({"winner": "images/c.png"}, "missing image file"),
        ({"winner": None}, "missing image file"),
        ({"winner": "images/\0"}, "missing image file"),
        ({"loser": "images"}, "missing image file"),
        ({"loser": "pairs.jsonl"}, "undecodable image"),
        ({"loser": "images/a.png"}, "identical images"),
        ({"preference": 0.3}, "preference outside [0.5, 1]"),
        ({"preference": 1.5}, "preference outside [0.5, 1]"),
        ({"preference": float("nan")}, "preference outside [0.5, 1]"),
        ({"preference": 10**400}, "preference outside [0.5, 1]"),
    ],
)
def test_a_faulty_row_is_yielded_and_found_bad(tmp_path, change, reason):
    write = make_write(tmp_path)
    source = write(PAIR, {**PAIR, **change})
    good, bad = source.pairs("train")
    assert len(decode_pair(good)) == 2
    with pytest.raises(BadRow) as caught:
        decode_pair(bad)
    assert caught.value.reason == reason


@each_row(
    ("rows", "message"),
    [
        (['{"caption": "a'], r"pairs.jsonl:1: not JSON \(.*\); mend or delete the line"),
        ([PAIR, "[1]"], r"pairs.jsonl:2: not an object; write \{\"caption\""),
        ([], r"pairs.jsonl: has no rows"),
        (
            [{"prompt": "a", "winner": "b"}],
            r"pairs.jsonl: no column 'caption' \(found: prompt, winner\); rename",
        ),
        ([{"caption": "a", "chosen": "b"}], r"pairs.jsonl: no column 'winner' \(found: caption, chosen\)"),
        ([{**PAIR, "image": "a"}], r"pairs.jsonl:1: has both winner and image"),
        ([PAIR, SINGLE, SINGLE], r"pairs.jsonl:2: no loser, unlike other rows; give every row one, or none"),
        ([SINGLE, PAIR], r"pairs.jsonl:1: no loser"),
        ([PAIR, {**PAIR, "caption": 3}], r"pairs.jsonl:2: caption = 3: must be text"),
        ([{**PAIR, "caption": []}], r"pairs.jsonl:1: caption = \[\]: must be text, or a list of different"),
        ([{**PAIR, "caption": ["a", 3]}], r"pairs.jsonl:1: caption = \['a', 3\]: must be text, or a list"),
        (
            [{**PAIR, "caption": ["a", "a"]}],
            r"pairs.jsonl:1: caption = \['a', 'a'\]: must be text, or a list",
        ),
        ([{**PAIR, "caption": ["a", "b \ud83e"]}], r"pairs.jsonl:1: caption = .* has half a character"),
        ([{**PAIR, "loser": ["b"]}], r"pairs.jsonl:1: loser = \['b'\]: must be text"),
        ([{**PAIR, "caption": "a fox \ud83e"}], r"pairs.jsonl:1: caption = .* has half a character"),
        ([{**PAIR, "key": "a fox \ud83e"}], r"pairs.jsonl:1: key = .* has half a character"),
        (["[" * 100_000], r"pairs.jsonl:1: not JSON"),
        ([{**PAIR, "preference": "0.8"}], r"pairs.jsonl:1: preference = '0.8': must be a number"),
        ([{**PAIR, "preference": True}], r"pairs.jsonl:1: preference = True: must be a number"),
        ([{**PAIR, "split": "a/b"}], r"pairs.jsonl:1: split = 'a/b': must be a word"),
        ([PAIR, {**PAIR, "key": "1"}], r"pairs.jsonl:2: key '1' is that of line 1, too; make it unique"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line(tmp_path, rows, message):
    write = make_write(tmp_path)
    source = write(*rows)
    with pytest.raises(ValueError, match=message) as caught:
        source.num_examples("train")
    assert "\n" not in str(caught.value)


@each_row(
    ("rows", "message"),
    [
        (["caption,winner", "a,b,c"], r"pairs.csv:2: more fields than the first line has names"),
        (["caption,winner,preference", "a,b,much"], r"pairs.csv:2: preference = 'much': must be a number"),
        (["caption,winner", 'a,"b" c'], r"pairs.csv: not CSV after line 1 \(.*\); mend it"),
        (["prompt,winner", "a,b"], r"pairs.csv: no column 'caption' \(found: prompt, winner\)"),
    ],
)
def test_a_faulty_csv_is_refused_in_one_line(tmp_path, rows, message):
    write = make_write(tmp_path)
    with pytest.raises(ValueError, match=message):
        write(*rows, name="pairs.csv").num_examples("train")


def test_a_file_that_is_not_utf_8_is_named(write, tmp_path):
    source = write(PAIR)
    (tmp_path / "pairs.jsonl").write_bytes('{"caption": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"pairs.jsonl: not UTF-8 .*; save it as UTF-8"):
        source.num_examples("train")


def test_a_path_that_is_not_there_or_not_a_folder_of_pairs_is_refused(write, tmp_path):
    def refuse(error, message, path):
        with pytest.raises(error, match=message):
            get_source("folder", path=path).splits  # noqa: B018

    refuse(ValueError, "config.source.path is not set: give --config.source.path=", "")
    refuse(FileNotFoundError, "config.source.path = 'nowhere': no such file or folder", "nowhere")
    refuse(FileNotFoundError, "no pairs.jsonl or pairs.csv in this folder", str(tmp_path))
    (tmp_path / "pairs.json").write_text("{}")
    refuse(ValueError, "must be a folder, a .jsonl or a .csv file", str(tmp_path / "pairs.json"))
    write(PAIR)
    write("caption,winner", "a,b", name="pairs.csv")
    refuse(ValueError, "has both pairs.jsonl and pairs.csv; name one of them", str(tmp_path))
