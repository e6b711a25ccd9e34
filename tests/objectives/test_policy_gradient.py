"""Losses of online methods against NumPy in float64 and finite differences, and what must hold of each."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jaxtyping import TypeCheckError
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.objectives.policy_gradient import POLICY_GRADIENTS, get_policy_gradient
from dspo_jax.objectives.steps import Steps, divergence

BETA = 0.3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# Rows whose ratios lie on both sides of a clip of 0.2 and inside it, and no closer than 0.01 to an edge.
LOG_RATIOS = np.array([-0.5, -0.1, 0.02, 0.15, 0.6, -0.5, -0.1, 0.02, 0.15, 0.6])
ADVANTAGES = np.array([1.5, 0.7, 2.0, 0.3, 1.1, -0.9, -1.2, -0.4, -2.2, -0.6])
SIZE = 5


def make_steps(images=1, reduction="sum"):
    """Steps whose reduced log-ratios are `LOG_RATIOS`; those of a second image are other ones."""
    rng = np.random.default_rng(0)
    scale = SIZE if reduction == "mean" else 1
    log_ratio = np.stack([LOG_RATIOS, np.roll(LOG_RATIOS, 3)], 1)[:, :images] * scale
    old = rng.normal(size=log_ratio.shape)
    kl, error = rng.uniform(size=(2, *log_ratio.shape))
    reference = old + rng.normal(size=old.shape) * 0.01
    labels = np.array([1.0, 1.0, 0.0, 1.0, -1.0] * 2)
    arrays = (old + log_ratio, old, reference, kl, error, ADVANTAGES if images == 1 else labels)
    return Steps(**dict(zip(FIELDS, map(jnp.asarray, arrays), strict=True)), size=SIZE)


FIELDS = (
    *("log_probability", "old_log_probability", "reference_log_probability", "kl", "prediction_error"),
    "advantage",
)


def in_numpy(name, steps, reduction, policy, kl, error, held):
    """The loss [B] as a formula of NumPy; `held` is the policy whose ratio `ddpo_sf` divides by."""
    scale = SIZE if reduction == "mean" else 1
    cut = np.clip(steps["advantage"], -2, 2)
    rho = np.exp((policy - steps["old_log_probability"])[:, 0] / scale)
    penalty = {"kl": kl[:, 0] / scale, "prediction": error[:, 0] * SIZE / scale, "none": 0.0}
    name, _, form = name.partition("-")
    if name in ("ddpo", "grpo"):
        bounded = np.where(rho > 1.2, 1.2, np.where(rho < 0.8, 0.8, rho))
        return -np.minimum(cut * rho, cut * bounded) + BETA * penalty[form or "none"]
    if name == "ddpo_sf":
        return -cut * np.exp((policy - held)[:, 0] / scale)
    if name == "dpok":
        bounded = np.minimum(np.maximum(rho, 0.8), 1.2)
        return -3.0 * steps["advantage"] * bounded + BETA * penalty[form or "none"]
    quotient = np.exp((policy - steps["reference_log_probability"]) / scale).clip(0.8, 1.2)
    margin = BETA * np.log(quotient[:, 0] / quotient[:, 1]) * steps["advantage"]
    return -np.log(1 / (1 + np.exp(-margin)))


CASES = {
    "ddpo": {"clip": 0.2, "advantage_clip": 2.0},
    "ddpo_sf": {"advantage_clip": 2.0},
    "grpo-kl": {"clip": 0.2, "advantage_clip": 2.0, "beta": BETA},
    "grpo-prediction": {"clip": 0.2, "advantage_clip": 2.0, "beta": BETA, "kl": "prediction"},
    "grpo-none": {"clip": 0.2, "advantage_clip": 2.0, "beta": BETA, "kl": "kl_in_reward"},
    "dpok-kl": {"clip": 0.2, "alpha": 3.0, "beta": BETA},
    "dpok-prediction": {"clip": 0.2, "alpha": 3.0, "beta": BETA, "kl": "prediction"},
    "d3po": {"clip": 0.2, "beta": BETA},
}


@each_row("reduction", ["mean", "sum"])
@each_row("case", CASES)
def test_value_and_gradient_are_those_of_numpy(case, reduction):
    """Values, and directional derivatives by central differences, in the policy's quantities together."""
    name = case.split("-")[0]
    steps = make_steps(POLICY_GRADIENTS[name].images, reduction)
    method = get_policy_gradient(name, reduction=reduction, **CASES[case])
    arrays = {field: np.asarray(getattr(steps, field)) for field in FIELDS}
    policy = [arrays[field] for field in ("log_probability", "kl", "prediction_error")]

    def numpy_loss(*policy):
        return in_numpy(case, arrays, reduction, *policy, arrays["log_probability"])

    np.testing.assert_allclose(method(steps)[0], numpy_loss(*policy), rtol=1e-12)

    def jax_loss(log_probability, kl, prediction_error):
        fields = {"log_probability": log_probability, "kl": kl, "prediction_error": prediction_error}
        return method(dataclasses.replace(steps, **fields))[0]

    rng = np.random.default_rng(1)
    directions = [rng.normal(size=array.shape) for array in policy]
    _, derivative = jax.jvp(jax_loss, tuple(map(jnp.asarray, policy)), tuple(map(jnp.asarray, directions)))
    ahead, behind = (
        numpy_loss(*(array + sign * 1e-5 * step for array, step in zip(policy, directions, strict=True)))
        for sign in (1, -1)
    )
    np.testing.assert_allclose(derivative, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-9)


