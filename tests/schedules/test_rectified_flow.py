"""Rectified flow against the Gaussians that its weights come from, and its draws of the level."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.schedules.rectified_flow import RectifiedFlow
from dspo_jax.schedules.sigma_draws import make_sigma_draw
from dspo_jax.schedules.variance_preserving import Schedule

SD3 = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
LEVELS = np.array([0.004, 0.1, 0.5, 0.9, 0.999, 1.0], np.float32)
FLOW = RectifiedFlow()


def test_reads_the_scheduler_of_stable_diffusion_3() -> None:
    flow = RectifiedFlow.from_config(SD3)
    assert (flow.num_train_timesteps, flow.shift, flow.prediction_type) == (1000, 3.0, "flow_prediction")
    dpm = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 1.5}
    assert RectifiedFlow.from_config({**dpm, "prediction_type": "flow_prediction"}).shift == 1.5
    assert RectifiedFlow.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"}).shift == 1.0


@each_row(
    ("change", "message"),
    [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting = True: not supported.*set it to false"),
        ({"shift_terminal": 0.02}, "shift_terminal = 0.02: .*set it to null"),
        ({"invert_sigmas": True}, "invert_sigmas = True"),
        ({"stochastic_sampling": True}, "stochastic_sampling = True"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas = True"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas = True"),
        ({"shift": 0}, "shift = 0 must be a number from 0.001"),
        ({"shift": "3"}, "shift = '3' must be a number"),
        ({"prediction_type": "epsilon"}, "prediction_type = 'epsilon'.*flow_prediction"),
        ({"_class_name": "PNDMScheduler"}, "_class_name = 'PNDMScheduler': is not of flow matching"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "use_flow_sigmas is not true"),
    ],
)
def test_refuses_by_key_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RectifiedFlow.from_config(SD3 | change)


def test_levels_of_the_other_kind_of_process_are_refused() -> None:
    image = np.zeros((2, 3, 4, 4, 4), np.float32)
    timesteps, levels = np.array([500, 3]), np.array([0.5, 0.1], np.float32)
    for method in ("add_noise", "target", "to_x0", "to_epsilon"):
        with pytest.raises(UserError, match=r"dtype int.*float32 levels from 0, the image, to 1"):
            getattr(FLOW, method)(image, image, timesteps)
    for method in ("snr", "kappa", "reward_weight", "score_ratio", "epsilon_weight", "network_time"):
        with pytest.raises(UserError, match=r"dtype int"):
            getattr(FLOW, method)(timesteps)
        with pytest.raises(UserError, match=r"timesteps of dtype float32: .*integers from 0 to 999"):
            getattr(Schedule.scaled_linear(), method)(levels)
    with pytest.raises(UserError, match="dtype bfloat16: must be float32"):
        FLOW.add_noise(image, image, jnp.asarray(levels, jnp.bfloat16))
    with pytest.raises(UserError, match=r"shape \(2,\) do not match"):
        FLOW.add_noise(image[:1], image[:1], levels)


def test_the_network_is_told_1000_sigma_in_float32() -> None:
    time = FLOW.network_time(jnp.float32(0.99839))
    assert time.dtype == jnp.float32
    assert float(time) == pytest.approx(998.39, abs=1e-3)
    np.testing.assert_allclose(FLOW.level_at(time), 0.99839, rtol=2e-7)


def test_conversions_invert_the_target() -> None:
    x0, noise = np.random.default_rng(0).normal(size=(2, 6, 3, 2, 2)).astype(np.float32)
    x_t, v = FLOW.add_noise(x0, noise, LEVELS), FLOW.target(x0, noise, LEVELS)
    broad = LEVELS.astype(np.float64)[:, None, None, None]
    np.testing.assert_allclose(x_t, (1 - broad) * x0 + broad * noise, atol=1e-6)
    np.testing.assert_allclose(v, noise - x0, atol=1e-6)
    np.testing.assert_allclose(FLOW.to_x0(v, x_t, LEVELS), x0, atol=2e-6)
    np.testing.assert_allclose(FLOW.to_epsilon(v, x_t, LEVELS), noise, atol=2e-6)


def reverse_step(t: float, s: float) -> tuple[float, float, float]:
    """Of an error of v by 1: how far the posterior's mean moves, its variance, and the error of the noise.

    The posterior q(x_s | x_t, x_0) is the product of N(x_s; (1 - s) x_0, s^2) and
    N(x_t; (1 - t) / (1 - s) x_s, V).
    """
    keep = (1 - t) / (1 - s)
    added = t**2 - keep**2 * s**2
    precision = 1 / s**2 + keep**2 / added
    return (1 - s) / s**2 / precision * t, 1 / precision, 1 - t


@each_row("t", [0.002, 0.1, 0.35, 0.5, 0.9, 0.999])
def test_weights_against_the_gaussians_they_come_from(t: float) -> None:
    s = t - 1e-3
    step, variance, of_noise = reverse_step(t, s)
    level, rtol = np.float32(t), 2e-4  # s has an error of 6e-8 in float32, of 1e-3 that lie between
    # The log-ratio of a Gaussian to one whose mean is right is -1/2 (difference of means)^2 / variance.
    weight = 500 * step**2 / variance
    np.testing.assert_allclose(FLOW.reward_weight(level), weight, rtol=rtol)
    assert weight == pytest.approx(500 * 1e-3 * (t + s - 2 * t * s) / s**2, rel=1e-9)
    # The score of x_s itself moves by the noise's error over s; that of the reverse step by step / variance.
    ratio = of_noise / s / (step / variance)
    np.testing.assert_allclose(FLOW.score_ratio(level), ratio, rtol=rtol)
    np.testing.assert_allclose(FLOW.denoising_weight(level), weight * ratio**2, rtol=rtol)
    np.testing.assert_allclose(FLOW.epsilon_weight(level), of_noise**2, rtol=rtol)
    snr = (1 - t) ** 2 / t**2
    np.testing.assert_allclose(FLOW.snr(level), snr, rtol=rtol)
    np.testing.assert_allclose(FLOW.min_snr_weight(level, 5.0), min(snr, 5) * t**2, rtol=rtol)


def test_the_reward_weight_tends_to_its_limit_and_is_finite_at_both_ends() -> None:
    t = np.array([0.1, 0.5, 0.9], np.float32)
    fine = RectifiedFlow(100_000)
    with jax.enable_x64(True):
        np.testing.assert_allclose(fine.reward_weight(t.astype(np.float64)), (1 - t) / t, rtol=5e-4)
    ends = jnp.asarray([2.0**-24, 1e-3, 2e-3, 1.0], jnp.float32)
    for name in ("reward_weight", "score_ratio", "denoising_weight", "epsilon_weight"):
        assert np.isfinite(getattr(FLOW, name)(ends)).all(), name
    weights = np.asarray(FLOW.reward_weight(ends))
    assert weights[0] == weights[1] == weights[2]
    np.testing.assert_allclose(weights[3], 500 * 1e-3 * (1 - 0.999) / 0.999**2, rtol=1e-3)
    assert FLOW.score_ratio(jnp.float32(1.0)) == 0


BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


@each_row("kind", ["epsilon", "v_prediction", "zero_snr"])
def test_weights_of_timesteps_are_the_papers_to_1e_12(kind: str) -> None:
    """The general form, from SNR and kappa, is DSPO's in terms of beta and abar, see docs/objectives.md."""
    abar = np.cumprod(1 - BETAS)
    if kind == "zero_snr":
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    beta = 1 - abar / np.append(1.0, abar[:-1])
    t = np.arange(1000)
    at, before, b = (np.concatenate([x[:1], x]) for x in (abar[1:], abar[:-1], beta[1:]))
    with jax.enable_x64(True):
        is_epsilon = kind == "epsilon"
        schedule = Schedule(beta, abar, "epsilon" if is_epsilon else "v_prediction")
        weight = b / (1 - before) / (1 - b if is_epsilon else 1) * (1 if is_epsilon else before)
        with np.errstate(divide="ignore"):
            ratio = np.sqrt((1 - b) * (1 - before) / (1 - at))
        close = {"rtol": 1e-11 if kind == "zero_snr" else 1e-12}
        np.testing.assert_allclose(schedule.reward_weight(t), weight, **close)
        np.testing.assert_allclose(schedule.score_ratio(t), ratio, **close)
        np.testing.assert_allclose(schedule.denoising_weight(t), weight * ratio**2, **close)
        snr = abar / (1 - abar)
        divisor = snr if is_epsilon else snr + 1
        np.testing.assert_allclose(schedule.min_snr_weight(t, 5.0), np.minimum(snr, 5) / divisor, **close)
        np.testing.assert_allclose(schedule.epsilon_weight(t), 1.0 if is_epsilon else abar, **close)
        # And both are the general formula itself.
        kappa2 = (1 - abar) / (abar if is_epsilon else 1)
        general = kappa2[1:] * (snr[:-1] - snr[1:])
        np.testing.assert_allclose(schedule.reward_weight(t)[1:], general, rtol=1e-9)


