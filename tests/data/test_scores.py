"""A reward scores the images of a source, the scores are stored, and what is encoded follows from them."""

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import numpy as np
import parquet_files
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from stub_pipeline import StubPipeline

from configs import common as training
from configs.encode import common, emoji_images
from dspo_jax.data import encoding, loader, shards, sources
from dspo_jax.data.chosen_rows import choose
from dspo_jax.data.datasets import read_datasets
from dspo_jax.data.encoding import encode
from dspo_jax.data.report import format_report
from dspo_jax.data.scoring import RowScorer, ScoreFiles, SplitScores
from dspo_jax.data.settings import SelectSettings
from dspo_jax.data.sources import PreferencePair
from dspo_jax.data.summary import summarize_dataset
from dspo_jax.errors import UserError
from dspo_jax.rewards import load_reward
from dspo_jax.training.run import train

REDNESS = '''"""A reward of the test's own."""


def redness(images, prompts):
    """The mean of red; none where a picture begins with pure blue."""
    return [float("nan") if image[0, 0, 2] == 255 else float(image[..., 0].mean()) for image in images]
'''


def picture(red: int, blue: int = 0) -> bytes:
    """30 x 10 pixels, red at the left end alone, which the square in the middle does not show."""
    pixels = np.full((10, 30, 3), (0, red, blue), np.uint8)
    pixels[:, :8, 0] = red
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Reds:
    """Pair i: of the red levels `winners[i]` and `losers[i]`; -1 is no image, -2 one that has no score. Rows
    2k and 2k + 1 have the same caption. `validation` repeats three rows of the default."""

    winners: tuple[int, ...] = (20, 60, 60, 10, 90, 40, 60, 30, 80, 70)
    losers: tuple[int, ...] = (10, 20, 70, 50, 5, 45, 15, 25, 35, 75)

    splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    images_per_example: ClassVar[int] = 2

    def num_examples(self, split: str) -> int:
        return len(self.winners) if split == "train" else 3

    def left_out(self, split: str) -> dict[str, int]:
        return {"tie": 4} if split == "train" else {}

    def digest(self, split: str) -> str:
        return f"{split} {self.winners} {self.losers}"

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        for i in range(self.num_examples(split))[start:stop]:
            reds = (self if split == "train" else Reds()).reds(i)
            images = [b"none" if red == -1 else picture(abs(red), 255 * (red == -2)) for red in reds]
            yield PreferencePair(f"caption {i // 2}", *images, key=f"{split}-{i}")

    def reds(self, i: int) -> tuple[int, int]:
        return self.winners[i], self.losers[i]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> StubPipeline:
    """Makes the command load the stub, whatever folder it is given."""
    stub = StubPipeline()
    monkeypatch.setattr(encoding, "load_pipeline", lambda path, **text: stub)
    return stub


@pytest.fixture
def reward(tmp_path) -> str:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.py").write_text(REDNESS)
    return f"{tmp_path}/mine/own.py:redness"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, reward: str):
    """A recipe for `Reds` at 16 pixels, in shards of 4 rows, scored by the redness."""
    monkeypatch.setitem(sources.SOURCES, "reds", Reds)
    config = common.get_config()
    common.set_source(config, "reds")
    config.update(model="a model", resolution=16, batch_size=2, rows_per_shard=4, num_workers=0, score=reward)
    return config


def read(out: Path, split: str = "train") -> list[dict]:
    source = tfds.builder_from_directory(out).as_data_source(split)
    return [source[i] for i in range(len(source))]


def keys(out: Path, split: str = "train") -> list[str]:
    return [row["key"].decode() for row in read(out, split)]


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["own", "colourfulness"])
def test_the_stored_scores_are_the_rewards_of_the_sources_images(pipe, config, tmp_path, reward, name):
    config.score = reward if name == "own" else name
    encode(config, tmp_path / "out")
    scorer = load_reward(config.score)
    for split, count in (("train", 10), ("validation", 3)):
        rows, pairs = read(tmp_path / "out", split), list(Reds().pairs(split))
        assert len(rows) == count
        for row, pair in zip(rows, pairs, strict=True):
            images = [np.asarray(Image.open(io.BytesIO(image))) for image in (pair.winner, pair.loser)]
            assert row["scores"].dtype == np.float32
            np.testing.assert_allclose(row["scores"], scorer.score(images, [pair.caption] * 2), rtol=1e-6)
    reds = np.asarray([Reds().reds(i) for i in range(10)])
    if name == "own":  # of all 30 columns, 8 of which are red: not of what the VAE sees
        np.testing.assert_allclose(
            [row["scores"] for row in read(tmp_path / "out")], reds * 8 / 30, rtol=1e-6
        )
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest["score"] == {"reward": scorer.name, "version": scorer.version}
    assert manifest["select"] == {"images": "pairs", "top": 1.0, "min_gap": None}
    assert manifest["splits"]["train"]["left_out"] == {"tie": 4}


