"""Pairs from AI feedback: which images are compared, and that encode's source reads what is written."""

import json
import math
import os
import shutil

import numpy as np
import pytest
from image_files import image_bytes
from PIL import Image

from dspo_jax.data.sources import get_source
from dspo_jax.errors import UserError
from dspo_jax.evaluation.image_folders import ImageFolder
from dspo_jax.feedback import labelling
from dspo_jax.feedback.labelling import Pairing, choose_pairs, label, label_images
from dspo_jax.rewards import Reward
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Drawing, Rendering

PROMPTS = [Prompt("a red heart"), Prompt("a blue bird")]


def redness(images, prompts):
    return np.array([image[..., 0].mean() for image in images])


REWARD = Reward("redness", "1", redness)


@pytest.fixture
def drawn(shallow_model, tmp_path):
    rendering = Rendering(Drawing(steps=1, guidance_scale=1.0), batch_size=8)

    def run(reward=REWARD, **changes):
        pairing = Pairing(**{"images_per_prompt": 3, **changes})
        return label(shallow_model, PROMPTS, reward, tmp_path / "out", rendering, pairing)

    return run


def test_best_against_worst_and_all_against_all():
    scores = np.float32([[1, 3, 2], [5, 5, 5], [0, 0, 4]])
    assert choose_pairs(scores) == [(0, 1, 0), (2, 2, 0)]
    assert choose_pairs(scores, "all") == [(0, 1, 0), (0, 2, 0), (0, 1, 2), (2, 2, 0), (2, 2, 1)]


def test_noisy_labels_follow_the_bradley_terry_model():
    scores = np.tile(np.float32([[0.5, 2.0]]), (4000, 1))
    won = np.mean([choice.winner == 1 for choice in choose_pairs(scores, temperature=3.0)])
    expected = 1 / (1 + math.exp(-1.5 / 3.0))
    assert abs(won - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)
    assert choose_pairs(scores, temperature=3.0) == choose_pairs(scores, temperature=3.0)
    assert choose_pairs(scores, temperature=3.0) != choose_pairs(scores, temperature=3.0, seed=1)
    assert choose_pairs(scores, temperature=1e-9) == choose_pairs(scores)


def test_what_was_drawn_and_scored_is_a_source_of_pairs(drawn, tmp_path, monkeypatch):
    done = drawn()
    assert (done["images"], done["pairs"], done["ties"]) == (6, 2, 0)
    assert done["winners"] > done["losers"]
    source = get_source("folder", path=str(tmp_path / "out"), validation_share=0.0)
    pairs = list(source.pairs("train"))
    assert [pair.caption for pair in pairs] == ["a red heart", "a blue bird"]
    for number, pair in enumerate(pairs):
        scores = [redness([np.asarray(Image.open(image))], [""])[0] for image in (pair.winner, pair.loser)]
        images = sorted((tmp_path / "out" / "images").glob(f"0-*/{number:05d}_*.png"))
        every = [redness([np.asarray(Image.open(image))], [""])[0] for image in images]
        assert len(every) == 3
        assert scores == [max(every), min(every)]
        assert pair.preference == 1

    monkeypatch.setattr(labelling, "sample", lambda *given, **how: None)  # nothing is drawn again
    assert drawn(pairs="all")["pairs"] == 6
    keys = [json.loads(line)["key"] for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert len(set(keys)) == 6


def test_pairs_of_others_are_not_overwritten(drawn, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pairs.jsonl").write_text("made by hand")
    with pytest.raises(ValueError, match=r"out: has a pairs\.jsonl of others in it; choose another folder"):
        drawn()
    assert (tmp_path / "out" / "pairs.jsonl").read_text() == "made by hand"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_prompt": 1}, "--num_images=1: a pair needs at least 2"),
        ({"temperature": -1.0}, "--temperature=-1: must not be negative"),
        ({"pairs": "best"}, "--pairs = 'best': unknown; did you mean 'best_worst'"),
        (
            {"reward": Reward("same", "1", lambda images, prompts: np.ones(len(images)))},
            "reward same: gave all images of a prompt the same score",
        ),
    ],
)
def test_what_is_refused(drawn, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        drawn(**changes)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


def picture(path, red):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes((red, 0, 0), file_format="PNG"))


def rows_of(out):
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]


REDS = {"a/1.png": 10, "a/2.png": 30, "b.png": 20, "c.png": 90, "d.png": 50}
LINES = [("bird", "a/1.png"), ("bird", "a/2.png"), ("heart", "d.png"), ("bird", "b.png"), ("sun", "c.png")]


@pytest.fixture
def theirs(tmp_path):
    """Three images of a bird, the second the reddest, and one each of other prompts."""
    for name, red in REDS.items():
        picture(tmp_path / "theirs" / name, red)
    rows = [json.dumps({"file_name": name, "text": text}) for text, name in LINES]
    (tmp_path / "theirs" / "metadata.jsonl").write_text("\n".join(rows))
    return ImageFolder(tmp_path / "theirs")


