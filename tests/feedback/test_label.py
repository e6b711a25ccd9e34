"""Pairs from AI feedback: which images are compared, and that encode's source reads what is written."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from dspo_jax.data.sources import get_source
from dspo_jax.feedback import labelling
from dspo_jax.feedback.labelling import Pairing, choose_pairs, label
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