def test_the_loader_reads_scores_and_does_without(pipe, config, tmp_path):
    encode(config, tmp_path / "scored")
    config.score = ""
    encode(config, tmp_path / "plain")
    assert "scores" not in read(tmp_path / "plain")[0]
    assert not (tmp_path / "plain" / "scores").exists()
    for names, has_scores in ((["scored"], True), (["scored", "plain"], False), (["plain", "scored"], False)):
        datasets = read_datasets(",".join(str(tmp_path / name) for name in names))
        with closing(loader.eval_batches(datasets, batch_size=3)) as batches:
            batch = next(batches)
        assert ("scores" in batch) == has_scores
    with closing(loader.eval_batches(read_datasets(tmp_path / "scored"), batch_size=3)) as batches:
        expected = [Reds().reds(i) for i in range(3)]
        np.testing.assert_allclose(next(batches)["scores"], np.asarray(expected) * 8 / 30, rtol=1e-6)


def test_a_dataset_of_an_earlier_version_is_the_same_without_scores(pipe, config, tmp_path):
    config.score = ""
    encode(config, tmp_path / "out")
    path = tmp_path / "out" / shards.MANIFEST
    manifest = json.loads(path.read_text())
    assert manifest.pop("score") is manifest.pop("select") is None
    path.write_text(json.dumps(manifest))
    before = files(tmp_path / "out")
    assert encode(config, tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert summarize_dataset(tmp_path / "out")["score"] is None


def test_the_top_share_is_that_of_a_sort_and_the_rest_is_counted(pipe, config, tmp_path):
    config.select.top = 0.4
    encode(config, tmp_path / "out")
    # Winners by red, 60 three times: 90, 80, 70, 60 (the first of them).
    order = sorted(range(10), key=lambda i: (-Reds().winners[i], i))
    assert (
        keys(tmp_path / "out")
        == [f"train-{i}" for i in sorted(order[:4])]
        == [f"train-{i}" for i in (1, 4, 8, 9)]
    )
    assert len(keys(tmp_path / "out", "validation")) == 3
    splits = shards.read_manifest(tmp_path / "out")["splits"]
    assert splits["train"]["left_out"] == {"select.top": 6, "tie": 4}
    assert splits["validation"]["left_out"] == {}
    assert [shard["num_examples"] for shard in splits["train"]["shards"]] == [1, 1, 2]


def test_pairs_on_which_reward_and_people_agree(pipe, config, tmp_path):
    config.select.min_gap = 0.0
    encode(config, tmp_path / "out")
    assert keys(tmp_path / "out") == [f"train-{i}" for i in (0, 1, 4, 6, 7, 8)]
    config.select.update(min_gap=39 * 8 / 30, top=0.5)  # 1, 4, 6 and 8, and of these the best two
    encode(config, tmp_path / "both")
    assert keys(tmp_path / "both") == ["train-4", "train-8"]
    assert shards.read_manifest(tmp_path / "both")["splits"]["train"]["left_out"] == {
        "select.min_gap": 6,
        "select.top": 2,
        "tie": 4,
    }
    assert len(keys(tmp_path / "both", "validation")) == 3


def test_pairs_whose_winner_several_rewards_prefer(pipe, config, tmp_path):
    """Redness prefers the winners of rows 0, 1, 4, 6, 7 and 8, the other reward those of 3, 5, 7 and 9."""
    liked = [(10, 50), (40, 45), (30, 25), (70, 75)]
    other = tmp_path / "mine" / "other.py"
    other.write_text(
        "def taste(images, prompts):\n"
        "    reds = [int(image[0, 0, 0]) for image in images]\n"
        f"    return [float(i % 2 == 0 and tuple(reds[i : i + 2]) in {liked}) for i in range(len(reds))]\n"
    )
    by_redness, by_taste = {0, 1, 4, 6, 7, 8}, {3, 5, 7, 9}
    own, config.score = config.score, f"{config.score}, {other}:taste"
    for agree, rows in ((1, by_redness | by_taste), (2, by_redness & by_taste)):
        config.select.agree = agree
        out = tmp_path / f"out{agree}"
        encode(config, out)
        assert keys(out) == [f"train-{i}" for i in sorted(rows)]
        assert len(keys(out, "validation")) == 3
        manifest = shards.read_manifest(out)
        assert manifest["splits"]["train"]["left_out"]["select.agree"] == 10 - len(rows)
        assert (manifest["score"]["reward"], manifest["select"]["agree"]) == ("redness", agree)
        assert [judge["reward"] for judge in manifest["judges"]] == ["taste"]
        assert {file.name for file in (out / "scores" / "taste").iterdir()} == {
            file.name for file in (out / "scores").iterdir()
        } - {"taste"}
    before = files(tmp_path / "out2")
    encode(config, tmp_path / "out2")
    assert files(tmp_path / "out2") == before
    config.score = own
    config.select.agree = 1
    encode(config, tmp_path / "one")
    assert keys(tmp_path / "one") == [f"train-{i}" for i in sorted(by_redness)]


def test_each_image_of_a_pair_once_for_a_caption(pipe, config, tmp_path):
    config.select.images = "single"
    encode(config, tmp_path / "out")
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest["images_per_example"] == 1
    seen, expected = set(), []
    for i in range(10):
        for place, red in zip(("winner", "loser"), Reds().reds(i), strict=True):
            if (i // 2, red) not in seen:
                expected.append((f"train-{i}/{place}", red))
            seen.add((i // 2, red))
    assert len(expected) == 19  # 20 is in both pairs of the first caption
    rows = read(tmp_path / "out")
    assert [row["key"].decode() for row in rows] == [key for key, _ in expected]
    np.testing.assert_allclose(
        [row["scores"][0] * 30 / 8 for row in rows], [red for _, red in expected], rtol=1e-6
    )
    assert rows[0]["moments"].shape == (1, 4, 4, 6)
    assert manifest["splits"]["train"]["left_out"] == {"repeated image": 1, "tie": 4}
    assert "train: " not in format_report(summarize_dataset(tmp_path / "out"))


def test_the_best_images_of_all_pairs(pipe, config, tmp_path):
    config.select.update(images="single", top=0.25)
    encode(config, tmp_path / "out")
    # round(0.25 x 19) = 5 of 90, 80, 75, 70, 70, 60 ...
    found = [f"train-{key}" for key in ("2/loser", "4/winner", "8/winner", "9/winner", "9/loser")]
    assert keys(tmp_path / "out") == found
    assert len(keys(tmp_path / "out", "validation")) == 5


def test_the_scores_of_columns_are_stored_and_chosen_by(pipe, config, tmp_path):
    scores = {"good": [3, 1, None, 5, 2, 4], "bad": [0.5, 1.5, 0, 1, 1, 3.5]}
    path = parquet_files.write(tmp_path / "mine.parquet", parquet_files.pairs(6, **scores))
    common.set_source(config, "parquet")
    del config.source.winners, config.source.losers
    config.source.update(path=str(path), scores=("good", "bad"), validation_share=0.0, max_skipped=0.2)
    config.update(score="column", batch_size=2)
    config.select.update(min_gap=0.0, top=0.5)
    encode(config, tmp_path / "out")
    # Gaps 2.5, -0.5, none, 4, 1, 0.5: the two best of four are rows 3 and 5.
    rows = read(tmp_path / "out")
    assert [row["key"].decode() for row in rows] == ["mine/3", "mine/5"]
    assert [row["scores"].tolist() for row in rows] == [[5, 1], [4, 3.5]]
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest["score"] == {"reward": "column", "version": ""}
    assert manifest["splits"]["train"]["left_out"] == {"select.min_gap": 1, "select.top": 2}
    assert manifest["splits"]["train"]["skipped"] == {"score not finite": 1}
    assert "column" in format_report(summarize_dataset(tmp_path / "out"))
    for changes in ({"score": ""}, {"score": "column", "source.scores": ()}):
        other = config.copy_and_resolve_references()
        other.select.update(min_gap=None, top=1.0)
        other.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=r"config\.source\.scores .*set both or neither"):
            encode(other, tmp_path / "other")
    config.source.scores = ("good",)
    with pytest.raises(UserError, match=r"config\.source\.scores = .*a tuple of 2 name"):
        encode(config, tmp_path / "other")


@pytest.mark.parametrize("seed", range(4))
def test_choosing_equals_a_sort_in_numpy(seed):
    draw = np.random.default_rng(seed)
    scores = draw.integers(0, 12, (200, 2)).astype(np.float32)  # many ties
    scores[draw.random(200) < 0.1, draw.integers(2)] = np.nan
    pictures = np.arange(400, dtype=np.uint64).reshape(200, 2)
    for top in (0.001, 0.01, 0.25, 0.5, 0.999, 1.0):
        select = SelectSettings(images="pairs", top=top, agree=0, min_gap=1.0 if seed % 2 else None)
        chosen, left_out = choose(SplitScores(scores, pictures), "train", select)
        rows = [i for i in range(200) if np.isfinite(scores[i]).all()]
        unusable = sorted(set(range(200)) - set(rows))
        if select.min_gap is not None:
            rows = [i for i in rows if scores[i, 0] - scores[i, 1] >= 1]
        count = max(1, int(np.round(top * len(rows))))
        best = sorted(sorted(rows, key=lambda i: (-scores[i, 0], i))[:count])
        assert np.flatnonzero(chosen).tolist() == sorted(best + unusable)
        assert sum(left_out.values()) == 200 - chosen.sum()
        everything, nothing = choose(SplitScores(scores, pictures), "validation", select)
        assert everything.all()
        assert not nothing


def test_a_stopped_scoring_goes_on_and_ends_in_the_same_bytes(pipe, config, tmp_path, monkeypatch):
    config.select.top = 0.4
    encode(config, tmp_path / "whole")
    score, calls = RowScorer.score, []

    def interrupted(self, rows, *arguments):
        calls.append(1)
        if len(calls) == 3:
            next(iter(rows))
            raise KeyboardInterrupt
        return score(self, rows, *arguments)

    monkeypatch.setattr(RowScorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(config, tmp_path / "out")
    left = files(tmp_path / "out")
    assert sorted(left) == ["scores/scores.json", "scores/train-00000.npy", "scores/train-00001.npy"]
    assert encode(config, tmp_path / "out")
    assert len(calls) == 3 + 2  # the third shard of train and that of validation
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_shares_score_first_and_then_make_the_dataset_of_one(pipe, config, tmp_path):
    config.select.top = 0.4
    encode(config, tmp_path / "one")
    assert not encode(config, tmp_path / "two", (0, 2))  # scores two shards, and cannot know the best yet
    assert not (tmp_path / "two" / shards.UNFINISHED).exists()
    assert not encode(config, tmp_path / "two", (1, 2))  # scores the others, and encodes its own
    assert (tmp_path / "two" / shards.UNFINISHED).exists()
    assert encode(config, tmp_path / "two", (0, 2))
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_another_reward_or_version_is_refused_and_scores_serve_another_selection(
    pipe, config, tmp_path, reward, monkeypatch
):
    encode(config, tmp_path / "out")
    config.score = "colourfulness"
    with pytest.raises(UserError, match=r"another dataset \(score.reward = 'redness' there, 'colourfulness'"):
        encode(config, tmp_path / "out")
    shutil.copytree(tmp_path / "out" / "scores", tmp_path / "other" / "scores")
    with pytest.raises(
        UserError, match=r"holds other scores \(reward = 'redness' there, 'colourfulness' here"
    ):
        encode(config, tmp_path / "other")
    config.update(score=reward, select={"top": 0.1})
    with pytest.raises(UserError, match=r"another dataset \(select.top = 1.0 there, 0.1 here\)"):
        encode(config, tmp_path / "out")
    monkeypatch.setattr(RowScorer, "score", None)
    assert encode(config, tmp_path / "other")
    assert keys(tmp_path / "other") == ["train-4"]
    Path(reward.partition(":")[0]).write_text(REDNESS + "\n# changed\n")
    shutil.copytree(tmp_path / "out" / "scores", tmp_path / "third" / "scores")
    with pytest.raises(UserError, match=r"holds other scores \(version = 'own.py "):
        encode(config, tmp_path / "third")


def test_an_image_without_a_score_makes_a_bad_row(pipe, config, tmp_path):
    config.source.winners = (20, -2, 60, -1, 90, 40, 60, 30, 80, 70)
    config.source.max_skipped, config.select.top = 0.2, 0.25
    encode(config, tmp_path / "out")
    train = shards.read_manifest(tmp_path / "out")["splits"]["train"]
    assert train["skipped"] == {"score not finite": 1, "undecodable image": 1}
    assert train["left_out"] == {"select.top": 6, "tie": 4}
    assert keys(tmp_path / "out") == ["train-4", "train-8"]
    config.source.max_skipped = 0.1
    with pytest.raises(UserError, match=r"exceeded by 2 of 10 rows.*undecodable image: 1.*'train-3'"):
        encode(config, tmp_path / "again")
    assert not (tmp_path / "again" / shards.UNFINISHED).exists()  # while it was scored


def test_too_many_rows_without_a_score_are_counted_over_shards(pipe, config, tmp_path):
    config.source.winners = (20, -2, 60, 55, 90, 40, 60, 30, 80, -2)
    config.source.max_skipped = 0.1
    for _ in range(2):  # the first shard is not scored again, but its row counts
        with pytest.raises(
            UserError, match=r"by 2 of 10 .*\(without a score: 1, score not finite: 1\).*'train-9'"
        ):
            encode(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "", "select.top": 0.5}, r"config.select.top = 0.5: .*give --config.score=REWARD"),
        ({"score": "", "select.min_gap": 0.0}, r"config.select.min_gap = 0.0: .*give --config.score=REWARD"),
        ({"score": "", "select.images": "single"}, r"config.select.images = 'single': .*--config.score"),
        ({"select.top": 0.0}, "config.select.top = 0.0: must be above 0 and at most 1"),
        ({"select.top": 1.5}, "config.select.top = 1.5: must be above 0 and at most 1"),
        ({"select.min_gap": float("nan")}, "config.select.min_gap = nan: must be a finite number"),
        ({"select.images": "singel"}, "config.select.images = 'singel': unknown; did you mean 'single'"),
        ({"select.images": "single", "select.min_gap": 0.0}, "min_gap = 0: is between winner and loser"),
        ({"score": "", "select.agree": 1}, r"config.select.agree = 1: .*give --config.score=REWARD"),
        ({"select.agree": 2}, r"config.select.agree = 2: more than the 1 reward\(s\) of config.score"),
        ({"select.agree": -1}, "config.select.agree = -1: must not be negative"),
        (
            {"score": "colourfulness,"},
            "config.score = 'colourfulness,': must be different rewards, separated",
        ),
        ({"score": "colourfulness,a.py:b"}, "several rewards are read by config.select.agree alone"),
        (
            {"select.images": "single", "select.agree": 1},
            "agree = 1: compares winner and loser, and these are",
        ),
        (
            {"splits": ("validation",), "select.agree": 1},
            "agree = 1: selects from split 'train', which is not",
        ),
        (
            {"select.top": 0.5, "splits": ("validation",)},
            "top = 0.5: selects from split 'train', which is not",
        ),
        (
            {"select.min_gap": 1e3},
            r"min_gap = 1000: leaves no pair of split 'train'; the largest gap is 22\.6",
        ),
        ({"score": "colourfullness"}, "config.score: reward = 'colourfullness': unknown; did you mean 'col"),
    ],
)
def test_a_wrong_selection_is_refused_by_key(pipe, config, tmp_path, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        encode(config, tmp_path / "out")
    assert not (tmp_path / "out" / shards.UNFINISHED).exists()


def test_weights_that_are_missing_are_said_before_anything_is_written(pipe, config, tmp_path):
    config.score, config.rewards.folder = "pickscore", str(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"pickscore: no weights in .*none/pickscore; make them with"):
        encode(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_of_scores_is_named(pipe, config, tmp_path):
    assert not encode(config, tmp_path / "out", (0, 2))
    path = tmp_path / "out" / "scores" / "train-00000.npy"
    for damaged in (b"", path.read_bytes()[:-8], b"x" * 200):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"train-00000.npy: not a whole .*delete it, and it is made again"
        ):
            encode(config, tmp_path / "out", (1, 2))


def test_each_file_of_scores_is_read_once_to_count_its_bad_rows(pipe, config, tmp_path, monkeypatch):
    config.update(rows_per_shard=1, score="colourfulness")
    config.source.winners = (20, -1, 60, 55, 90, 40, 60, 30, -1, 70)
    config.source.max_skipped = 0.2
    read, count_unusable, counts = [], ScoreFiles.count_unusable, []
    load = np.load
    monkeypatch.setattr(
        np, "load", lambda path, **options: read.append(Path(path).name) or load(path, **options)
    )

    def counted(self, split):
        counts.append(count_unusable(self, split))
        assert len(read) == len(set(read))
        return counts[-1]

    monkeypatch.setattr(ScoreFiles, "count_unusable", counted)
    encode(config, tmp_path / "out")
    # Before each of the ten rows of train: rows 1 and 8 are bad. Then before those of validation.
    assert counts == [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 0, 0, 0]


def test_a_folder_with_more_than_scores_is_not_taken_over(pipe, config, tmp_path):
    assert not encode(config, tmp_path / "out", (0, 2))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"^--out=.*out: not empty and not an encoded dataset; choose another"
    ):
        encode(config, tmp_path / "out", (1, 2))
    (tmp_path / "music" / "scores").mkdir(parents=True)
    (tmp_path / "music" / "scores" / "sonata.pdf").write_text("...")
    with pytest.raises(UserError, match=r"^--out=.*music: not empty and not an encoded dataset"):
        encode(config, tmp_path / "music")
    begun = tmp_path / "begun" / "scores" / ".scores.json.0f.partial"
    begun.parent.mkdir(parents=True)
    begun.write_text("{")
    assert encode(config, tmp_path / "begun")


def test_inspect_shows_scores_and_agreement(pipe, config, tmp_path):
    config.select.top = 0.8
    encode(config, tmp_path / "out")
    report = summarize_dataset(tmp_path / "out")
    order = sorted(range(10), key=lambda i: (-Reds().winners[i], i))[:8]
    winners, losers = (np.asarray([Reds().reds(i)[j] for i in order]) * 8 / 30 for j in (0, 1))
    scores = report["splits"]["train"]["scores"]
    for name, values in (("winner", winners), ("loser", losers), ("gap", winners - losers)):
        assert scores[name]["median"] == pytest.approx(np.median(values), abs=1e-3)
        assert scores[name]["max"] == pytest.approx(values.max(), abs=1e-3)
    assert scores["agree"] == (winners > losers).sum()
    text = format_report(report)
    assert "reward redness, version own.py " in text
    assert f"{scores['agree']} of 8 pairs" in text
    assert json.loads(json.dumps(report)) == report


@pytest.mark.slow
def test_a_tenth_of_the_emoji_by_colourfulness_and_two_steps(tmp_path):
    model = str(Path(__file__).parents[2] / "examples" / "emoji" / "model")
    config = emoji_images.get_config()
    config.update(model=model, score="colourfulness", select={"top": 0.1})
    encode(config, tmp_path / "out")
    source = sources.get_source("emoji_images", min_occurrences=20)
    pairs = list(source.pairs("train"))
    reward = load_reward("colourfulness")
    on_white = []
    for pair in pairs:
        image = Image.open(pair.winner).convert("RGBA")
        on_white.append(
            np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))[..., :3]
        )
    scores = reward.score(on_white, [pair.caption for pair in pairs])
    best = sorted(sorted(range(len(pairs)), key=lambda i: (-scores[i], i))[: round(0.1 * len(pairs))])
    assert keys(tmp_path / "out") == [pairs[i].key for i in best]
    run = training.get_config()
    run.update(model=model, steps=2, batch_size=8, log_every=1, noise_offset=0.1)
    run.update(data={"path": str(tmp_path / "out")}, objective={"name": "sft"}, samples={"every": 0})
    run.validation.every = 0
    train(run, tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2
    assert np.isfinite(metrics[-1]["loss"])