def gradient_of(name, steps, **arguments):
    """The gradient of the loss with respect to the log-probabilities, [B, P]."""
    method = get_policy_gradient(name, **arguments)
    return jax.grad(lambda policy: method(dataclasses.replace(steps, log_probability=policy))[0].sum())(
        steps.log_probability
    )


def test_where_the_clip_stops_the_gradient():
    """PPO's on the side that A pushes to, DPOK's on both sides, DDPO_SF's nowhere."""
    steps = make_steps()
    ratio, gain = np.exp(LOG_RATIOS), ADVANTAGES > 0
    high, low = ratio > 1.2, ratio < 0.8
    assert (high & gain).any()
    assert (high & ~gain).any()
    ppo = gradient_of("ddpo", steps, clip=0.2, reduction="sum")[:, 0] == 0
    np.testing.assert_array_equal(ppo, (high & gain) | (low & ~gain))
    dpok = gradient_of("dpok", steps, clip=0.2, beta=0.0, reduction="sum")[:, 0] == 0
    np.testing.assert_array_equal(dpok, high | low)
    assert (gradient_of("ddpo_sf", steps, reduction="sum") != 0).all()
    for name, arguments in (("ddpo", {}), ("dpok", {"beta": 0.0})):
        metrics = get_policy_gradient(name, clip=0.2, reduction="sum", **arguments)(steps)[1]
        np.testing.assert_array_equal(metrics["clipped"], high | low)


@each_row("name", ["ddpo", "grpo", "ddpo_sf"])
def test_advantages_are_cut_off(name):
    """At 5 by default, as in ddpo-pytorch; an advantage of 0, an image left out, has no gradient."""
    steps = dataclasses.replace(make_steps(), advantage=jnp.array([9.0, 5, -9, -5, 0] * 2))
    arguments = {"beta": 0.0} if name == "grpo" else {}
    loss, metrics = get_policy_gradient(name, **arguments)(steps)
    np.testing.assert_array_equal(metrics["advantage"], [5, 5, 5, 5, 0] * 2)
    np.testing.assert_array_equal(loss[4::5], 0)
    np.testing.assert_array_equal(gradient_of(name, steps, **arguments)[4::5], 0)


@each_row("name", ["ddpo", "ddpo_sf", "grpo", "dpok"])
def test_mean_is_the_sum_divided_by_the_size(name):
    """Gradients where rho = 1, the penalty's included: what makes beta the same number with either."""
    steps = make_steps()
    steps = dataclasses.replace(steps, old_log_probability=steps.log_probability)
    arguments = {} if name.startswith("ddpo") else {"beta": BETA}
    methods = [get_policy_gradient(name, reduction=which, **arguments) for which in ("mean", "sum")]
    gradients = [jax.grad(lambda given, method=method: method(given)[0].sum())(steps) for method in methods]
    for field in ("log_probability", "kl"):
        mean, total = (getattr(gradient, field) for gradient in gradients)
        np.testing.assert_allclose(mean * SIZE, total, rtol=1e-14)
        assert field == "kl" or np.abs(total).min() > 0


