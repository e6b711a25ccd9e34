"""Rounds of trajectories: rewards become advantages, the same on every mesh, and a round can be replayed."""

import json

import jax
import numpy as np
import pytest
from online_run import STEPS, OnlineRun, brightness, moved
from tables import slow

from dspo_jax.errors import UserError
from dspo_jax.objectives.advantages import group_advantages
from dspo_jax.training.step import mean_gradient
from dspo_jax.training.trajectory_stream import TrajectoryStream


def rows(batch):
    """Numbers that tell the rows of a batch apart, with every column, in an order of their own."""
    arrays = jax.device_get(batch)
    order = np.lexsort((arrays["call"], arrays["tokens"][:, 0].sum(1), arrays["state"][:, 0, 0, 0, 0]))
    return {name: array[order] for name, array in arrays.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def gradient(run, batch):
    found = jax.jit(mean_gradient, static_argnums=1)(run.params, run.task, run.reference, batch, run.key)
    return jax.device_get(found)


def test_a_batch_is_every_step_of_its_images_with_the_advantage_of_each(shallow_model):
    run, seen = OnlineRun(shallow_model), []

    def score(images, prompts):
        seen.append(brightness(images, prompts))
        return seen[-1]

    stream = run.open(TrajectoryStream, score)
    assert stream.at_round_end
    batch = jax.device_get(stream.next(run.params))
    assert stream.at_round_end
    assert batch.keys() == run.loss.input_shapes(run.pipe, 1, run.pipe.image_size).keys()
    calls = batch["call"].reshape(8, STEPS)
    assert np.all(np.sort(calls, axis=1) == np.arange(STEPS))
    assert len(np.unique(calls, axis=0)) > 1
    states, following = (batch[name].reshape(8, STEPS, -1) for name in ("state", "next_state"))
    for image, order in enumerate(calls):
        for step in range(STEPS - 1):
            (before,), (after,) = np.where(order == step), np.where(order == step + 1)
            np.testing.assert_array_equal(following[image, before], states[image, after])
    expected = group_advantages(np.float32(seen[0]), 2).values
    np.testing.assert_array_equal(batch["advantage"].reshape(8, STEPS), np.tile(expected[:, None], STEPS))
    assert np.all(batch["weight"] == 1)
    assert np.all(batch["first"])
    assert stream.metrics()["reward"] == pytest.approx(seen[0].mean())


def test_images_without_a_reward_are_left_out_and_counted(shallow_model):
    run = OnlineRun(shallow_model, {"advantages.of": "round"})

    def score(images, prompts):
        return np.where(np.arange(8) < 3, np.nan, brightness(images, prompts))

    stream = run.open(TrajectoryStream, score)
    batch = jax.device_get(stream.next(run.params))
    weight = batch["weight"].reshape(8, STEPS)
    np.testing.assert_allclose(weight, np.repeat(np.where(np.arange(8) < 3, 0, 8 / 5)[:, None], STEPS, 1))
    assert batch["advantage"].reshape(8, STEPS)[3:].sum() == pytest.approx(0, abs=1e-5)
    assert stream.metrics()["unusable_images"] == 3
    stream = run.open(TrajectoryStream, lambda images, prompts: np.where(np.arange(8) < 5, np.nan, 1))
    with pytest.raises(UserError, match=r"5 of 8 images have no reward, 0 of them.*config\.rewards\.train"):
        stream.next(run.params)


@pytest.fixture(scope="module")
def on_one_device(shallow_model):
    run = OnlineRun(shallow_model, {"advantages.of": "prompt", "advantages.min_count": 2})
    stream = run.open(TrajectoryStream)
    batch = stream.next(run.params)
    return stream.metrics(), rows(batch), gradient(run, batch)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("sizes", "accumulation", "chunk"),
    [
        slow({"data": 1}, 4, 8),
        slow({"data": 2}, 1, 4),
        slow({"data": 8}, 3, 8),
        ({"data": 2, "fsdp": 4}, 1, 8),
    ],
    ids=str,
)
def test_every_split_gives_the_same_update(shallow_model, on_one_device, sizes, accumulation, chunk):
    changes = {"advantages.of": "prompt", "advantages.min_count": 2, "stream.batch_size": chunk}
    run = OnlineRun(shallow_model, changes, sizes, accumulation=accumulation)
    stream = run.open(TrajectoryStream)
    batch = stream.next(run.params)
    metrics, expected, ((loss, _), slope) = on_one_device
    assert stream.metrics() == pytest.approx(metrics, abs=3e-4)
    found = rows(batch)
    assert np.array_equal(found["call"], expected["call"])
    np.testing.assert_allclose(found["state"], expected["state"], rtol=1e-4, atol=5e-5)
    # One of the 768 numbers of 8 bits that is rounded the other way moves an image's reward by 5e-6, and its
    # advantage by that over the deviation of its prompt's rewards, 1e-3 and more. On 8 devices none was: the
    # states differed by 6e-6, numbers of the gradient by 3e-6 of its norm.
    moved_by = float(np.abs(found["advantage"] - expected["advantage"]).max())
    assert moved_by <= 1e-2
    (own_loss, own_metrics), own_slope = gradient(run, batch)
    assert own_metrics["ratio"] == pytest.approx(1, abs=1e-6)
    assert own_loss == pytest.approx(loss, abs=1e-5 + moved_by)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(slope)))
    for one, other in zip(jax.tree.leaves(own_slope), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(one, other, atol=(2e-5 + moved_by) * norm)


@pytest.mark.ci
@pytest.mark.parametrize(("compute_dtype", "noise"), [("float32", 1e-5), slow("bfloat16", 0.2)])
def test_later_updates_of_a_round_have_the_log_probabilities_of_its_start(
    shallow_model, compute_dtype, noise
):
    changes = {
        "stream.updates": 2,
        "stream.batch_size": 16,
        "policy_gradient.name": "ddpo",
        "compute_dtype": compute_dtype,
    }
    run = OnlineRun(shallow_model, changes, accumulation=2)
    stream = run.open(TrajectoryStream)
    first = stream.next(run.params)
    assert not stream.at_round_end
    assert np.all(jax.device_get(first["first"]))
    second = stream.next(moved(run.params))
    assert stream.at_round_end
    # Rounded to bfloat16 the states of late steps would be clipped before the first update.
    assert second["state"].dtype == second["old_log_probability"].dtype == np.float32
    assert not np.any(jax.device_get(second["first"]))
    assert gradient(run, second)[0][1]["ratio"] == pytest.approx(1, abs=1e-6)
    # By the noise that was drawn, log p differs by rounding alone: in bfloat16 by 2e-6 where the CPU
    # multiplies in it and both programs round alike, and by 0.08 where XLA leaves other casts out of each.
    assert 0 < stream.metrics()["ratio_noise"] < noise


def test_the_noise_of_the_ratio_is_measured_and_said_once(shallow_model, caplog):
    """The first round of a run with one update: one step is 0.3 nats a number less probable."""
    run = OnlineRun(shallow_model, {"policy_gradient.name": "ddpo", "policy_gradient.clip": 0.1})
    stream = run.open(TrajectoryStream)
    evaluate, size = stream._evaluate, 4 * np.prod(run.size)

    def spoil(*arguments):
        policy, reference = evaluate(*arguments)
        return policy.at[5, 0].add(-0.3 * size), reference

    stream._evaluate = spoil
    with caplog.at_level("INFO", "absl"):
        stream.next(run.params)
    assert stream.metrics()["ratio_noise"] == pytest.approx(1 - np.exp(-0.3), rel=1e-4)
    usual = (1 - np.exp(-0.3)) / np.sqrt(8 * STEPS)
    assert f"off 1 by 0.26 at most and {usual:.2g} in the root mean square; the clip is 0.1" in caplog.text
    assert "more than half of config.policy_gradient.clip = 0.1" in caplog.text
    caplog.clear()
    stream.next(run.params)
    assert "ratio_noise" not in stream.metrics()
    assert "ratio noise" not in caplog.text


@pytest.mark.ci
def test_a_run_resumed_inside_a_round_replays_it_bit_for_bit(shallow_model):
    changes = {
        "stream.updates": 2,
        "advantages.of": "prompt",
        "advantages.min_count": 2,
        "policy_gradient.name": "dpok",
        "policy_gradient.kl": "kl_in_reward",
    }
    run = OnlineRun(shallow_model, changes)
    other = moved(run.params)
    stream = run.open(TrajectoryStream)
    for _ in range(2):
        stream.next(run.params)
    state = stream.get_state()
    assert json.loads(state).items() >= {"round": 1, "prompts": 8, "images": 16}.items()
    expected = [jax.device_get(stream.next(other))]
    assert stream.get_state() == state
    expected.append(jax.device_get(stream.next(run.params)))
    behind, metrics = stream.get_state(), stream.metrics()
    assert behind != state
    assert metrics["reward_penalty"] != 0

    resumed = run.open(TrajectoryStream)
    resumed.set_state(state)
    for params, batch in zip((other, run.params), expected, strict=True):
        assert_equal(jax.device_get(resumed.next(params)), batch)
    assert (resumed.get_state(), resumed.metrics()) == (behind, metrics)


def test_pairs_of_d3po_share_prompt_and_start_and_are_labelled_by_reward(shallow_model):
    run = OnlineRun(shallow_model, {"policy_gradient.name": "d3po", "stream.images": 4})
    seen = []

    def score(images, prompts):
        seen.append(brightness(images, prompts))
        return seen[-1]

    stream = run.open(TrajectoryStream, score)
    batch = jax.device_get(stream.next(run.params))
    assert batch["state"].shape[:2] == (4 * STEPS, 2)
    assert stream.metrics()["ratio_noise"] < 1e-5
    start = batch["call"] == 0
    np.testing.assert_array_equal(batch["state"][start, 0], batch["state"][start, 1])
    assert not np.any(batch["next_state"][:, 0] == batch["next_state"][:, 1])
    better = np.sign(seen[0][::2] - seen[0][1::2])
    np.testing.assert_array_equal(batch["advantage"], np.repeat(better, STEPS))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stream.eta": 0.0}, r"config\.stream\.eta = 0: .*above 0"),
        (
            {"policy_gradient.name": "ddpo_sf", "stream.updates": 2},
            r"config\.stream\.updates = 2: .*'ddpo_sf'.*set it to 1",
        ),
        ({"stream.images": 1}, r"config\.stream\.images = 1: .*at least 2"),
        (
            {"policy_gradient.name": "d3po", "stream.images": 3},
            r"config\.stream\.images = 3: .*must be even",
        ),
        ({"advantages.of": "prompt", "steps": 1}, r"config\.advantages\.min_count = 16: "),
    ],
    ids=str,
)
def test_settings_with_which_a_policy_gradient_is_wrong_are_refused(shallow_model, changes, expected):
    run = OnlineRun(shallow_model, changes)
    with pytest.raises(UserError, match=expected):
        run.open(TrajectoryStream)