def logit_normal_cdf(sigma: np.ndarray, mean: float, std: float) -> np.ndarray:
    from scipy.stats import norm

    return norm.cdf((np.log(sigma / (1 - sigma)) - mean) / std)


@each_row(
    ("keys", "mean", "std"),
    [
        ({}, 0.0, 1.0),
        ({"draw": "logit_normal", "mean": -0.5, "std": 0.7}, -0.5, 0.7),
        ({"shift": 3.0}, np.log(3), 1.0),  # diffusers' trainers, Flow-GRPO
    ],
)
def test_drawn_levels_have_the_distribution_of_the_paper(
    keys: dict[str, object], mean: float, std: float
) -> None:
    pytest.importorskip("scipy")
    sigma = np.asarray(make_sigma_draw(keys)(jax.random.key(0), (40_000,)), np.float64)
    assert (sigma > 0).all()
    assert (sigma <= 1).all()
    grid = np.linspace(0.05, 0.95, 19)
    found = np.searchsorted(np.sort(sigma), grid) / sigma.size
    np.testing.assert_allclose(found, logit_normal_cdf(grid, mean, std), atol=0.01)


def test_mode_and_uniform() -> None:
    u = np.linspace(0.001, 0.999, 999)
    for scale in (-1.0, 0.0, 1.29, 1.75):
        expected = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
        ours = make_sigma_draw({"draw": "mode", "scale": scale}).of_uniform(jnp.asarray(u, jnp.float32))
        np.testing.assert_allclose(ours, expected, atol=1e-6)
        assert (np.diff(ours) < 1e-6).all()
    levels = make_sigma_draw({"draw": "uniform"})(jax.random.key(1), (20_000,))
    assert levels.dtype == jnp.float32
    np.testing.assert_allclose(np.quantile(levels, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.015)


def test_beta_of_an_objective_of_the_noise_in_units_of_the_velocity() -> None:
    """E (1 - sigma)^2, in docs/objectives.md and in the first lines of a run."""
    z = (np.random.default_rng(0).permutation(200_000) + 0.5) / 200_000
    from scipy.special import ndtri

    draws = {
        (0.5, 0.293): ({}, 1 / (1 + np.exp(-ndtri(z)))),
        (0.75, 0.113): ({"shift": 3.0}, 1 / (1 + np.exp(-ndtri(z) - np.log(3)))),
        (0.5, 0.333): ({"draw": "uniform"}, z),
        (0.75, 0.176): ({"draw": "uniform", "shift": 3.0}, 3 * z / (1 + 2 * z)),
    }
    for (median, factor), (keys, sigma) in draws.items():
        assert np.mean((1 - sigma) ** 2) == pytest.approx(factor, abs=6e-4)
        (line,) = make_sigma_draw(keys).notes()
        assert f"median sigma {median:g}, mean of (1 - sigma)^2 {factor:g}, " in line


def test_the_config_chooses_the_levels() -> None:
    keys = dict.fromkeys(("draw", "mean", "std", "scale", "shift"))
    draw = FLOW.make_draw(0, None, keys | {"mean": 0.5})
    assert draw == make_sigma_draw({"draw": "logit_normal", "mean": 0.5})
    refused: list[tuple[dict[str, object], str]] = [
        (
            {"draw": "logit-normal"},
            r"config\.levels\.draw = 'logit-normal': unknown; did you mean 'logit_normal'",
        ),
        ({"scale": 1.0}, r"config\.levels\.scale = 1.0: 'logit_normal' has no such argument"),
        ({"draw": "uniform", "std": 2.0}, r"config\.levels\.std = 2.0: 'uniform' has no such argument"),
        ({"draw": "mode", "scale": 3.0}, r"config\.levels\.scale = 3.0: must be from -1 to 1.752"),
        ({"std": 0.0}, r"config\.levels\.std = 0.0: must be a finite number above 0"),
        ({"shift": -1.0}, r"config\.levels\.shift = -1.0: must be a finite number above 0"),
        ({"mean": float("nan")}, r"config\.levels\.mean = nan: must be a finite number"),
        ({"mean": "0"}, r"config\.levels\.mean = '0': must be a number"),
    ]
    for change, message in refused:
        with pytest.raises(UserError, match=message):
            FLOW.make_draw(0, None, keys | change)
    with pytest.raises(UserError, match=r"config\.timesteps\.first = 3 .*: are of models with integer"):
        FLOW.make_draw(3, None, keys)
    with pytest.raises(UserError, match=r"config\.levels\.mean = 0.5: is of models of rectified flow"):
        Schedule.scaled_linear().make_draw(0, None, keys | {"mean": 0.5})


def test_levels_between_image_and_noise() -> None:
    middles = np.arange(8) + 0.5
    np.testing.assert_array_equal(
        Schedule.scaled_linear().level_between(middles, 8), [62, 187, 312, 437, 562, 687, 812, 937]
    )
    np.testing.assert_allclose(FLOW.level_between(middles, 8), middles / 8)
    for process, level in itertools.product((FLOW, Schedule.scaled_linear()), (0.2, 0.5, 0.8)):
        assert process.network_time(process.level_between(level, 1)) == pytest.approx(1000 * level, abs=1e-3)


def test_which_processes_are_the_same() -> None:
    other = RectifiedFlow.from_config(SD3)  # another shift is one of the sampler
    assert FLOW.is_same(other)
    assert not FLOW.is_same(Schedule.scaled_linear())
    assert not Schedule.scaled_linear().is_same(FLOW)
    assert Schedule.scaled_linear().is_same(Schedule.scaled_linear(prediction_type="v_prediction"))
    assert not Schedule.scaled_linear().is_same(Schedule.scaled_linear(beta_end=0.02))