@each_row("reduction", ["mean", "sum"])
def test_a_penalty_of_the_reward_is_a_sum_with_either_reduction(reduction):
    """So that beta weighs nats against rewards as in "kl_loss", where the reward's term is divided too."""
    paths, reference = np.random.default_rng(3).normal(size=(2, 4, 6)) * 100
    method = get_policy_gradient("grpo", reduction=reduction, beta=BETA, kl="kl_in_reward")
    expected = [BETA * math.fsum([*path, *-other]) for path, other in zip(paths, reference, strict=True)]
    given = method.reward_penalty(jnp.asarray(paths), jnp.asarray(reference))
    np.testing.assert_allclose(given, expected, rtol=1e-12)


def test_a_mean_over_steps_is_one_gradient_of_the_whole():
    """Accumulating in any order and in parts of any size changes nothing."""
    steps = make_steps()
    whole = gradient_of("ddpo", steps, clip=0.2)
    order = np.random.default_rng(2).permutation(len(LOG_RATIOS))
    parts = []
    for rows in np.split(order, [3, 4, 9]):
        part = jax.tree.map(lambda array, rows=rows: array[rows], steps)
        parts.append(gradient_of("ddpo", part, clip=0.2))
    np.testing.assert_allclose(np.concatenate(parts), whole[order], rtol=1e-14)


@each_row("log_ratio", [1e5, -1e5])
@each_row("name", ["ddpo", "ddpo_sf", "grpo", "dpok"])
def test_a_policy_far_from_the_rollout_gives_no_nan(name, log_ratio):
    """Where the gradient is to be zero, it is, though the ratio overflows float32."""
    advantage = jnp.array([2.0 * np.sign(log_ratio), 0.0], jnp.float32)
    ones = jnp.ones((2, 1), jnp.float32)
    steps = Steps(
        log_probability=log_ratio * ones, old_log_probability=0 * ones, kl=ones, advantage=advantage, size=1
    )
    method = get_policy_gradient(name, reduction="sum")
    loss, metrics = method(steps)
    assert np.isfinite([loss, *metrics.values()]).all()
    if name != "ddpo_sf":
        np.testing.assert_array_equal(gradient_of(name, steps, reduction="sum"), 0)


def test_the_logit_of_d3po_is_bounded():
    """By beta log(1.1 / 0.9) with the released clip, so that the loss cannot leave ln 2 by more than 0.01."""
    far = jnp.array([[1e3, -1e3], [-1e3, 1e3], [40.0, 0.0]])
    steps = Steps(
        log_probability=far,
        old_log_probability=far,
        reference_log_probability=jnp.zeros_like(far),
        advantage=jnp.ones(3),
        size=1,
    )
    loss, metrics = get_policy_gradient("d3po")(steps)
    bound = 0.1 * math.log(1.1 / 0.9)
    np.testing.assert_allclose(metrics["margin"], [bound, -bound, 0.1 * math.log(1.1)], rtol=1e-12)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-np.array(metrics["margin"]))), rtol=1e-12)
    np.testing.assert_array_equal(metrics["clipped"], [1, 1, 0.5])
    np.testing.assert_array_equal(metrics["implicit_accuracy"], [1, 0, 1])
    assert np.abs(loss - math.log(2)).max() < 0.0101
    (note,) = [line for line in get_policy_gradient("d3po").notes(16_384) if "0.693" in line]
    assert "+-0.0201, the loss between 0.6832 and 0.7032" in note


