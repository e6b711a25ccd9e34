"""Ranked lists: the pairs that their ranks give, in the schemas of HPD v2 and ImageReward."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import number_of, numbered_image
from tables import each_row

from dspo_jax.data.sources import decode_pair, get_source
from dspo_jax.errors import UserError
from dspo_jax.images.image_files import BadRow

HPD_TRAIN = [
    {"prompt": "a fox", "file_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0], "user_hash": "x"},
    {"prompt": "a dog", "file_path": ["2.jpg", "3.jpg"], "human_preference": [0, 1]},
    {"prompt": "a cat", "file_path": ["4.jpg", "5.jpg"], "human_preference": [0, 0]},
]
HPD_TEST = [{"prompt": "a fox", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [2, 3, 1]}]
RANKED = [
    {
        "id": "a-0",
        "prompt": "a fox",
        "generations": [f"p/{i}.webp" for i in range(4)],
        "ranking": [2, 1, 4, 2],
    },
    {"id": "b-0", "prompt": "a dog", "generations": ["p/4.webp", "p/5.webp"], "ranking": [1, 1]},
    {"id": "c-0", "prompt": "a cat", "generations": [], "ranking": []},
]


def make_source(folder):
    """Writes a JSON file and returns its source, of which nothing is held out."""

    def source(name, rows, file="ranks.json", **arguments):
        (folder / file).write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return get_source(name, **{"path": str(folder / file), "validation_share": 0.0, **arguments})

    return source


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path)


def pairs(source):
    return [(row.winner.stem, row.loser.stem) for row in source.pairs("train")]


def test_hpd_v2s_two_schemas(source, tmp_path):
    train = source("hpd_v2", HPD_TRAIN, "train.json")
    assert pairs(train) == [("0", "1"), ("3", "2")]
    assert [row.caption for row in train.pairs("train")] == ["a fox", "a dog"]
    assert train.left_out("train") == {"tie": 1}
    test = source("hpd_v2", HPD_TEST, "test.json")
    assert pairs(test) == [("2", "0"), ("2", "1"), ("0", "1")]
    # As the archives unpack: the images of test.json in test/.
    assert next(test.pairs("train")).winner == tmp_path / "test" / "2.jpg"


def test_hpd_v2s_copies_may_name_images_otherwise(source):
    renamed = [{**row, "image_path": row["file_path"]} for row in HPD_TRAIN]
    for row in renamed:
        del row["file_path"]
    assert pairs(source("hpd_v2", renamed)) == [("0", "1"), ("3", "2")]


def test_hpd_v3_prefers_the_first_path(source, tmp_path):
    rows = [
        {"prompt": "a fox", "path1": "images/1.jpg", "path2": "images/0.jpg", "confidence": 0.9},
        {"prompt": "a fox", "path1": "images/2.jpg", "path2": "images/1.jpg", "choice_dist": [9, 1]},
    ]
    third = source("hpd_v3", rows, "train.json")
    assert pairs(third) == [("1", "0"), ("2", "1")]
    assert [row.loser_won for row in third.pairs("train")] == [False, True]
    assert next(third.pairs("train")).winner == tmp_path / "images" / "1.jpg"


PER_IMAGE = [
    {"prompt_id": "b", "prompt": "a dog", "image_path": "images/train/train_1/4.webp", "rank": 1},
    *(
        {"prompt_id": "a", "prompt": "a fox", "image_path": f"images/train/train_1/{i}.webp", "rank": rank}
        for i, rank in enumerate([2, 1, 4, 2])
    ),
    {"prompt_id": "b", "prompt": "a dog", "image_path": "images/train/train_2/5.webp", "rank": 2},
]


def test_imagerewarddb_has_a_row_for_each_image(source, tmp_path):
    """The pairs are those of the same ranks in ImageReward's own form, from JSON and from parquet."""
    expected = [("4", "5"), ("1", "0"), ("1", "3"), ("1", "2"), ("0", "2"), ("3", "2")]
    listed = source("image_reward", PER_IMAGE)
    file = tmp_path / "metadata-train.parquet"
    pq.write_table(pa.Table.from_pylist(PER_IMAGE), file)
    table = get_source("image_reward", path=str(file), validation_share=0.0)
    for per_image in (listed, table):
        assert pairs(per_image) == expected
        assert per_image.left_out("train") == {"tie": 1}
        assert [row.caption for row in per_image.pairs("train", 0, 2)] == ["a dog", "a fox"]
    assert listed.digest("train") == table.digest("train")
    first = next(table.pairs("train"))
    assert first.loser == tmp_path / "images" / "train" / "train_2" / "5.webp"
    assert first.meta == {"winner_rank": 1, "loser_rank": 2, "id": "b"}
    file.write_bytes(b"PAR1")
    damaged = get_source("image_reward", path=str(file), validation_share=0.1)
    with pytest.raises(UserError, match=f"^{file}: cannot be read as parquet [^\n]*; fetch it again$"):
        damaged.num_examples("train")


