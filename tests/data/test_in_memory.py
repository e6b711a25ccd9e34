"""Pairs encoded in memory: the same arrays as a dataset on disk holds, and what is refused."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from dspo_jax.data.in_memory import encode_pairs
from dspo_jax.data.sources import PreferencePair
from dspo_jax.errors import UserError
from dspo_jax.pipelines.loading import load_pipeline


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return load_pipeline(tiny_model)


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 16, 3), np.uint8))


PAIRS = [
    PreferencePair(f"picture {n}", picture(2 * n), picture(2 * n + 1), preference=0.75, loser_won=n == 1)
    for n in range(3)
]


@pytest.mark.ci
def test_pairs_keep_their_order_and_have_the_moments_of_their_images(pipe):
    batch = encode_pairs(pipe, PAIRS)
    assert all(isinstance(array, np.ndarray) and len(array) == 3 for array in batch.values())
    assert batch["preference"].tolist() == [0.75] * 3
    assert batch["loser_won"].tolist() == [False, True, False]
    assert np.array_equal(batch["tokens"], pipe.tokenize([pair.caption for pair in PAIRS]))
    assert batch["micro_conditioning"][0, 0].tolist() == [24, 16, 4, 0, 16, 16]
    params = {"vae": pipe.read_params("vae", "float32")}
    for n, image in ((0, 0), (2, 1)):  # the middle 16 x 16 pixels
        pixels = np.asarray(picture(2 * n + image))[None, 4:20] / np.float32(127.5) - 1
        expected = np.asarray(pipe.encode_moments(params, pixels.astype(np.float32)))[0]
        assert batch["moments"].dtype == np.float16
        np.testing.assert_allclose(batch["moments"][n, image], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("pairs", "arguments", "words"),
    [
        ([], {}, ["pairs", "empty"]),
        ([PAIRS[0], dataclasses.replace(PAIRS[1], loser=None)], {}, ["loser", "single images"]),
        ([PAIRS[0], dataclasses.replace(PAIRS[1], scores=(1.0, 0.5))], {}, ["some have scores", "to none"]),
        ([dataclasses.replace(PAIRS[1], scores=(1.0, 0.5)), PAIRS[0]], {}, ["some have scores", "to none"]),
        ([PAIRS[0], PreferencePair("same", picture(0), picture(0), key="k")], {}, ["k", "identical images"]),
        (PAIRS, {"resolution": 18}, ["resolution = 18", "multiple of 4"]),
    ],
)
def test_what_cannot_be_encoded_is_refused(pairs, arguments, words, pipe):
    with pytest.raises(UserError) as caught:
        encode_pairs(pipe, pairs, **arguments)
    assert all(word in str(caught.value) for word in words)