def test_images_that_exist_are_ordered_and_encode_reads_the_pairs(theirs, tmp_path):
    out = tmp_path / "out"
    done = label_images(theirs, REWARD, out, Pairing())
    assert (done["images"], done["pairs"], done["ties"]) == (3, 1, 0)
    (pair,) = get_source("folder", path=str(out), validation_share=0.0).pairs("train")
    reds = [int(redness([np.asarray(Image.open(image))], [""])[0]) for image in (pair.winner, pair.loser)]
    assert (pair.caption, reds) == ("bird", [30, 10])
    # Again, of every two, and of what has changed since: the image that was the best is now the worst.
    picture(theirs.path / "a" / "2.png", 5)
    assert label_images(theirs, REWARD, out, Pairing(pairs="all"))["pairs"] == 3
    assert [row["redness"] for row in rows_of(out)] == [[10, 5], [20, 10], [20, 5]]
    # The pairs are images of prompts themselves, to be ordered by another reward.
    paleness = Reward("paleness", "1", lambda images, prompts: -redness(images, prompts))
    again = tmp_path / "again"
    assert label_images(ImageFolder(out), paleness, again, Pairing())["images"] == 3
    assert rows_of(again)[0]["paleness"] == [-5, -20]


def test_images_that_changed_places_are_scored_anew(tmp_path):
    """Scores follow the content of a file, also where its size and time stay, as in an unpacked archive."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name, red in (("a.bmp", 10), ("b.bmp", 90)):
        (folder / name).write_bytes(image_bytes((red, 0, 0), file_format="BMP"))
        os.utime(folder / name, (1e9, 1e9))
    for names in (("a.bmp", "b.bmp"), ("b.bmp", "a.bmp")):
        rows = [json.dumps({"file_name": name, "prompt": "bird"}) for name in names]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
        label_images(ImageFolder(folder), REWARD, tmp_path / "out", Pairing())
        (row,) = rows_of(tmp_path / "out")
        winner = np.asarray(Image.open(tmp_path / "out" / row["winner"]))
        assert (int(winner[0, 0, 0]), row["redness"]) == (90, [90, 10])


def test_what_sample_left_is_read_whole_or_by_model(tmp_path):
    lines = []
    for model in ("0-m", "1-n"):
        for seed in range(2):
            name = f"{model}/00000_{seed}.png"
            picture(tmp_path / "drawn" / name, 10 * seed + (100 if model == "1-n" else 0))
            lines.append(json.dumps({"prompt": "bird", "prompt_index": 0, "seed": seed, "file": name}))
    (tmp_path / "drawn" / "manifest.jsonl").write_text("\n".join(lines))
    for folder, expected in (("drawn", [110, 0]), ("drawn/0-m", [10, 0]), ("drawn/1-n", [110, 100])):
        out = tmp_path / f"of-{folder.replace('/', '-')}"
        label_images(ImageFolder(tmp_path / folder), REWARD, out, Pairing())
        assert [row["redness"] for row in rows_of(out)] == [expected]


def test_what_is_refused_of_images_that_exist(theirs, tmp_path):
    def refuse(message, folder=theirs, out=tmp_path / "out", error=UserError):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=message):
            label_images(folder, REWARD, out, Pairing())
        assert sorted(tmp_path.rglob("*")) == before

    label_images(theirs, REWARD, tmp_path / "done", Pairing())
    others = ImageFolder(shutil.copytree(theirs.path, tmp_path / "others"))
    refuse(f"done: holds pairs of --images_from={theirs.path}; choose", others, tmp_path / "done")
    refuse("holds --images_from=.*; choose another", ImageFolder(tmp_path / "done"), tmp_path / "done")
    refuse("theirs: not empty, and not made from other images", out=theirs.path)
    refuse(r"absent: no such folder", ImageFolder(tmp_path / "absent"), error=FileNotFoundError)
    refuse(
        r"holds none of manifest\.jsonl, metadata", ImageFolder(theirs.path / "a"), error=FileNotFoundError
    )
    metadata = theirs.path / "metadata.jsonl"
    picture(tmp_path / "outside.png", 1)
    for line, message, error in (
        ('{"file_name": "../outside.png", "text": "bird"}', r"line 1: file_name = .*leads out of", UserError),
        ('{"file_name": "none.png", "text": "bird"}', r"line 1: file_name = 'none\.png'", FileNotFoundError),
        ('{"file_name": "b.png"}', "line 1: no text under prompt, caption, text", UserError),
        ('{"file_name": "b.png", "text": "bird"}', "has one image of each prompt; a pair needs", UserError),
    ):
        metadata.write_text(line)
        refuse(message, error=error)
    metadata.write_text("")
    refuse(f"^{metadata}: no prompt in it")


def test_a_damaged_image_is_named_as_its_owner_calls_it(theirs, tmp_path):
    damaged = theirs.path / "a" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:30])
    with pytest.raises(UserError, match=f"^{damaged}: "):
        label_images(theirs, REWARD, tmp_path / "out", Pairing())
    picture(damaged, 70)
    assert label_images(theirs, REWARD, tmp_path / "out", Pairing())["pairs"] == 1
    assert rows_of(tmp_path / "out")[0]["redness"] == [70, 10]


def test_an_output_of_an_earlier_version_that_notes_no_origin_is_gone_on_with(theirs, tmp_path):
    label_images(theirs, REWARD, tmp_path / "out", Pairing())
    origin = tmp_path / "out" / "gathered" / "origin.json"
    origin.unlink()
    label_images(theirs, REWARD, tmp_path / "out", Pairing())
    assert json.loads(origin.read_text()) == {"images_from": str(theirs.path.resolve())}
