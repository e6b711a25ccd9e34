"""Which rows are used and in which split: filters, one pair a prompt, captions held out."""

import json
import math
from collections import Counter

import pytest
from tables import each_row

from dspo_jax.data.sources import get_source
from dspo_jax.data.sources.selection import draw


def make_write(parent):
    """Writes (caption, winner, preference) rows and returns a function that makes a source of them."""

    def write(rows, name="pairs"):
        folder = parent / name
        folder.mkdir()
        with (folder / "pairs.jsonl").open("w") as file:
            for caption, winner, preference in rows:
                row = {"caption": caption, "winner": winner, "loser": "l.png", "preference": preference}
                print(json.dumps(row), file=file)
        return lambda **arguments: get_source("folder", path=str(folder), **arguments)

    return write


@pytest.fixture
def write(tmp_path):
    return make_write(tmp_path)


@pytest.fixture
def many(write):
    """100 captions with one pair or three."""
    return write([(f"caption {i % 100}", f"{i}.png", 1.0) for i in range(300) if i % 100 < 60 or i < 100])


def captions(source, split):
    return [row.caption for row in source.pairs(split)]


def test_a_share_of_the_captions_is_held_out_whole(many):
    source = many(validation_share=0.3)
    assert source.splits == ("train", "validation")
    train, validation = (captions(source, split) for split in source.splits)
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 220
    assert 0.2 < len(set(validation)) / 100 < 0.4
    assert Counter(train) + Counter(validation) == Counter(captions(many(validation_share=0.0), "train"))


def test_spaces_around_a_caption_do_not_make_it_another(write):
    rows = [(f"caption {i}", f"{i}.png", 1.0) for i in range(50)]
    source = write(rows + [(f" {caption}\n", winner, preference) for caption, winner, preference in rows])(
        validation_share=0.5
    )
    train, validation = ({caption.strip() for caption in captions(source, s)} for s in source.splits)
    assert not train & validation


def test_the_split_of_a_caption_depends_on_the_seed_and_itself_alone(many, write):
    held_out = set(captions(many(validation_share=0.3), "validation"))
    assert set(captions(many(validation_share=0.3, seed=1), "validation")) != held_out
    fewer = write([(f"caption {i}", "w.png", 1.0) for i in reversed(range(50))], "fewer")
    expected = {caption for caption in held_out if int(caption.split()[1]) < 50}
    assert set(captions(fewer(validation_share=0.3), "validation")) == expected


@each_row("seed", range(5))
@each_row("share", [1e-9, 0.999])
def test_of_two_captions_one_is_held_out(tmp_path, share, seed):
    write = make_write(tmp_path)
    source = write([("a", "1.png", 1.0), ("b", "2.png", 1.0), ("a", "3.png", 1.0)])(
        validation_share=share, seed=seed
    )
    assert {source.num_examples("train"), source.num_examples("validation")} == {1, 2}


def test_one_caption_or_a_share_of_nothing_leaves_no_validation(write, many):
    one = write([("a", "1.png", 1.0), ("a", "2.png", 1.0)], "one")(validation_share=0.9)
    assert (one.splits, one.num_examples("train")) == (("train",), 2)
    assert many(validation_share=0.0).splits == ("train",)
    with pytest.raises(ValueError, match=r"split = 'validation': unknown .*\(allowed: train\)"):
        one.num_examples("validation")


def test_captions_held_out_are_among_those_kept(write):
    rows = [(f"other {i}", f"{i}.png", 1.0) for i in range(200)]
    source = write([*rows, ("fox a", "a.png", 1.0), ("fox b", "b.png", 1.0)])(
        validation_share=0.05, caption_pattern="^fox"
    )
    assert [source.num_examples(split) for split in source.splits] == [1, 1]
    left_out = Counter(source.left_out("train")) + Counter(source.left_out("validation"))
    assert left_out == {"caption_pattern": 200}


def test_filters_keep_what_they_say_and_count_the_rest(write):
    source = write(
        [
            ("a fox", "1.png", 1.0),
            ("a fox", "2.png", 0.8),
            ("a fox", "3.png", 0.79),
            ("a dog", "4.png", 0.5),
            ("Foxes", "5.png", float("nan")),
        ]
    )(validation_share=0.0, caption_pattern="[fF]ox", min_margin=0.6)
    assert [row.winner.name for row in source.pairs("train")] == ["1.png", "2.png"]
    assert source.left_out("train") == {"caption_pattern": 1, "min_margin": 2}


