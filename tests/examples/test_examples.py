"""What the examples do besides calling the commands."""

import numpy as np
import pytest
from PIL import Image

from dspo_jax.data.sources.emoji import EmojiImages, EmojiPairs, load_emoji, load_sentiment
from dspo_jax.evaluation.prompt_sets import read_prompt_set
from dspo_jax.images.decode import decode_image
from dspo_jax.rewards import load_reward
from dspo_jax.sampling.prompts import Prompt
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


def test_a_picture_is_as_like_its_name_as_it_is_near_it():
    shown = [
        emoji for emoji in load_emoji() if emoji.name in ("red heart", "heavy black heart", "pouting face")
    ]
    heart, face = (next(e for e in shown if word in e.name) for word in ("heart", "face"))
    picture = np.asarray(decode_image(heart.path))
    reward = load_reward(f"{HERE / 'likeness.py'}:likeness")
    prompts = [heart.name, heart.category, face.name, heart.name]
    scores = reward.score([picture, picture, picture, 255 - picture], prompts)
    np.testing.assert_allclose(scores[:2], 0)
    # The face by NumPy alone: root mean square over 16 x 16 x 3 box means.
    small = [
        np.asarray(decode_image(e.path).reduce(1).resize((16, 16), Image.Resampling.BOX), float)
        for e in (heart, face)
    ]
    assert scores[2] == pytest.approx(-np.sqrt(np.mean((small[0] - small[1]) ** 2)), rel=1e-5)
    assert scores[3] < scores[2] < -10
    with pytest.raises(KeyError, match="no such emoji"):
        reward.function([picture], ["no such emoji"])
