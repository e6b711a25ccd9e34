"""DSPO's Theorem 1 on a Gaussian chain, where both of its sides are computed exactly.

Reverse process: x_T ~ N(0, 1), x_t | x_{t+1} ~ N(mu_t(x_{t+1}), s_t^2) with mu_t linear, for the policy and
for the reference. The reward r_t(x) = k_t x is linear too, so that the Taylor expansion in Eq. 37 is exact
and p*(x_t | x_{t+1}), proportional to p_ref exp(r / lambda), is Gaussian. docs/objectives.md says what
follows.
"""

import numpy as np
import pytest

LAMBDA = 0.7
REFERENCE = {1: [(0.8, 0.1)], 3: [(0.8, 0.1), (0.9, -0.2), (0.7, 0.3)]}  # (slope, offset) of mu_t, t from 0
POLICY = {1: [(0.6, 0.4)], 3: [(0.6, 0.4), (1.1, 0.1), (0.8, -0.1)]}
DEVIATIONS, REWARDS = (0.5, 0.7, 0.9), (0.3, -0.6, 0.5)


def moments(policy):
    """Mean and variance of x_{t+1} under the policy, for t = 0 ... T - 1."""
    mean, variance, result = 0.0, 1.0, []
    for (slope, offset), deviation in reversed(list(zip(policy, DEVIATIONS[: len(policy)], strict=True))):
        result.append((mean, variance))
        mean, variance = slope * mean + offset, slope**2 * variance + deviation**2
    return result[::-1]


def expected_square(slope, offset, mean, variance):
    """E (slope x + offset)^2."""
    return (slope * mean + offset) ** 2 + slope**2 * variance


def expected_reward(policy, of_states):
    """Sum of E r(x_t)."""
    return sum(
        k * (slope * mean + offset)
        for (slope, offset), k, (mean, _) in zip(policy, REWARDS, of_states, strict=False)
    )


def divergence(policy, of_states, towards_reward):
    """Sum of E KL(p_theta(x_t | x_{t+1}) || p_ref), or to p* of Eq. 37, its mean moved by s^2 k / lambda."""
    total = 0.0
    steps = zip(policy, REFERENCE[len(policy)], DEVIATIONS, REWARDS, of_states, strict=False)
    for (slope, offset), (ref_slope, ref_offset), s, k, (mean, variance) in steps:
        shift = s**2 * k / LAMBDA if towards_reward else 0.0
        difference = (slope - ref_slope, offset - ref_offset - shift)
        total += expected_square(*difference, mean, variance) / (2 * s**2)
    return total


def rlhf(policy, of_states=None):
    """Eq. 5; with `of_states` the states are drawn from elsewhere, and every step counts for itself."""
    of_states = moments(policy) if of_states is None else of_states
    return expected_reward(policy, of_states) - LAMBDA * divergence(policy, of_states, towards_reward=False)


def dspo(policy, omega, gamma, score, of_states=None):
    """Sum of E omega |score (mu - mu_ref) / s^2 - gamma k|^2 (Eq. 24 with p_ref for p_data, as in Eq. 40)."""
    of_states = moments(policy) if of_states is None else of_states
    total = 0.0
    steps = zip(policy, REFERENCE[len(policy)], DEVIATIONS, REWARDS, of_states, strict=False)
    for (slope, offset), (ref_slope, ref_offset), s, k, (mean, variance) in steps:
        a = score / s**2
        difference = (a * (slope - ref_slope), a * (offset - ref_offset) - gamma * k)
        total += omega(s) * expected_square(*difference, mean, variance)
    return total


def gradient(function, policy):
    """By central differences."""
    theta = np.array(policy)
    result = np.zeros_like(theta)
    for index in np.ndindex(theta.shape):
        step = np.zeros_like(theta)
        step[index] = 1e-5
        result[index] = (function((theta + step).tolist()) - function((theta - step).tolist())) / 2e-5
    return result.ravel()


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def corrected(policy, of_states=None):
    return dspo(policy, lambda s: LAMBDA * s**2 / 2, 1 / LAMBDA, score=1.0, of_states=of_states)


def test_one_step_with_the_constants_corrected():
    np.testing.assert_allclose(gradient(rlhf, POLICY[1]), -gradient(corrected, POLICY[1]), rtol=1e-6)


def test_one_step_with_the_constants_as_printed():
    """omega = 2 s^2 / lambda and gamma = 1 / (2 lambda) are right up to lambda^2, with Eq. 26's stray 1/2."""

    def printed(policy, score=0.5):
        return dspo(policy, lambda s: 2 * s**2 / LAMBDA, 1 / (2 * LAMBDA), score)

    ours = -gradient(printed, POLICY[1])
    np.testing.assert_allclose(gradient(rlhf, POLICY[1]), LAMBDA**2 * ours, rtol=1e-6)
    # With the gradient of the Gaussian as it is, they are not even the same direction.
    assert cosine(gradient(rlhf, POLICY[1]), -gradient(lambda p: printed(p, 1.0), POLICY[1])) < 0.999


def test_several_steps_are_not_the_theorem():
    """Eq. 33 drops the normalisers of p*(x_t | x_{t+1}), which depend on x_{t+1} and so on the policy."""

    def log_normalisers(policy):
        steps = zip(REFERENCE[3], DEVIATIONS, REWARDS, moments(policy), strict=True)
        return sum(
            k * (slope * mean + offset) / LAMBDA + s**2 * k**2 / (2 * LAMBDA**2)
            for (slope, offset), s, k, (mean, _) in steps
        )

    def complete(policy):
        return LAMBDA * (log_normalisers(policy) - divergence(policy, moments(policy), towards_reward=True))

    assert rlhf(POLICY[3]) == pytest.approx(complete(POLICY[3]), rel=1e-12)
    theirs, ours = gradient(rlhf, POLICY[3]), -gradient(corrected, POLICY[3])
    assert cosine(theirs, ours) < 0.99
    np.testing.assert_allclose(theirs - ours, LAMBDA * gradient(log_normalisers, POLICY[3]), atol=1e-7)


def test_several_steps_with_the_states_held_are():
    """Without the gradient through the distribution of x_{t+1}: as when the states come from data."""
    states = moments(POLICY[3])
    theirs = gradient(lambda policy: rlhf(policy, states), POLICY[3])
    ours = -gradient(lambda policy: corrected(policy, states), POLICY[3])
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)