def test_updates_that_mesh_or_accumulation_do_not_split_are_refused(shallow_model):
    run = OnlineRun(shallow_model, {"policy_gradient.name": "d3po"}, {"data": 8})
    with pytest.raises(UserError, match=r"config\.batch_size = 8: not a multiple of 16"):
        run.open(TrajectoryStream)
    run = OnlineRun(shallow_model, {}, {"data": 2}, accumulation=5)
    with pytest.raises(UserError, match=r"config\.accumulation = 5: .*one of \[1, 2, 3, 4, 6, 12\]"):
        run.open(TrajectoryStream)


def test_a_round_without_a_pair_of_two_rewards_is_refused(shallow_model):
    run = OnlineRun(shallow_model, {"policy_gradient.name": "d3po"})
    halves = run.open(TrajectoryStream, lambda images, prompts: np.resize([np.nan, 1.0], len(images)))
    with pytest.raises(
        UserError, match=r"^round 0: config\.rewards\.train gives a reward to both images of no"
    ):
        halves.next(run.params)


@pytest.mark.ci
def test_a_round_in_which_no_image_is_better_is_told_once(shallow_model, caplog):
    run = OnlineRun(shallow_model)
    stream = run.open(TrajectoryStream, lambda images, prompts: np.ones(len(images)))
    for _ in range(2):
        stream.next(run.params)
    said = [record.message for record in caplog.records if "no image has a higher reward" in record.message]
    assert len(said) == 1
    assert said[0].startswith("round 0: ")