def test_every_strict_order_is_a_pair_and_equal_ranks_are_ties(source, tmp_path):
    ranked = source("image_reward", RANKED)
    assert pairs(ranked) == [("1", "0"), ("1", "3"), ("1", "2"), ("0", "2"), ("3", "2")]
    assert ranked.left_out("train") == {"tie": 2}
    assert (ranked.num_examples("train"), ranked.images_per_example) == (5, 2)
    first = next(ranked.pairs("train"))
    assert (first.key, first.preference) == ("0/1>0", 1.0)
    assert first.meta == {"winner_rank": 1, "loser_rank": 2, "id": "a-0"}
    assert first.winner == tmp_path / "p" / "1.webp"


def test_the_best_against_the_rest(source):
    best = source("image_reward", RANKED, comparisons="best")
    assert pairs(best) == [("1", "0"), ("1", "3"), ("1", "2")]
    assert best.left_out("train") == {"tie": 1}


def test_lists_of_so_many_images_spread_over_the_ranks(source, tmp_path):
    listed = source("image_reward", RANKED, comparisons="list", length=3)
    (row,) = listed.pairs("train")
    assert [image.stem for image in row.images] == ["1", "3", "2"]
    assert row.winner == tmp_path / "p" / "1.webp"
    assert (row.scores, row.key, row.loser_won) == ((-1.0, -2.0, -4.0), "0", False)
    assert (listed.num_examples("train"), listed.images_per_example) == (1, 3)
    assert listed.left_out("train") == {"fewer than 3 images": 2}
    ten = [{"prompt": "a", "generations": [f"{i}.png" for i in range(10)], "ranking": [*range(10, 0, -1)]}]
    for length, places in ((4, "9630"), (10, "9876543210")):
        (row,) = source("image_reward", ten, "ten.json", comparisons="list", length=length).pairs("train")
        assert [image.stem for image in row.images] == list(places)
    equal = [{**ten[0], "ranking": [1] * 10}]
    source = source("image_reward", equal, "equal.json", comparisons="list", length=4)
    assert source.left_out("train") == {"tie": 1}


def test_a_list_with_other_images_or_ranks_is_another(source):
    digests = set()
    for n, ranks in enumerate(([2, 1, 4, 2], [1, 2, 4, 2], [2, 1, 5, 2], [2, 1, 4, 3])):
        rows = [{**RANKED[0], "ranking": ranks}]
        digests.add(source("image_reward", rows, f"{n}.json", comparisons="list", length=3).digest("train"))
    assert len(digests) == 4


@each_row(
    ("arguments", "message"),
    [
        ({"comparisons": "list"}, r"config\.source\.length = 0: must be from 3 to 64"),
        ({"comparisons": "list", "length": 2}, "length = 2: .*for pairs take 'all' or 'best'"),
        ({"length": 4}, "length = 4: is of config.source.comparisons = 'list'"),
    ],
)
def test_a_length_without_lists_and_lists_without_one_are_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        make_source(tmp_path)("image_reward", RANKED, **arguments)


def test_a_loser_that_won_elsewhere_is_marked(source):
    assert [row.loser_won for row in source("image_reward", RANKED).pairs("train")] == [
        *(True, True, False, False, False)
    ]
    best = source("image_reward", RANKED, comparisons="best")
    assert not any(row.loser_won for row in best.pairs("train"))


def test_margins_are_of_ranks(source):
    wide = source("image_reward", RANKED, min_margin=2)
    assert pairs(wide) == [("1", "2"), ("0", "2"), ("3", "2")]
    assert wide.left_out("train") == {"tie": 2, "min_margin": 2}


def test_images_are_read_from_the_folder_that_is_named(source, tmp_path):
    (tmp_path / "elsewhere" / "p").mkdir(parents=True)
    for i in (0, 1):
        (tmp_path / "elsewhere" / "p" / f"{i}.webp").write_bytes(numbered_image(i))
    good, missing, *_ = source("image_reward", RANKED, images=str(tmp_path / "elsewhere")).pairs("train")
    assert [number_of(image) for image in decode_pair(good)] == [1, 0]
    with pytest.raises(BadRow, match="missing image file"):
        decode_pair(missing)


