import json
import re

import numpy as np
import pytest
from PIL import Image
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.rewards import REWARDS, Reward, load_reward
from dspo_jax.rewards.scores import score_files

OWN = """
import numpy as np

def redness(images, prompts):
    with open({log!r}, "a") as log:
        print(*prompts, sep=",", file=log)
    return np.array([image[..., 0].mean() for image in images])
"""


def plain(colour, size=(4, 6)):
    return np.full((*size, 3), colour, np.uint8)


def test_colourfulness_of_one_colour_is_three_tenths_of_its_opponents():
    # rg = 100 - 20 = 80, yb = (100 + 20) / 2 - 0 = 60; no variance: 0.3 * sqrt(80^2 + 60^2) = 30
    score = load_reward("colourfulness").score([plain((100, 20, 0)), plain((7, 7, 7))], ["a", "b"])
    np.testing.assert_allclose(score, [30, 0], atol=1e-5)


def test_colourfulness_of_two_colours_adds_the_deviation():
    image = np.concatenate([plain((30, 0, 0)), plain((0, 0, 0))])
    # rg in {30, 0}: mean 15, deviation 15; yb in {15, 0}: mean 7.5, deviation 7.5
    expected = 1.3 * np.hypot(15, 7.5)
    np.testing.assert_allclose(load_reward("colourfulness").score([image], [""]), [expected], rtol=1e-6)


def test_compressibility_is_the_size_of_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    images = [noise, plain((1, 2, 3), (40, 30))]
    scores = load_reward("compressibility").score(images, ["", ""])
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg", quality=95)
        assert scores[i] == np.float32(-(tmp_path / f"{i}.jpg").stat().st_size / 1000)
    assert scores[1] > scores[0]


def test_a_function_of_ones_own_and_what_was_scored_is_not_scored_again(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "own.py").write_text(OWN.format(log=str(log)))
    reward = load_reward(f"{tmp_path / 'own.py'}:redness")
    assert (reward.name, reward.version[:7]) == ("redness", "own.py ")
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(plain((10 * i, 0, 0))).save(files[-1])
    prompts = ["a\u2028", "b", "c"]  # which is no end of a line

    first = score_files(files[:2], prompts[:2], [reward], tmp_path / "cache")
    np.testing.assert_array_equal(first["redness"], [0, 10])
    cache = next((tmp_path / "cache").iterdir())
    cache.write_bytes(cache.read_bytes()[:-9])  # killed in the middle of the second line
    again = score_files(files, prompts, [reward], tmp_path / "cache")
    np.testing.assert_array_equal(again["redness"], [0, 10, 20])
    assert log.read_text().split("\n") == ["a\u2028,b", "b,c", ""]

    Image.fromarray(plain((200, 0, 0))).save(files[0])
    changed = score_files(files, prompts, [reward], tmp_path / "cache")
    np.testing.assert_array_equal(changed["redness"], [200, 10, 20])
    assert log.read_text().split("\n")[2:] == ["a\u2028", ""]

    other = Reward(reward.name, "another version", lambda images, prompts: np.ones(len(images)))
    assert score_files(files, prompts, [other], tmp_path / "cache")["redness"].tolist() == [1, 1, 1]
    versions = {json.loads(line)["version"] for line in cache.read_text().split("\n") if line[-1:] == "}"}
    assert versions == {reward.version, "another version"}


@each_row(
    ("scores", "message"),
    [
        (np.zeros((2, 1)), "reward r: gave scores of shape [2, 1] for 2 images; it must give [2]"),
        (np.zeros(3), "reward r: gave scores of shape [3] for 2 images"),
        (np.array([0, np.nan]), "reward r: gave nan for an image of 'b'; every score must be finite"),
        (np.array([np.inf, 0]), "reward r: gave inf for an image of 'a'"),
    ],
)
def test_scores_that_are_refused(scores, message):
    reward = Reward("r", "", lambda images, prompts: scores)
    with pytest.raises(ValueError, match=re.escape(message)):
        reward.score([plain(0)] * 2, ["a", "b"])


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"reward = 'colorfulness': unknown; did you mean 'colourfulness'"):
        load_reward("colorfulness")
    with pytest.raises(FileNotFoundError, match=r"none\.py: no such file"):
        load_reward(f"{tmp_path}/none.py:score")
    (tmp_path / "own.py").write_text("")
    with pytest.raises(ValueError, match=r"own\.py: defines no function 'score'"):
        load_reward(f"{tmp_path}/own.py:score")
    for text, fault in (
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import nopackage", "ModuleNotFoundError: No"),
    ):
        (tmp_path / "own.py").write_text(text)
        with pytest.raises(UserError, match=rf"^reward .*own\.py: cannot be run: {fault}") as error:
            load_reward(f"{tmp_path}/own.py:score")
        assert "\n" not in str(error.value)
    assert {"compressibility", "colourfulness"} <= set(REWARDS)


def test_transparency_goes_to_rewards_that_read_it_and_is_white_for_others(tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGBA", (3, 2), (200, 0, 0, 0)).save(file)

    def shape_and_red(images, prompts):
        return np.array([1000 * image.shape[-1] + int(image[0, 0, 0]) for image in images])

    over_white = Reward("r", "1", shape_and_red)
    reading = Reward("r", "1", shape_and_red, reads_alpha=True)
    assert score_files([file], ["a"], [over_white], tmp_path / "cache")["r"] == 3255
    cache = tmp_path / "cache" / "r.0.jsonl"
    (row,) = map(json.loads, cache.read_text().splitlines())
    # As such lines were before rewards could read it; and what is no line of ours.
    cache.write_text(json.dumps({key: row[key] for key in ("file", "prompt", "version", "score")}) + "\n3\n")
    assert score_files([file], ["a"], [reading], tmp_path / "cache")["r"] == 4200
    assert score_files([file], ["a"], [over_white], tmp_path / "cache")["r"] == 3255
    assert len(list(filter(None, cache.read_text().split("\n")))) == 3  # nothing is scored twice


def test_the_rewards_of_pixels_see_what_people_see():
    assert not any(load_reward(name).reads_alpha for name in ("compressibility", "colourfulness"))


def test_an_image_that_cannot_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png: undecodable image"):
        score_files([tmp_path / "a.png"], ["a"], [load_reward("compressibility")], tmp_path / "cache")
