"""Exact policy gradients: losses integrated over a chain whose expectations have closed forms.

The chain has two steps in one dimension: x_0 ~ N(0, 1), x_{i+1} = a_i x_i + c_i e_i(x_i) + s_i z_i with
e_i = w x_i + u t_i + b linear, and the reward -(x_2 - 1)^2. Expectations over (x_0, z_0, z_1) are sums over
Gauss-Hermite nodes, exact for the polynomials here; E r and the divergence of paths have closed forms too.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.objectives.policy_gradient import get_policy_gradient
from dspo_jax.objectives.steps import Steps

A, C, S, T = (0.8, 0.9), (-0.7, 0.4), (0.5, 0.3), (1.0, 0.2)  # of the two steps
PARAMS = {"w": 0.4, "u": -0.3, "b": 0.2}
REFERENCE = {"w": 0.1, "u": 0.1, "b": -0.1}
BETA = 0.3
UNLIMITED = {"advantage_clip": 1e9}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def predict(params, i, x):
    return params["w"] * x + params["u"] * T[i] + params["b"]


def mean_of(params, i, x):
    return A[i] * x + C[i] * predict(params, i, x)


def log_density(params, i, x, reached):
    z = (reached - mean_of(params, i, x)) / S[i]
    return -0.5 * z**2 - math.log(S[i]) - 0.5 * math.log(2 * math.pi)


def quadrature():
    """Nodes (x_0, z_0, z_1) of a standard normal, [3, 12 ** 3], and their weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    grid = np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij")).reshape(3, -1)
    products = np.prod(np.meshgrid(weights, weights, weights, indexing="ij"), axis=0).ravel()
    return grid, products / products.sum()


def roll_out(params):
    """States [3, N] of every node, rewards [N], weights [N]."""
    (x, *noise), weights = quadrature()
    states = [x]
    for i in range(2):
        states.append(mean_of(params, i, states[-1]) + S[i] * noise[i])
    return states, -((states[2] - 1) ** 2), weights


def moments(params, held=False):
    """Mean and variance of x_0, x_1 and x_2; `held` takes those of the states as data."""
    mean, variance, result = 0.0, 1.0, [(0.0, 1.0)]
    for i in range(2):
        slope, offset = A[i] + C[i] * params["w"], C[i] * (params["u"] * T[i] + params["b"])
        mean, variance = slope * mean + offset, slope**2 * variance + S[i] ** 2
        result.append((mean, variance))
    return jax.lax.stop_gradient(result) if held else result


def expected_reward(params):
    mean, variance = moments(params)[2]
    return -((mean - 1) ** 2 + variance)


def expected_penalty(params, weight_of, held):
    """E sum_i weight_i (e_i - r_i)^2 over the states of the policy."""
    slope = params["w"] - REFERENCE["w"]
    total = 0.0
    for i, (mean, variance) in enumerate(moments(params, held)[:2]):
        offset = (params["u"] - REFERENCE["u"]) * T[i] + params["b"] - REFERENCE["b"]
        total += weight_of(i) * ((slope * mean + offset) ** 2 + slope**2 * variance)
    return total


def kl_weight(i):
    return C[i] ** 2 / (2 * S[i] ** 2)


def total_loss(name, params, baseline=0.0, **arguments):
    """The loss summed over the steps of a path and integrated over all paths, as a function of parameters."""
    method = get_policy_gradient(name, reduction="sum", **arguments)
    states, rewards, weights = roll_out(PARAMS)
    rows = [log_density(PARAMS, i, states[i], states[i + 1]) for i in range(2)]
    if method.penalises_reward:
        frozen = [log_density(REFERENCE, i, states[i], states[i + 1]) for i in range(2)]
        rewards = rewards - method.reward_penalty(jnp.stack(rows, 1), jnp.stack(frozen, 1))
    total = 0.0
    for i in range(2):
        error = predict(params, i, states[i]) - predict(REFERENCE, i, states[i])
        steps = Steps(
            log_probability=log_density(params, i, states[i], states[i + 1])[:, None],
            old_log_probability=jnp.asarray(rows[i])[:, None],
            kl=(kl_weight(i) * error**2)[:, None],
            prediction_error=(error**2)[:, None],
            advantage=jnp.asarray(rewards - baseline),
            size=1,
        )
        total += jnp.sum(weights * method(steps)[0])
    return total


def assert_same(gradient, expected, scale=1.0):
    for name in PARAMS:
        np.testing.assert_allclose(gradient[name], scale * expected[name], rtol=1e-12, atol=1e-13)


def params64():
    return jax.tree.map(jnp.float64, PARAMS)


@each_row("baseline", [0.0, -3.7])
@each_row(
    ("name", "arguments", "scale"),
    [
        ("ddpo", UNLIMITED, 1.0),
        ("ddpo_sf", UNLIMITED, 1.0),
        ("grpo", UNLIMITED | {"beta": 0.0}, 1.0),
        ("dpok", {"alpha": 2.5, "beta": 0.0}, 2.5),
    ],
)
def test_the_policy_gradient_is_exact(name, arguments, scale, baseline):
    """The gradient of the loss at the policy that drew the paths is that of E r, whatever the baseline."""
    gradient = jax.grad(lambda params: total_loss(name, params, baseline, **arguments))(params64())
    assert_same(gradient, jax.grad(expected_reward)(params64()), -scale)


@each_row("name", ["grpo", "dpok"])
def test_kl_in_the_reward_is_the_gradient_of_the_penalised_reward(name):
    arguments = UNLIMITED if name == "grpo" else {"alpha": 1.0}
    gradient = jax.grad(lambda params: total_loss(name, params, beta=BETA, kl="kl_in_reward", **arguments))(
        params64()
    )

    def objective(params):
        return expected_reward(params) - BETA * expected_penalty(params, kl_weight, held=False)

    assert_same(gradient, jax.grad(objective)(params64()), -1.0)


@each_row(("kl", "weight"), [("kl_loss", kl_weight), ("prediction", lambda i: 1.0)])
@each_row("name", ["grpo", "dpok"])
def test_kl_in_the_loss_takes_the_visited_states_as_given(name, kl, weight):
    """It lacks the gradient of the divergence through the states, and DPOK's is weighted otherwise."""
    arguments = UNLIMITED if name == "grpo" else {"alpha": 1.0}
    gradient = jax.grad(lambda params: total_loss(name, params, beta=BETA, kl=kl, **arguments))(params64())

    def objective(params, weight, held):
        return expected_reward(params) - BETA * expected_penalty(params, weight, held)

    assert_same(gradient, jax.grad(objective)(params64(), weight, True), -1.0)
    exact = jax.grad(objective)(params64(), kl_weight, False)
    assert max(abs(gradient[key] / exact[key] + 1) for key in PARAMS) > 1e-2
