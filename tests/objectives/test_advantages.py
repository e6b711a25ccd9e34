"""Advantages against the statistics module, a slow tracker, and what must hold of them."""

import json
import statistics

import numpy as np
import pytest
from scipy.special import softmax
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.objectives.advantages import (
    PromptStatistics,
    batch_advantages,
    group_advantages,
    pair_preferences,
    rounds_to_fill,
    softmax_weights,
)

NAN = float("nan")


def standardise(reward, over, epsilon):
    return (reward - statistics.fmean(over)) / (statistics.pstdev(over) + epsilon)


def slow_tracker(rounds, buffer_size, min_count):
    """The advantages of each round, as kvablack/ddpo-pytorch defines them, with lists."""
    history, result = {}, []
    for prompts, rewards in rounds:
        scored = [reward for reward in rewards if reward == reward]
        for prompt, reward in zip(prompts, rewards, strict=True):
            if reward == reward:
                history[prompt] = [*history.get(prompt, []), reward]
        advantages = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            known = history.get(prompt, [])[-buffer_size:]
            over = known if len(known) >= min_count else scored
            advantages.append(standardise(reward, over, 1e-6) if reward == reward else 0.0)
        result.append(advantages)
    return result


def draw_rounds(number, images=12, missing=True):
    """Rounds of prompts of uneven frequency and level; a prompt may fill its buffer within a round."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        prompts = [
            str(prompt) for prompt in rng.choice(["a cat", "a dog", "a hat"], images, p=[0.6, 0.3, 0.1])
        ]
        level = {"a cat": 20.0, "a dog": -3.0, "a hat": 0.5}
        rewards = [level[prompt] + float(rng.normal()) for prompt in prompts]
        if missing:
            rewards[int(rng.integers(images))] = NAN
        yield prompts, rewards


@each_row(("buffer_size", "min_count"), [(6, 4), (4, 4), (100, 20), (100, 1000)])
def test_the_tracker_is_the_slow_one(buffer_size, min_count):
    """Through the warm-up, with buffers that overflow, and with images that have no reward."""
    tracker, rounds = PromptStatistics(max(buffer_size, min_count), min_count), list(draw_rounds(8))
    expected = slow_tracker(rounds, max(buffer_size, min_count), min_count)
    for (prompts, rewards), wanted in zip(rounds, expected, strict=True):
        advantages = tracker.update(prompts, np.array(rewards))
        np.testing.assert_allclose(advantages.values, wanted, rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(advantages.mask, np.isfinite(rewards))


def test_a_prompt_has_its_own_statistics_from_min_count_on():
    """Before that, a prompt of high reward is preferred whatever its images are like."""
    tracker = PromptStatistics(buffer_size=4, min_count=4)
    prompts, rewards = ["good", "good", "bad", "bad"], np.array([10.0, 11.0, 0.0, 1.0])
    first, second = tracker.update(prompts, rewards), tracker.update(prompts, rewards)
    np.testing.assert_array_equal(np.sign(first.values), [1, 1, -1, -1])
    np.testing.assert_allclose(second.values, [-1, 1, -1, 1], rtol=1e-5)


def test_a_restored_tracker_goes_on_as_if_never_stopped():
    rounds = list(draw_rounds(6))
    whole, before, after = (PromptStatistics(5, 3) for _ in range(3))
    for prompts, rewards in rounds[:3]:
        whole.update(prompts, np.array(rewards))
        before.update(prompts, np.array(rewards))
    after.set_state(json.loads(json.dumps(before.get_state())))
    fresh = PromptStatistics(5, 3)
    differs = False
    for prompts, rewards in rounds[3:]:
        expected = whole.update(prompts, np.array(rewards)).values
        np.testing.assert_array_equal(after.update(prompts, np.array(rewards)).values, expected)
        differs |= not np.array_equal(fresh.update(prompts, np.array(rewards)).values, expected)
    assert differs  # the state matters
    assert after.get_state() == whole.get_state()


def test_a_state_holds_no_more_than_the_buffer():
    tracker = PromptStatistics(buffer_size=2, min_count=2)
    tracker.update(["a"] * 3, np.array([1.0, 2.0, 3.0]))
    assert tracker.get_state() == {"a": [2.0, 3.0]}
    smaller = PromptStatistics(buffer_size=2, min_count=2)
    smaller.set_state({"a": [7.0, 8.0, 9.0]})
    assert smaller.get_state() == {"a": [8.0, 9.0]}


def test_the_order_of_a_round_does_not_matter_while_the_buffer_holds_it():
    prompts, rewards = next(draw_rounds(1, missing=False))
    order = np.random.default_rng(1).permutation(len(prompts))
    given = PromptStatistics(32, 3).update(prompts, np.array(rewards)).values
    shuffled = PromptStatistics(32, 3).update([prompts[i] for i in order], np.array(rewards)[order]).values
    np.testing.assert_allclose(shuffled, given[order], rtol=1e-6)


def test_batch_advantages():
    rewards = [3.0, 1.0, NAN, 8.0, float("inf")]
    advantages = batch_advantages(np.array(rewards))
    expected = [standardise(reward, [3.0, 1.0, 8.0], 1e-8) for reward in (3.0, 1.0, 8.0)]
    np.testing.assert_allclose(advantages.values[[0, 1, 3]], expected, rtol=1e-6)
    np.testing.assert_array_equal(advantages.values[[2, 4]], 0)
    np.testing.assert_array_equal(advantages.mask, [True, True, False, True, False])


def test_statistics_are_float64_inside():
    """Rewards that differ by less than float32 resolves: 2 ** 24 + {0, 1, 2, 3}."""
    advantages = batch_advantages(2.0**24 + np.arange(4.0))
    np.testing.assert_allclose(advantages.values, np.array([-1.5, -0.5, 0.5, 1.5]) / 1.25**0.5, rtol=1e-6)


@each_row("deviation", ["group", "global"])
def test_group_advantages(deviation):
    groups = [[1.0, 2.0, 6.0], [50.0, 52.0, NAN], [0.0, 0.5, 0.1]]
    everything = [reward for group in groups for reward in group if reward == reward]
    advantages = group_advantages(np.array(groups).ravel(), 3, deviation=deviation)
    for group, values in zip(groups, advantages.values.reshape(3, 3), strict=True):
        scored = [reward for reward in group if reward == reward]
        spread = statistics.pstdev(scored if deviation == "group" else everything)
        mean = statistics.fmean(scored)
        expected = [(reward - mean) / (spread + 1e-4) if reward == reward else 0 for reward in group]
        np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_array_equal(advantages.mask.reshape(3, 3), np.isfinite(groups))


@each_row("deviation", ["group", "global"])
@each_row("group", [[0.1, 0.1, 0.1], [7.3, NAN, NAN], [NAN, NAN, NAN]])
def test_a_group_without_spread_gives_zero(group, deviation):
    """Also where the mean of equal numbers is not the number: 0.1 + 0.1 + 0.1 is not 0.3."""
    advantages = group_advantages(np.array([*group, 1.0, 2.0, 3.0]), 3, deviation=deviation)
    np.testing.assert_array_equal(advantages.values[:3], 0)
    assert (advantages.values[3:][[0, 2]] != 0).all()


@each_row("function", [batch_advantages, lambda rewards: PromptStatistics(4, 2).update(["a"] * 4, rewards)])
def test_a_round_without_spread_or_without_rewards_gives_zero(function):
    np.testing.assert_allclose(function(np.full(4, 0.1)).values, 0, atol=1e-8)
    empty = function(np.full(4, NAN))
    np.testing.assert_array_equal(empty.values, 0)
    assert not empty.mask.any()


def test_pair_preferences():
    pairs = pair_preferences(np.array([[2.0, 1.0], [1.0, 2.0], [3.0, 3.0], [NAN, 1.0], [1.0, -np.inf]]))
    np.testing.assert_array_equal(pairs.values, [1, -1, 0, 0, 0])
    np.testing.assert_array_equal(pairs.mask, [True, True, True, False, False])


@each_row(("prompts", "rounds"), [(45, 3), (10_000, 625), (256, 16), (1, 1)])
def test_rounds_until_a_prompt_has_statistics_of_its_own(prompts, rounds):
    assert rounds_to_fill(32, 16, prompts=prompts, images_per_round=256, rounds=rounds) == rounds


@each_row(
    ("call", "message"),
    [
        (
            lambda: rounds_to_fill(32, 16, prompts=10_000, images_per_round=256, rounds=624),
            r"^config\.advantages\.min_count = 16: 10000 prompts .* 625 rounds, the run has 624 .* 16 ",
        ),
        (
            lambda: rounds_to_fill(8, 16, prompts=4, images_per_round=256, rounds=100),
            r"^config\.advantages\.buffer_size = 8: never holds config\.advantages\.min_count = 16",
        ),
        (lambda: PromptStatistics(8, 16), r"^config\.advantages\.buffer_size = 8: never holds"),
        (lambda: PromptStatistics(8, 1), r"^config\.advantages\.min_count = 1: must be at least 2"),
        (lambda: group_advantages(np.zeros(4), 1), r"^config\.stream\.images = 1: .* at least 2"),
        (
            lambda: group_advantages(np.zeros(4), 2, deviation="globl"),
            r"^config\.advantages\.deviation = 'globl': unknown; did you mean 'global'\?",
        ),
    ],
)
def test_statistics_that_cannot_be_are_refused_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_mismatched_lengths_are_refused():
    with pytest.raises(ValueError, match="2 prompts and 3 rewards"):
        PromptStatistics(4, 2).update(["a", "b"], np.zeros(3))
    with pytest.raises(ValueError, match="5 rewards are no whole groups of 2"):
        group_advantages(np.zeros(5), 2)


@each_row("group", [4, 12])
def test_weights_are_a_softmax_over_the_images_that_have_a_reward(group):
    rewards = np.random.default_rng(0).normal(0, 30, 12)
    rewards[[1, 2, 4, 5, 6, 7]] = NAN, NAN, NAN, NAN, np.inf, NAN  # of the second group none is left
    expected, usable = np.zeros(12), [0, 8] if group == 4 else [0]
    for start in usable:
        places = start + np.flatnonzero(np.isfinite(rewards[start : start + group]))
        expected[places] = softmax(0.2 * rewards[places]) * 12 / len(usable)
    weights = softmax_weights(rewards, group, 0.2)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert weights.mean() == pytest.approx(1, rel=1e-12)


def test_equal_rewards_weigh_one_and_large_ones_do_not_overflow():
    np.testing.assert_array_equal(softmax_weights(np.full(4, 7.0), 4, 0.2), np.ones(4))
    np.testing.assert_allclose(softmax_weights(np.array([0.0, 1e5]), 2, 1.0), [0, 2])
