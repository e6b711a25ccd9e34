"""Win rates by hand, intervals by simulation, rejection sampling by going through every subset."""

import itertools
import math

import numpy as np
import pytest
from tables import each_row

from dspo_jax.evaluation.win_rates import Estimate, compare, reject


def test_several_seeds_by_hand():
    base = np.array([[1.0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    model = np.array([[2.0, 2, 0], [2, 1, 1], [0, 1, 2], [0, 0, 2]])
    # By seed: 2 wins and 2 losses; 1 win, 2 ties, 1 loss; 2 wins, 1 tie, 1 loss.
    found = compare(model, base)
    assert found.per_seed == (0.5, 0.5, 0.625)
    assert found.share.value == pytest.approx(np.mean(found.per_seed))
    assert (found.images_won, found.images_tied, found.images_lost) == (5, 3, 4)
    # The first prompt is won 2 to 1, the second 1 to 0, the third is 1 to 1, the fourth lost 1 to 2.
    assert (found.won, found.lost, found.tied) == (2, 1, 1)
    assert found.p_value == 1.0
    assert found.mean_reward.value == pytest.approx(13 / 12)
    assert (found.base_mean_reward.value, found.base_mean_reward.low, found.base_mean_reward.high) == (
        1,
        1,
        1,
    )
    assert found.share.low < found.share.value < found.share.high


def test_ties_alone_are_half_and_no_evidence():
    scores = np.ones((7, 2))
    found = compare(scores, scores)
    assert found.share == Estimate(0.5, 0.5, 0.5)
    assert (found.won, found.lost, found.tied, found.p_value) == (0, 0, 7, 1.0)


def test_one_prompt_has_an_interval_of_one_point():
    found = compare(np.array([[3.0, 1.0]]), np.array([[2.0, 1.0]]))
    assert found.share == Estimate(0.75, 0.75, 0.75)
    assert (found.won, found.p_value) == (1, 1.0)


def test_the_sign_test_is_exact():
    model = np.array([1.0] * 14 + [-1.0] * 4 + [0.0] * 3)[:, None]
    found = compare(model, np.zeros((21, 1)))
    assert (found.won, found.lost, found.tied) == (14, 4, 3)
    assert found.p_value == pytest.approx(2 * sum(math.comb(18, i) for i in range(5)) / 2**18)


def test_resamples_keep_the_seeds_of_a_prompt_together():
    """Scores that are the same for every seed are worth no more than those of one seed."""
    draw = np.random.default_rng(0)
    model, base = draw.standard_normal((2, 50, 1))
    one = compare(model, base)
    several = compare(np.repeat(model, 8, axis=1), np.repeat(base, 8, axis=1))
    assert (several.share.low, several.share.high) == pytest.approx((one.share.low, one.share.high))
    assert several.p_value == one.p_value


def test_the_same_scores_give_the_same_interval_and_another_seed_another():
    model, base = np.random.default_rng(0).standard_normal((2, 40, 3))
    assert compare(model, base) == compare(model, base)
    assert compare(model, base).mean_reward.low != compare(model, base, seed=1).mean_reward.low


def test_the_interval_covers_the_truth_in_95_of_100_experiments():
    """1,000 experiments of 400 prompts; seeds of one prompt are not independent."""
    draw = np.random.default_rng(0)
    truth, covered = 0.6, np.zeros(3)
    for _ in range(1000):
        # Of each prompt a rate of its own: Beta(1.2, 0.8), whose mean is 0.6.
        rates = draw.beta(1.2, 0.8, size=(400, 1))
        wins = (draw.random((400, 2)) < rates).astype(float)
        rewards = wins + 0.5 * draw.standard_normal((400, 1))
        found = compare(rewards, rewards - wins + 0.5, resamples=1000)
        expected = (truth, truth, 0.5)
        for i, estimate in enumerate((found.share, found.mean_reward, found.base_mean_reward)):
            covered[i] += estimate.low <= expected[i] <= estimate.high
    assert np.all(np.abs(covered / 1000 - 0.95) < 0.02), covered


@each_row("draws", [1, 2, 5])
def test_rejection_against_every_subset(draws):
    draw = np.random.default_rng(draws)
    model = draw.integers(0, 4, size=(6, 2)).astype(float)  # whole numbers tie often
    base = draw.integers(0, 4, size=(6, draws)).astype(float)
    pairs = [(m, row) for row_m, row in zip(model, base, strict=True) for m in row_m]

    curve = []
    for n in range(1, draws + 1):
        won = [
            (max(subset) > m) + (max(subset) == m) / 2
            for m, row in pairs
            for subset in itertools.combinations(row, n)
        ]
        curve.append(np.mean(won))
    needed = [
        next((i for i, score in enumerate(order, 1) if score > m), draws)
        for m, row in pairs
        for order in itertools.permutations(row)
    ]

    found = reject(model, base)
    np.testing.assert_allclose(found.win_rate, curve, atol=1e-12)
    assert found.mean_draws == pytest.approx(np.mean(needed))
    assert found.median_draws == np.percentile(needed, 50, method="inverted_cdf")
    assert found.never == pytest.approx(np.mean([max(row) <= m for m, row in pairs]))
    counts = [sum(np.sign(max(row) - m) == sign for m, row in pairs) for sign in (1, 0, -1)]
    assert [found.images_won, found.images_tied, found.images_lost] == counts


def test_rejection_with_a_hundred_draws_by_hand():
    base = np.arange(100.0)[None]
    best = reject(np.array([[99.5]]), base)
    assert (best.never, best.mean_draws, best.median_draws) == (1, 100, 100)
    np.testing.assert_array_equal(best.win_rate, 0)
    # A draw suffices with probability one half, and half of the time the first does.
    assert reject(np.array([[0.5]]), np.arange(2.0)[None]).median_draws == 1
    # 10 of 100 are higher: of n draws none is with probability C(90, n) / C(100, n).
    found = reject(np.array([[89.5]]), base)
    none = [math.comb(90, n) / math.comb(100, n) for n in range(101)]
    np.testing.assert_allclose(found.win_rate, 1 - np.array(none[1:]), atol=1e-12)
    assert found.mean_draws == pytest.approx(101 / 11)
    assert found.median_draws == next(n for n in range(101) if none[n] <= 0.5)
    assert found.never == 0


GOOD, BROKEN = np.zeros((2, 3)), np.array([[0, 0, 0], [0, np.nan, 0]])


@each_row(
    ("function", "model", "base", "message"),
    [
        (compare, BROKEN, GOOD, "scores of the model: NaN for prompt 1, image 1"),
        (compare, GOOD, BROKEN, "scores of the base: NaN for prompt 1, image 1"),
        (reject, GOOD, BROKEN, "scores of the base: NaN for prompt 1, image 1"),
        (compare, GOOD, GOOD[:1], r"of shape \(2, 3\) against \(1, 3\): must be of the same images"),
        (compare, GOOD, GOOD[:, :2], r"of shape \(2, 3\) against \(2, 2\)"),
        (reject, GOOD, GOOD[:1], "scores of 2 prompts against 1"),
        (compare, GOOD[:0], GOOD[:0], r"the model: of shape \(0, 3\); must be \[prompts, images\] of some"),
        (compare, GOOD[0], GOOD[0], r"the model: of shape \(3,\); must be"),
    ],
)
def test_what_is_refused(function, model, base, message):
    with pytest.raises(ValueError, match=message):
        function(model, base)
