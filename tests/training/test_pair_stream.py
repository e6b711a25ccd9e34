"""Pairs of own images: the best and the worst of each prompt, as encoded pairs, for any objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from online_run import PROMPTS, OnlineRun, brightness, moved
from tables import slow

from dspo_jax.errors import UserError
from dspo_jax.training.pair_stream import PairStream, _take_moments, choose_images, pair_all
from dspo_jax.training.step import compile_step


def test_the_best_and_the_worst_of_each_prompt_make_a_pair():
    nan = np.nan
    rewards = np.asarray([[1, 3, 2], [nan, 4, nan], [nan, 5, 6], [7, 7, 7], [nan, nan, nan]], np.float32)
    pairs, replaced = choose_images(rewards, 2)
    assert pairs.tolist() == [[1, 0], [8, 7], [8, 7], [9, 11], [1, 0]]
    assert replaced == 2
    expected = r"^config\.rewards\.train: gives a reward to no two of the 3 images .*config\.stream\.images"
    with pytest.raises(UserError, match=expected):
        choose_images(rewards[[1, 4]], 2)


@pytest.mark.ci
def test_a_batch_is_like_encoded_pairs(shallow_model):
    changes = {"stream.images": 4, "stream.eta": 0.0, "batch_size": 4, "objective.name": "diffusion_dpo"}
    changes["objective.smpo_weight"] = 10.0
    run, seen = OnlineRun(shallow_model, changes, trajectories=False), []

    def score(images, prompts):
        seen.append((images, brightness(images, prompts)))
        return np.round(seen[-1][1], 9)

    stream = run.open(PairStream, score)
    batch = jax.device_get(stream.next(run.params))
    assert stream.at_round_end
    shapes = run.loss.input_shapes(run.pipe, 2, run.pipe.image_size)
    assert {name: (array.shape[1:], array.dtype) for name, array in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()
    }
    mean, deviation = np.split(batch["moments"], 2, axis=-1)
    assert not np.any(deviation)
    images = np.concatenate([images for images, _ in seen])
    rewards = np.concatenate([rewards for _, rewards in seen]).reshape(4, 4)
    params = {"vae": run.pipe.read_params("vae")}
    for place, best in enumerate((rewards.argmax(1), rewards.argmin(1))):
        decoded = np.asarray(run.pipe.decode(params, mean[:, place].astype(np.float32)))
        expected = images.reshape(4, 4, *images.shape[1:])[np.arange(4), best]
        np.testing.assert_allclose(np.clip(decoded * 127.5 + 127.5, 0, 255), expected, atol=1.5)
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert np.all(batch["preference"] == 1)
    np.testing.assert_allclose(batch["scores"], np.stack([rewards.max(1), rewards.min(1)], 1), rtol=1e-6)
    assert batch["micro_conditioning"].tolist() == [[[16, 16, 0, 0, 16, 16]] * 2] * 4
    assert stream.metrics()["reward_gap"] == pytest.approx(np.ptp(rewards, axis=1).mean(), abs=1e-5)


def test_all_images_of_a_prompt_make_a_list_best_first():
    nan = np.nan
    rewards = np.asarray([[1, 3, 2], [nan, 4, 5], [7, 8, 7]], np.float32)
    lists, replaced = choose_images(rewards, 3)
    assert lists.tolist() == [[1, 2, 0], [7, 6, 8], [7, 6, 8]]
    assert replaced == 1
    expected = r"^config\.rewards\.train: gives a reward to all 3 images of no prompt .*images to fewer$"
    with pytest.raises(UserError, match=expected):
        choose_images(rewards[[1]], 3)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["lpo_list", slow("nft")])
def test_objectives_of_lists_get_every_image_of_a_prompt_with_its_reward(name, shallow_model):
    changes = {"stream.images": 3, "stream.updates": 2, "stream.batch_size": 12, "objective.name": name}
    run, scores = OnlineRun(shallow_model, {**changes, "batch_size": 4}, trajectories=False), []

    def score(images, prompts):
        rewards = brightness(images, prompts)
        rewards[4] = np.nan  # the second prompt of each half of the round has no list
        scores.append(rewards)
        return rewards

    stream = run.open(PairStream, score)
    batches = [jax.device_get(stream.next(run.params)) for _ in range(2)]
    assert stream.at_round_end
    shapes = run.loss.input_shapes(run.pipe, 3, run.pipe.image_size)
    assert {label: (array.shape[1:], array.dtype) for label, array in batches[0].items()} == {
        label: (leaf.shape, leaf.dtype) for label, leaf in shapes.items()
    }
    expected = -np.sort(-np.concatenate(scores).astype(np.float32).reshape(8, 3), axis=1)
    expected[[1, 5]] = expected[[2, 6]]
    np.testing.assert_array_equal(np.concatenate([batch["scores"] for batch in batches]), expected)
    assert stream.metrics()["replaced_pairs"] == 2
    assert stream.metrics()["reward_gap"] == pytest.approx((expected[:, 0] - expected[:, 2]).mean(), rel=1e-5)
    # The pictures of the latents are as bright as the scores say, but for what the prompts add.
    mean = np.concatenate([batch["moments"] for batch in batches])[..., : run.pipe.latent_channels]
    params = {"vae": run.pipe.read_params("vae")}
    decoded = np.asarray(run.pipe.decode(params, mean.reshape(-1, *mean.shape[2:]).astype(np.float32)))
    bright = np.clip(decoded / 2 + 0.5, 0, 1).mean((1, 2, 3)).reshape(8, 3)
    np.testing.assert_allclose(bright - bright[:, :1], expected - expected[:, :1], atol=3e-3)
    assert np.all(np.concatenate([batch["preference"] for batch in batches]) == 1)
    assert np.concatenate([batch["index"] for batch in batches]).tolist() == list(range(8))
    following = stream.next(run.params)
    assert jax.device_get(following["index"]).tolist() == [8, 9, 10, 11]
    _, metrics = compile_step(run.state)(run.state, run.reference, following, run.key)
    assert np.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0


def test_two_images_of_a_prompt_remain_a_pair_with_its_label(shallow_model):
    run = OnlineRun(shallow_model, {"objective.name": "nft"}, trajectories=False)
    batch = jax.device_get(run.open(PairStream).next(run.params))
    assert batch["moments"].shape[1] == 2
    assert "scores" not in batch


@pytest.mark.ci
def test_every_objective_trains_on_them_and_a_resumed_round_is_the_same(shallow_model):
    changes = {"stream.updates": 2, "stream.batch_size": 16, "objective.name": "dspo"}
    run = OnlineRun(shallow_model, changes, {"data": 2, "fsdp": 4}, trajectories=False)
    stream, other = run.open(PairStream, lambda images, prompts: np.ones(len(images))), moved(run.params)
    for _ in range(2):
        batch = stream.next(run.params)
    assert np.all(jax.device_get(batch["preference"]) == 0.5)
    assert stream.metrics()["ties"] == 1
    state = stream.get_state()
    expected = [jax.device_get(stream.next(other)) for _ in range(2)]
    assert expected[1]["index"].tolist() == list(range(24, 32))
    resumed = run.open(PairStream, lambda images, prompts: np.ones(len(images)))
    resumed.set_state(state)
    for batch in expected:
        found = jax.device_get(resumed.next(other))
        for name, array in batch.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    _, metrics = compile_step(run.state)(run.state, run.reference, resumed.next(run.params), run.key)
    assert np.isfinite(metrics["loss"])


def test_one_image_of_a_prompt_is_refused(shallow_model):
    run = OnlineRun(shallow_model, {"stream.images": 1}, trajectories=False)
    with pytest.raises(UserError, match=r"config\.stream\.images = 1: .*at least 2"):
        run.open(PairStream, prompts=PROMPTS)


def test_all_images_of_each_prompt_are_paired_once_in_the_order_of_reward():
    nan = np.nan
    rewards = np.asarray([[1, 3, 2, 4], [nan, 7, 7, -np.inf], [5, nan, nan, 6]], np.float32)
    assert pair_all(rewards).tolist() == [[3, 1], [2, 0], [5, 6], [4, 7], [11, 8], [9, 10]]


@pytest.mark.ci
@pytest.mark.parametrize("softmax_over", ["round", "prompt"])
def test_images_are_weighed_by_the_rewards_of_the_round(softmax_over, shallow_model):
    """Against the whole round in float64: every image once, those without a reward for nothing."""
    changes = {
        "objective.name": "rwr",
        "objective.beta": 20.0,
        "objective.softmax_over": softmax_over,
        "stream.images": 4,
        "stream.updates": 2,
        "batch_size": 4,
    }
    run, scores = OnlineRun(shallow_model, changes, {"data": 2}, trajectories=False), []

    def score(images, prompts):
        rewards = brightness(images, prompts)
        rewards[1::8] = np.nan
        scores.append(rewards)
        return rewards

    stream = run.open(PairStream, score)
    batches = [stream.next(run.params) for _ in range(2)]
    step = compile_step(run.state)
    shapes = run.loss.input_shapes(run.pipe, 2, run.pipe.image_size)
    assert {name: (array.shape[1:], array.dtype) for name, array in batches[0].items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()
    }
    rewards = np.concatenate(scores).astype(np.float32).astype(np.float64)
    finite = np.isfinite(rewards)
    odds = np.where(finite, np.exp(20 * np.where(finite, rewards, 0)), 0).reshape(4, 4)
    weights = 16 * odds / odds.sum() if softmax_over == "round" else 4 * odds / odds.sum(1, keepdims=True)
    found = np.concatenate([jax.device_get(batch["weight"]) for batch in batches])
    # A prompt has two rows, and each row the better image first.
    np.testing.assert_allclose(found.reshape(4, 4), -np.sort(-weights, axis=1), rtol=1e-5)
    assert found.mean() == pytest.approx(1, abs=1e-6)
    assert stream.metrics()["effective_images"] == pytest.approx(256 / np.sum(weights**2), rel=1e-5)
    assert np.concatenate([jax.device_get(batch["index"]) for batch in batches]).tolist() == list(range(8))
    latents = np.concatenate([jax.device_get(batch["moments"]) for batch in batches]).reshape(16, -1)
    assert len(np.unique(latents, axis=0)) == 16
    state, metrics = step(run.state, run.reference, batches[0], run.key)
    assert metrics["grad_norm"] > 0
    following = stream.next(state.params)
    assert jax.device_get(following["index"]).tolist() == [8, 9, 10, 11]


def test_an_image_that_is_not_finite_does_not_reach_the_loss():
    """Nothing times NaN would be NaN."""
    chunk = np.ones((1, 4, 2, 2, 3), np.float32)
    chunk[0, 1, 0, 0] = np.nan, np.inf, -1e9
    taken = np.asarray(_take_moments((jnp.asarray(chunk),), jnp.asarray([[0, 1]])))
    assert np.isfinite(taken).all()
    assert taken[0, 1, 0, 0].tolist() == [0] * 6
    assert taken[0, 1, 1, 1].tolist() == [1] * 3 + [0] * 3


def test_an_odd_number_of_images_cannot_be_paired(shallow_model):
    run = OnlineRun(
        shallow_model, {"stream.images": 3, "batch_size": 6, "objective.name": "rwr"}, trajectories=False
    )
    with pytest.raises(UserError, match=r"config\.stream\.images = 3: 'rwr' .*even number"):
        run.open(PairStream, prompts=PROMPTS)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["diffusion_dpo", "rwr"])
@pytest.mark.parametrize("scores", [(1.0, 1.0), (0.0, 1.0)])
def test_a_round_in_which_no_image_is_better_is_told(name, scores, shallow_model, caplog):
    changes = {"objective.name": name, "stream.images": 2}
    run = OnlineRun(shallow_model, changes, trajectories=False)
    run.open(PairStream, lambda images, prompts: np.resize(scores, len(images))).next(run.params)
    assert ("round 0: no image has a higher reward" in caplog.text) == (scores[0] == scores[1])