def test_a_tie_has_no_gradient_and_a_label_exchanges_the_images():
    steps = make_steps(images=2)
    swapped = jax.tree.map(lambda array: array[:, ::-1] if array.ndim == 2 else -array, steps)
    np.testing.assert_allclose(get_policy_gradient("d3po")(swapped)[0], get_policy_gradient("d3po")(steps)[0])
    ties = dataclasses.replace(steps, advantage=jnp.zeros(10))
    np.testing.assert_array_equal(gradient_of("d3po", ties), 0)
    np.testing.assert_allclose(get_policy_gradient("d3po")(ties)[0], math.log(2))
    assert np.abs(gradient_of("d3po", steps)).max() > 0


def test_divergence_is_that_of_two_gaussians():
    """Against the integral of p log(p / q), and a Monte-Carlo mean of log p - log q."""
    rng = np.random.default_rng(0)
    mean, reference = rng.normal(size=(2, 4, 2, 3, 2)) * 0.3
    deviation = np.array([0.3, 0.5, 1.0, 2.0])
    given = divergence(*map(jnp.asarray, (mean, reference, deviation)))
    for row in range(4):
        total = 0.0
        for index in itertools.product(range(2), range(3), range(2)):
            p, q = (scipy.stats.norm(m[row][index], deviation[row]) for m in (mean, reference))
            total += p.expect(lambda x, p=p, q=q: p.logpdf(x) - q.logpdf(x))
        np.testing.assert_allclose(given[row], total, rtol=1e-6)
    draws = mean + deviation[:, None, None, None] * rng.normal(size=(20_000, *mean.shape))
    log_ratio = sum(
        sign * scipy.stats.norm.logpdf(draws, m, deviation[:, None, None, None]).sum((-3, -2, -1))
        for sign, m in ((1, mean), (-1, reference))
    )
    error = log_ratio.std(0) / 20_000**0.5
    assert (np.abs(log_ratio.mean(0) - given) < 5 * error).all()


def test_divergence_is_zero_at_the_reference_with_zero_gradient():
    mean = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 2)))
    deviation = jnp.array([0.02, 0.1, 1.0])
    value, gradient = jax.value_and_grad(lambda given: divergence(given, mean, deviation).sum())(mean)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    moved = divergence(mean + 0.1, mean, deviation)
    np.testing.assert_allclose(moved, 8 * 0.01 / (2 * np.square(deviation)), rtol=1e-12)


def test_metrics():
    steps = make_steps(reduction="mean")
    metrics = get_policy_gradient("grpo", clip=0.2, beta=BETA)(steps)[1]
    ratio = np.exp(LOG_RATIOS)
    np.testing.assert_allclose(metrics["ratio"], ratio, rtol=1e-12)
    np.testing.assert_allclose(metrics["approximate_kl"], ratio - 1 - LOG_RATIOS, rtol=1e-10)
    np.testing.assert_allclose(metrics["kl"], steps.kl[:, 0] / SIZE, rtol=1e-12)
    np.testing.assert_allclose(metrics["penalty"], BETA * steps.kl[:, 0] / SIZE, rtol=1e-12)
    assert set(metrics) == {"ratio", "approximate_kl", "kl", "penalty", "advantage", "clipped"}
    without = get_policy_gradient("ddpo")(dataclasses.replace(steps, kl=None))[1]
    assert set(without) == {"ratio", "approximate_kl", "advantage", "clipped"}


@each_row(
    ("name", "arguments", "needed", "penalises"),
    [
        ("ddpo", {}, None, False),
        ("ddpo_sf", {}, None, False),
        ("grpo", {}, "kl", False),
        ("grpo", {"beta": 0.0}, None, False),
        ("grpo", {"kl": "kl_in_reward"}, None, True),
        ("grpo", {"kl": "kl_in_reward", "beta": 0.0}, None, False),
        ("dpok", {"kl": "prediction"}, "prediction_error", False),
        ("d3po", {}, "reference_log_probability", False),
    ],
)
def test_what_a_method_asks_of_the_reference(name, arguments, needed, penalises):
    method = get_policy_gradient(name, **arguments)
    assert method.needs_reference == (needed is not None)
    assert method.penalises_reward == penalises
    absent = dict.fromkeys(("reference_log_probability", "kl", "prediction_error"))
    steps = make_steps(method.images)
    if needed:
        with pytest.raises(UserError, match=f"'{name}' .* reference model: Steps.{needed} is None"):
            method(dataclasses.replace(steps, **{needed: None}))
        absent.pop(needed)
    method(dataclasses.replace(steps, **absent))