def test_one_pair_of_each_caption_whatever_the_order(write):
    rows = [(f"caption {i % 40}", f"{i}.png", 1.0) for i in range(200)]
    chosen = {}
    for name, ordered in {"a": rows, "b": rows[::-1], "c": sorted(rows)}.items():
        source = write(ordered, name)(one_pair_per_prompt=True, validation_share=0.0)
        assert source.left_out("train") == {"one_pair_per_prompt": 160}
        chosen[name] = {(row.caption, row.winner.name) for row in source.pairs("train")}
        assert len({caption for caption, _ in chosen[name]}) == len(chosen[name]) == 40
    assert chosen["a"] == chosen["b"] == chosen["c"]
    # Any of the five pairs of a caption may be the one.
    uses = Counter(int(winner.split(".")[0]) // 40 for _, winner in chosen["a"])
    assert set(uses) == set(range(5))


def test_the_seed_changes_which_pair_is_kept(many):
    kept = [
        [row.key for row in many(one_pair_per_prompt=True, seed=seed).pairs("train")] for seed in (0, 0, 1)
    ]
    assert kept[0] == kept[1] != kept[2]


def test_one_pair_is_chosen_among_those_that_the_filters_keep(write):
    rows = [("a fox", f"{i}.png", 0.9 if i == 7 else 0.6) for i in range(20)]
    source = write(rows)(one_pair_per_prompt=True, min_margin=0.5, validation_share=0.0)
    assert [row.winner.name for row in source.pairs("train")] == ["7.png"]
    assert source.left_out("train") == {"min_margin": 19}


def test_a_filter_that_keeps_nothing_leaves_an_empty_split(many):
    source = many(caption_pattern="wolf", one_pair_per_prompt=True)
    assert (source.splits, source.num_examples("train")) == (("train",), 0)
    assert list(source.pairs("train")) == []
    assert source.left_out("train") == {"caption_pattern": 220}


@each_row(
    ("arguments", "message"),
    [
        ({"caption_pattern": "("}, r"config.source.caption_pattern = '\(': no regular expression"),
        ({"min_margin": -0.1}, "config.source.min_margin = -0.1: must be from 0 to 1"),
        ({"min_margin": 1.5}, "config.source.min_margin = 1.5: must be from 0 to 1"),
        ({"min_margin": math.nan}, "config.source.min_margin = nan"),
        ({"validation_share": 1.0}, "config.source.validation_share = 1.0: must be at least 0 and below 1"),
        ({"validation_share": -1.0}, "config.source.validation_share = -1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_source("folder", **arguments)


def test_draws_are_the_same_everywhere():
    # printf '0|split|a fox' | sha256sum
    assert draw(0, "split", "a fox") == pytest.approx(0.6946742713650487, abs=1e-12)
    assert 0.45 < sum(draw(1, str(i)) for i in range(1000)) / 1000 < 0.55


def test_the_digest_changes_when_rows_do(write):
    rows = [("a", "1.png", 1.0), ("b", "2.png", 0.9), ("c", "3.png", 0.8)]
    others = {
        "caption": [("A", "1.png", 1.0), *rows[1:]],
        "winner": [("a", "4.png", 1.0), *rows[1:]],
        "preference": [("a", "1.png", 0.7), *rows[1:]],
        "order": [rows[1], rows[0], rows[2]],
        "captions exchanged": [("b", "1.png", 1.0), ("a", "2.png", 0.9), rows[2]],
        "fewer": rows[:2],
    }
    plain = write(rows)(validation_share=0.0).digest("train")
    assert write(rows, "again")(validation_share=0.0).digest("train") == plain
    assert write(rows, "filtered")(validation_share=0.0, min_margin=0.7).digest("train") != plain
    digests = {
        name: write(other, name)(validation_share=0.0).digest("train") for name, other in others.items()
    }
    assert len({plain, *digests.values()}) == 1 + len(others)
