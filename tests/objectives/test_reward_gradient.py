"""Methods of reward gradients: which steps pass a gradient, against the releases' draws, and their losses."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.objectives.reward_gradient import REWARD_GRADIENTS, get_reward_gradient

CALLS, DRAWS = 50, 20_000
KEY = jax.random.key(0)


def draw_steps(name, calls=CALLS, **arguments):
    """Which steps pass a gradient in each of many updates, [DRAWS, n] bool."""
    method = get_reward_gradient(name, **arguments)
    return np.asarray(jax.vmap(lambda key: method.attached(calls, key))(jax.random.split(KEY, DRAWS)))


def assert_probable(drawn, probability):
    """Within five standard deviations of the mean of as many draws."""
    deviation = np.sqrt(probability * (1 - probability) / len(drawn))
    assert (np.abs(drawn.mean(0) - probability) <= 5 * deviation).all()


@each_row(("name", "k"), [("draft_k", 1), ("draft_k", 7), ("draft_lv", 3), ("draft_plus", 50)])
def test_the_last_k_steps(name, k):
    method = get_reward_gradient(name, k=float(k))
    np.testing.assert_array_equal(np.flatnonzero(method.attached(CALLS, KEY)), np.arange(CALLS - k, CALLS))
    assert method.mean_attached(CALLS) == k


def test_draft_is_all_steps():
    method = get_reward_gradient("draft")
    assert method.attached(CALLS, KEY).all()
    assert method.mean_attached(CALLS) == CALLS


def test_alignprop_once_is_a_tail_of_uniform_length():
    """As printed: one K an update. Steps without a gradient come first, those with one are contiguous."""
    attached = draw_steps("alignprop", draw="once")
    lengths = attached.sum(1)
    assert (attached == (np.arange(CALLS) >= CALLS - lengths[:, None])).all()
    assert_probable(lengths[:, None] == np.arange(1, CALLS + 1), np.full(CALLS, 1 / CALLS))
    assert lengths.min() == 1
    assert lengths.mean() == pytest.approx(25.5, abs=5 * lengths.std() / DRAWS**0.5)


def release_of_2023(draw):
    """mihirp1998/AlignProp before October 2024, and TRL: step i is detached if i < random.randint(0, 50)."""
    return [not step < draw.randint(0, CALLS) for step in range(CALLS)]


def test_alignprop_each_step_is_drawn_as_by_the_first_release():
    attached, draw = draw_steps("alignprop", draw="each_step"), random.Random(0)
    theirs = np.array([release_of_2023(draw) for _ in range(DRAWS)])
    probability = (np.arange(CALLS) + 1) / (CALLS + 1)
    for drawn in (attached, theirs):
        assert_probable(drawn, probability)
        assert drawn.sum(1).mean() == pytest.approx(25, abs=5 * drawn.sum(1).std() / DRAWS**0.5)
        # Steps are drawn by themselves, so that nearly every update has gaps.
        gaps = (drawn[:, :-1] & ~drawn[:, 1:]).any(1)
        assert gaps.mean() > 0.999
        pairs = drawn[:, 20] & drawn[:, 40]
        assert_probable(pairs[:, None], probability[20:21] * probability[40])
    assert attached.sum(1).std() == pytest.approx(theirs.sum(1).std(), rel=0.05)


def test_refl_is_one_of_the_last_ten_of_forty_steps():
    """THUDM/ImageReward, ReFL.py: random.randint(30, 39), both included."""
    attached = draw_steps("refl", calls=40)
    assert (attached.sum(1) == 1).all()
    probability = np.where(np.arange(40) < 30, 0.0, 0.1)
    assert_probable(attached, probability)


@each_row(
    ("name", "calls"),
    [("alignprop", 50), ("alignprop", 7), ("refl", 40), ("refl", 3)],
)
def test_the_mean_number_of_steps_is_told(name, calls):
    for arguments in [{"draw": draw} for draw in ("once", "each_step")] if name == "alignprop" else [{}]:
        counts = draw_steps(name, calls, **arguments).sum(1)
        told = get_reward_gradient(name, **arguments).mean_attached(calls)
        assert told == pytest.approx(counts.mean(), abs=5 * counts.std() / DRAWS**0.5)


@each_row("name", REWARD_GRADIENTS)
def test_losses_and_their_slopes(name):
    """-r, and for ReFL 1e-3 max(0, 2 - r), whose slope is 0 above 2; by central differences."""
    rewards = np.array([-3.0, 0.0, 1.9, 2.1, 7.0])

    def formula(rewards):
        return 1e-3 * np.where(rewards < 2, 2 - rewards, 0) if name == "refl" else -rewards

    with jax.enable_x64(True):
        method = get_reward_gradient(name)
        loss, pull = jax.vjp(method.loss, jnp.asarray(rewards))
        np.testing.assert_allclose(loss, formula(rewards), rtol=1e-12, atol=1e-15)
        slopes = (formula(rewards + 1e-5) - formula(rewards - 1e-5)) / 2e-5
        np.testing.assert_allclose(pull(jnp.ones(5))[0], slopes, rtol=1e-6, atol=1e-12)