def test_prompts_are_held_out_whole(source):
    rows = [{**RANKED[0], "prompt": f"fox {i % 30}"} for i in range(60)]
    ranked = source("image_reward", rows, validation_share=0.3)
    train, validation = (Counter(row.caption for row in ranked.pairs(split)) for split in ranked.splits)
    assert not train.keys() & validation.keys()
    assert set((train + validation).values()) == {10}


def test_ranges_are_parts_of_the_whole_and_keys_are_unique(source):
    ranked = source("image_reward", RANKED[:1] * 10)
    whole = list(ranked.pairs("train"))
    assert len({row.key for row in whole}) == len(whole) == 50
    assert [*ranked.pairs("train", 0, 7), *ranked.pairs("train", 7, 30), *ranked.pairs("train", 30)] == whole


@each_row(
    ("name", "rows", "message"),
    [
        ("hpd_v2", '{"a": 1', r"ranks.json: not JSON \(.*\); fetch it again"),
        ("hpd_v2", {"a": 1}, r"ranks.json: holds a dict, but must be a list of prompts"),
        ("hpd_v2", [*HPD_TRAIN, 3], r"ranks.json: entry 3: a int, but must be an object"),
        ("hpd_v3", [{"prompt": "a fox", "path1": "0.jpg"}], r"entry 0: no 'path2' \(found: prompt, path1\)"),
        ("image_reward", [PER_IMAGE[0], {"prompt_id": "b"}], r"row 1: no 'prompt' \(found: prompt_id\)"),
        (
            "image_reward",
            [PER_IMAGE[0], {**PER_IMAGE[1], "prompt_id": "b"}],
            r"row 1: prompt_id 'b' stands beside another prompt before; give each",
        ),
        ("image_reward", [{**PER_IMAGE[0], "rank": None}], r"entry 0: the ranks = \[None\]: must be of type"),
        ("hpd_v2", RANKED, r"entry 0: no 'file_path' \(found: id, prompt, generations, ranking\)"),
        ("image_reward", HPD_TEST, r"entry 0: no 'generations' \(found: prompt, image_path, rank\)"),
        ("hpd_v2", [{**HPD_TRAIN[0], "human_preference": ["1"]}], r"entry 0: not what this source reads"),
        ("hpd_v2", [{**HPD_TEST[0], "rank": [1, 2]}], r"entry 0: 3 images, but 2 ranks"),
        (
            "image_reward",
            [{**RANKED[1], "ranking": ["a", "b"]}],
            r"entry 0: the ranks = \['a', 'b'\]: must be",
        ),
        ("image_reward", [{**RANKED[1], "prompt": "a \ud83e"}], r"entry 0: .* has half a character in it"),
        ("image_reward", [{**RANKED[1], "ranking": [1, 10**400]}], r"entry 0: the ranks = .*: must be small"),
        ("image_reward", [{**RANKED[1], "prompt": None}], r"entry 0: the prompt = \[None\]: must be of type"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line(tmp_path, name, rows, message):
    source = make_source(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        source(name, rows).num_examples("train")
    assert "\n" not in str(caught.value)


@each_row("name", ["hpd_v2", "hpd_v3", "image_reward"])
def test_bad_arguments_are_refused(name):
    with pytest.raises(ValueError, match=r"config.source.path is not set: give --config.source.path="):
        get_source(name).splits  # noqa: B018
    with pytest.raises(FileNotFoundError, match=r"config.source.path = 'nowhere.json': no such file"):
        get_source(name, path="nowhere.json").splits  # noqa: B018
    with pytest.raises(
        ValueError, match=r"config.source.comparisons = 'bets': unknown; did you mean 'best'\?"
    ):
        get_source(name, comparisons="bets")
    assert get_source(name, min_margin=5.0).min_margin == 5


def test_image_rewards_own_annotations(test_data):
    path = test_data / "imagereward_human_test.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    source = get_source("image_reward", path=str(path), validation_share=0.0)
    pairs = list(source.pairs("train"))
    expected = ties = 0
    for row in json.loads(path.read_text()):
        ranks = row["ranking"]
        for i in range(len(ranks)):
            expected += sum(ranks[i] < rank for rank in ranks)
            ties += sum(ranks[i] == rank for rank in ranks[i + 1 :])
    assert (len(pairs), source.left_out("train")) == (expected, {"tie": ties})
    assert expected + ties == 7230  # what the card of the data set says
    assert all(pair.meta["winner_rank"] < pair.meta["loser_rank"] for pair in pairs)
