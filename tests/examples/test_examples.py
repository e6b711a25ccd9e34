"""What the examples do besides calling the commands."""

import csv
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from processes import ROOT

from dspo_jax.data.sources.emoji import EmojiImages, EmojiPairs, load_emoji, load_sentiment
from dspo_jax.evaluation.prompt_sets import read_prompt_set
from dspo_jax.images.decode import decode_image
from dspo_jax.rewards import load_reward
from dspo_jax.sampling.prompts import Prompt
from examples.beta_ablation import write_medians
from examples.emoji.closed_loop import HERE, choose_prompts


def test_a_picture_of_an_emoji_has_its_sentiment_at_any_size():
    shown = [emoji for emoji in load_emoji() if emoji.name in ("face with tears of joy", "pouting face")]
    scores = [load_sentiment()[emoji.codepoints].score for emoji in shown]
    assert max(scores) - min(scores) > 0.3
    reward = load_reward(f"{HERE / 'sentiment.py'}:sentiment")
    for side in (64, 72):
        images = [decode_image(emoji.path).resize((side, side), Image.Resampling.LANCZOS) for emoji in shown]
        np.testing.assert_allclose(reward.score(list(map(np.asarray, images)), ["", ""]), scores, rtol=1e-6)


def test_the_loop_trains_on_no_name_that_it_is_evaluated_on(tmp_path):
    held_out = read_prompt_set(str(HERE / "prompts.txt"), tmp_path).prompts
    captions = {pair.caption for pair in EmojiImages(min_occurrences=20).pairs("train")}
    categories = {pair.caption for pair in EmojiPairs().pairs("train")}
    assert {prompt.text for prompt in held_out} <= captions
    chosen = [prompt.text for prompt in choose_prompts(held_out)]
    assert len(chosen) == 160 + 10 * len(categories)
    assert not {prompt.text for prompt in held_out} & set(chosen) - categories
    assert set(chosen) <= captions
    assert choose_prompts(held_out) == choose_prompts(held_out)
    assert choose_prompts([Prompt(chosen[0])])[0].text != chosen[0]


@pytest.mark.ci
def test_what_would_stop_the_evaluation_stops_the_ablation_before_it_trains(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    flags = ["--config=configs/emoji_diffusion_dpo.py", "--betas=500", "--rewards=pickscoer"]
    flags += [f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'out'}"]
    result = subprocess.run(
        [sys.executable, "-m", "examples.beta_ablation", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert "pickscoer" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("out/run_*"))


def test_medians_over_beta(tmp_path):
    scores = {"base": [[0.0, 1.0], [2.0, 3.0]], "500": [[4.0, 4.0], [4.0, 8.0]], "2000": [[1.0, 2.0]] * 2}
    evaluation = SimpleNamespace(
        rewards={"pickscore": "1"}, scores={label: {"pickscore": np.array(s)} for label, s in scores.items()}
    )
    write_medians(evaluation, [500.0, 2000.0], tmp_path)
    with (tmp_path / "beta.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[1:] == [
        ["pickscore", "", "0.75", "1.5", "2.25"],
        ["pickscore", "500", "4.0", "4.0", "5.0"],
        ["pickscore", "2000", "1.0", "1.5", "2.0"],
    ]
    with Image.open(tmp_path / "beta.png") as image:
        assert image.width > image.height