def test_no_gradient_flows_into_data():
    """Probabilities of the rollout and of the reference, and advantages, are constants."""
    for name in POLICY_GRADIENTS:
        method = get_policy_gradient(name)
        steps = make_steps(method.images)
        gradient = jax.grad(lambda given, method=method: method(given)[0].sum())(steps)
        for field in ("old_log_probability", "reference_log_probability", "advantage"):
            np.testing.assert_array_equal(getattr(gradient, field), 0)


def test_wrong_inputs_are_refused_by_field():
    steps = make_steps()
    with pytest.raises(ValueError, match=r"log_probability has shape \(10, 1\); 'd3po' .* P = 2"):
        get_policy_gradient("d3po")(steps)
    with pytest.raises(ValueError, match=r"Steps.advantage has shape \(10, 1\); it must be \(10,\)"):
        get_policy_gradient("ddpo")(dataclasses.replace(steps, advantage=steps.kl))
    with pytest.raises(ValueError, match=r"Steps.kl has shape \(3, 1\); it must be \(10, 1\)"):
        get_policy_gradient("ddpo")(dataclasses.replace(steps, kl=jnp.zeros((3, 1))))
    with pytest.raises(ValueError, match=r"Steps\.old_log_probability has dtype bfloat16; .* float32"):
        get_policy_gradient("ddpo")(
            dataclasses.replace(steps, old_log_probability=steps.kl.astype(jnp.bfloat16))
        )
    with pytest.raises(TypeCheckError):
        Steps(**{field: np.zeros((2, 1), int) for field in FIELDS}, size=1)


@each_row(
    ("name", "given", "message"),
    [
        ("ddop", {}, r"^config\.policy_gradient\.name = 'ddop': unknown; did you mean 'ddpo'\?"),
        ("ddpo", {"clp": 1.0}, r"^argument of policy gradient 'ddpo' = 'clp': .* did you mean 'clip'\?"),
        ("ddpo", {"beta": 1.0}, r"^argument of policy gradient 'ddpo' = 'beta': .*advantage_clip, clip, red"),
        ("ddpo", {"clip": 1.5}, r"^config\.policy_gradient\.clip = 1\.5: .*above 0 and below 1"),
        ("dpok", {"alpha": 0}, r"^config\.policy_gradient\.alpha = 0: .*above zero"),
        ("grpo", {"beta": -1}, r"^config\.policy_gradient\.beta = -1: .*zero or above"),
        ("grpo", {"kl": "kl_lss"}, r"^config\.policy_gradient\.kl = 'kl_lss': .*did you mean 'kl_loss'\?"),
        ("d3po", {"reduction": "men"}, r"^config\.policy_gradient\.reduction = 'men': .*'mean'\?"),
    ],
)
def test_get_policy_gradient_refuses_in_one_line(name, given, message):
    with pytest.raises(UserError, match=message) as error:
        get_policy_gradient(name, **given)
    assert "\n" not in str(error.value)


def test_the_clip_is_told_in_mean_and_in_sum():
    """At 512 pixels and at 1024: four times looser for the same number."""
    small, large = (" ".join(get_policy_gradient("ddpo").notes(size)) for size in (16_384, 65_536))
    assert "0.0001 of the mean over 16384 values is 1.64 nats of the sum" in small
    assert "until it is 0.194 or 5.15 times" in small
    assert "6.55 nats" in large
    (plain, warning) = get_policy_gradient("ddpo", reduction="sum").notes(16_384)
    assert "is 6.1e-09 of the mean" in plain
    assert warning.startswith("warning: ")
    assert "1.64 nats" in warning
    assert len(get_policy_gradient("ddpo", reduction="sum", clip=0.2).notes(16_384)) == 1
    assert "until it is exp(-1726) or exp(1562) times" in get_policy_gradient("d3po").notes(16_384)[0]
    assert all(get_policy_gradient(name).notes(16_384) for name in POLICY_GRADIENTS)
