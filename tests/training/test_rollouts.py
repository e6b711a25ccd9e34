"""Rollouts of the trained parameters: the sampler's states, and the same noise on every mesh."""

import jax
import numpy as np
import pytest
import scipy.stats
from online_run import PROMPTS, STEPS, OnlineRun, brightness

from dspo_jax.errors import UserError
from dspo_jax.sampling.guidance import GuidedDenoiser
from dspo_jax.training.rollouts import Rollout
from dspo_jax.training.rounds import Position, Rounds

INDEX = np.arange(40, 48, dtype=np.uint32)


def draw(run, start=None):
    rollout = Rollout(run.task, run.settings.stream.drawing, run.size, run.mesh)
    tokens = run.pipe.tokenize([PROMPTS[i % 3] for i in range(8)])
    return rollout, rollout(run.params, run.reference, tokens, INDEX, run.key, start)


@pytest.fixture(scope="module")
def run(shallow_model):
    return OnlineRun(shallow_model)


@pytest.fixture(scope="module")
def drawn(run):
    return draw(run)


def test_states_are_those_of_the_sampler_with_noise_of_image_and_step(run, drawn):
    states = np.asarray(drawn[1])
    assert states.shape == (STEPS + 1, 8, *run.size, 4)
    assert states.dtype == np.float32
    drawing = run.settings.stream.drawing
    denoiser, sampler = GuidedDenoiser(run.pipe, drawing), drawing.make_sampler(run.pipe)
    params = {**run.reference, **run.params}
    for number in (0, 5):

        def noise(i, number=number):
            key = jax.random.fold_in(jax.random.fold_in(run.key, INDEX[number]), i)
            return jax.random.normal(key, (1, *states.shape[2:]))

        @jax.jit
        def by_hand(params, tokens, noise=noise):
            text = denoiser.encode(params, tokens, run.size)
            return sampler.rollout(
                lambda x, t: denoiser.predict(params, x, t, text),
                sampler.start(noise(0)),
                lambda i: noise(i + 1),
            ).latents

        expected = by_hand(params, run.pipe.tokenize([PROMPTS[number % 3]]))
        np.testing.assert_array_equal(states[0, number], expected[0, 0])
        np.testing.assert_allclose(states[:, number], expected[:, 0], rtol=1e-4, atol=2e-5)


def test_log_probabilities_are_those_of_the_noise_that_was_drawn(run, drawn):
    calls = np.array([[2, 0], [1, 1], [0, 2]], np.int32)
    found = drawn[0].log_probability(INDEX[:3], calls, run.key)
    deviation = drawn[0].sampler.step_noise
    for image, call in np.ndindex(calls.shape):
        step = calls[image, call]
        key = jax.random.fold_in(jax.random.fold_in(run.key, INDEX[image]), step + 1)
        z = np.float64(jax.random.normal(key, (*run.size, 4)))
        expected = scipy.stats.norm.logpdf(z * deviation[step], scale=deviation[step]).sum()
        assert found[image, call] == pytest.approx(expected, rel=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_every_mesh_draws_the_same(shallow_model, drawn, sizes):
    states = np.asarray(draw(OnlineRun(shallow_model, mesh_sizes=sizes))[1])
    np.testing.assert_array_equal(states[0], drawn[1][0])
    np.testing.assert_allclose(states, drawn[1], rtol=1e-4, atol=5e-5)


def test_images_of_one_start_share_nothing_but_the_first_state(run, drawn):
    tokens = run.pipe.tokenize([PROMPTS[0]] * 8)
    states = drawn[0](run.params, run.reference, tokens, INDEX, run.key, INDEX - INDEX % 2)
    states = np.asarray(states)
    np.testing.assert_array_equal(states[0, 0], states[0, 1])
    assert not np.any(states[1:, 0] == states[1:, 1])


@pytest.mark.ci
def test_a_round_measures_its_images(run):
    rounds = Rounds(run.settings, run.task, run.reference, PROMPTS, brightness, run.mesh, count=16)
    drawn = rounds.draw(run.params, Position(round=1, prompts=3, images=16))
    assert [states.shape[1] for states in drawn.states] == [8, 8]
    assert list(drawn.prompts[::2]) == list(drawn.prompts[1::2])
    latents = np.concatenate([np.asarray(states[-1]) for states in drawn.states])
    pixels = np.asarray(run.pipe.decode({"vae": run.pipe.read_params("vae")}, latents)) / 2 + 0.5
    images = np.round(np.clip(pixels, 0, 1) * 255)
    expected = brightness(images, drawn.prompts)
    np.testing.assert_allclose(drawn.rewards, expected, atol=2e-3)
    pairs = (images[::2] - images[1::2]) / 255
    diversity = np.sqrt(np.square(pairs).mean((1, 2, 3))).mean()
    outside = ((pixels < 0) | (pixels > 1)).mean()
    assert drawn.metrics == {
        "reward": pytest.approx(expected.mean(), abs=2e-3),
        "reward_std": pytest.approx(expected.std(), abs=2e-3),
        "unusable_images": 0,
        "saturated": pytest.approx(outside, abs=2e-3),
        "reward_queries": 32,
        "diversity": pytest.approx(diversity, abs=2e-3),
    }
    assert rounds.draw(run.params, drawn.position).rewards.tolist() == drawn.rewards.tolist()


def test_a_round_whose_images_are_not_finite_ends_the_run(run):
    rounds = Rounds(run.settings, run.task, run.reference, PROMPTS, brightness, run.mesh, count=8)
    spoiled = jax.tree.map(lambda leaf: leaf * np.nan, run.params)
    with pytest.raises(UserError, match=r"8 of 8 images have no reward, 8 of them.*learning_rate"):
        rounds.draw(spoiled, Position())


def test_numbers_of_images_that_do_not_fit_are_refused(shallow_model):
    for changes, expected in (
        ({"stream.images": 3}, "config.stream.images = 3: must divide the 8"),
        ({"stream.batch_size": 3}, r"config.stream.batch_size = 3: .* one of \[1, 2, 4, 8\]"),
    ):
        run = OnlineRun(shallow_model, changes)
        with pytest.raises(UserError, match=expected):
            Rounds(run.settings, run.task, run.reference, PROMPTS, brightness, run.mesh, count=8)
