"""The forward process against diffusers, and the time weights against the Gaussians they come from."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.schedules import variance_preserving as schedule_module
from dspo_jax.schedules.variance_preserving import Schedule

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
TIMESTEPS = np.array([0, 1, 500, 999])


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 4, 3, 2, 2)).astype(np.float32)


@each_row("prediction_type", ["epsilon", "v_prediction"])
@each_row(
    "betas",
    [
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "num_train_timesteps": 1000,
        },
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000},
    ],
)
def test_forward_process_matches_diffusers(betas, prediction_type, images):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config = betas | {"prediction_type": prediction_type}
    theirs = diffusers.DDPMScheduler(**config)
    ours = Schedule.from_config(dict(theirs.config))

    assert ours.prediction_type == prediction_type
    assert ours.num_train_timesteps == 1000
    np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), rtol=1e-6)
    # Ours is accumulated in float64, theirs in float32.
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-5)

    x0, noise = images
    inputs = torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(TIMESTEPS)
    np.testing.assert_allclose(ours.add_noise(x0, noise, TIMESTEPS), theirs.add_noise(*inputs), atol=1e-5)
    target = noise if prediction_type == "epsilon" else theirs.get_velocity(*inputs)
    np.testing.assert_allclose(ours.target(x0, noise, TIMESTEPS), target, atol=1e-5)


def test_alphas_cumprod_is_computed_in_float64():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    expected = np.cumprod(1 - betas).astype(np.float32)
    np.testing.assert_array_equal(Schedule.scaled_linear().alphas_cumprod, expected)


@each_row("prediction_type", ["epsilon", "v_prediction"])
def test_conversions_invert_the_target(prediction_type, images):
    x0, noise = images
    schedule = Schedule.scaled_linear(prediction_type=prediction_type)
    x_t, prediction = (f(x0, noise, TIMESTEPS) for f in (schedule.add_noise, schedule.target))
    np.testing.assert_allclose(schedule.to_x0(prediction, x_t, TIMESTEPS), x0, atol=1e-5)
    np.testing.assert_allclose(schedule.to_epsilon(prediction, x_t, TIMESTEPS), noise, atol=1e-5)


def test_timesteps_may_have_one_or_two_axes_or_none(images):
    x0, noise = images.reshape(2, 2, 2, 3, 2, 2)
    schedule = Schedule.scaled_linear()
    pairs = schedule.add_noise(x0, noise, TIMESTEPS.reshape(2, 2))
    for i, t in enumerate(TIMESTEPS):
        one = schedule.add_noise(x0[i // 2, i % 2], noise[i // 2, i % 2], int(t))
        np.testing.assert_array_equal(pairs[i // 2, i % 2], one)
    per_example = schedule.add_noise(x0, noise, TIMESTEPS[:2])
    np.testing.assert_array_equal(per_example[1, 1], schedule.add_noise(x0[1, 1], noise[1, 1], 1))
    with pytest.raises(ValueError, match=r"timesteps of shape \(4,\).*\(2, 2, 3, 2, 2\)"):
        schedule.add_noise(x0, noise, TIMESTEPS)


def test_a_timestep_beyond_the_schedule_is_not_a_number(images):
    x0, noise = images
    noised = Schedule.scaled_linear().add_noise(x0, noise, np.array([0, 1000, 0, 0]))
    np.testing.assert_array_equal(np.isnan(noised).all((1, 2, 3)), [False, True, False, False])


def test_snr():
    schedule = Schedule.scaled_linear()
    signal, noise = np.ones((4, 1), np.float32), np.zeros((4, 1), np.float32)
    expected = (
        schedule.add_noise(signal, noise, TIMESTEPS) ** 2 / schedule.add_noise(noise, signal, TIMESTEPS) ** 2
    )
    np.testing.assert_allclose(schedule.snr(TIMESTEPS), expected[:, 0], rtol=1e-5)


@each_row("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weight_is_that_of_diffusers_training_scripts(prediction_type):
    """As examples/text_to_image/train_text_to_image.py computes it."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr

    betas = {key: STABLE_DIFFUSION[key] for key in ("beta_schedule", "beta_start", "beta_end")}
    scheduler = diffusers.DDPMScheduler(**betas, prediction_type=prediction_type)
    snr = compute_snr(scheduler, torch.arange(1000))
    weights = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = weights / snr if prediction_type == "epsilon" else weights / (snr + 1)
    ours = Schedule.scaled_linear(prediction_type=prediction_type).min_snr_weight(np.arange(1000), 5.0)
    np.testing.assert_allclose(ours, weights.numpy(), rtol=1e-4)
    assert (snr > 5).sum() == 147  # docs/objectives.md
    stated = {"epsilon": [0.004, 1.0, 1.0], "v_prediction": [0.004, 0.83, 0.005]}
    np.testing.assert_allclose(ours[np.array([0, 147, 999])], stated[prediction_type], rtol=0.1)


def test_is_a_pytree_whose_prediction_type_is_static(images):
    x0, noise = images
    schedule = Schedule.scaled_linear(prediction_type="v_prediction")
    assert len(jax.tree.leaves(schedule)) == 2
    inside = jax.jit(lambda schedule: schedule.target(x0, noise, TIMESTEPS))(schedule)
    np.testing.assert_allclose(inside, schedule.target(x0, noise, TIMESTEPS), atol=1e-6)


@each_row("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_reads_the_config_of_any_ddpm_type_scheduler(scheduler):
    diffusers = pytest.importorskip("diffusers")
    keys = ("beta_schedule", "beta_start", "beta_end")
    config = getattr(diffusers, scheduler)(**{key: STABLE_DIFFUSION[key] for key in keys}).config
    read = Schedule.from_config(dict(config))
    np.testing.assert_array_equal(read.alphas_cumprod, Schedule.scaled_linear().alphas_cumprod)


def test_prediction_type_defaults_to_epsilon_as_in_the_files_that_predate_it():
    config = {key: value for key, value in STABLE_DIFFUSION.items() if key != "prediction_type"}
    assert Schedule.from_config(config).prediction_type == "epsilon"


@each_row(
    ("change", "message"),
    [
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is set"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = true with prediction_type = 'epsilon'"),
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "num_train_timesteps": 1},
            "rescale_betas_zero_snr = true: needs num_train_timesteps of at least 2",
        ),
        ({"_class_name": "LCMScheduler"}, "_class_name = 'LCMScheduler': a consistency model"),
        ({"prediction_type": "sample"}, "prediction_type = 'sample'.*epsilon, v_prediction"),
        ({"prediction_type": "v-prediction"}, "did you mean 'v_prediction'"),
        (
            {"beta_schedule": "squaredcos_cap_v2"},
            "beta_schedule = 'squaredcos_cap_v2'.*linear, scaled_linear",
        ),
        ({"num_train_timesteps": 0}, "num_train_timesteps = 0"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps = 10.5"),
        ({"beta_end": 1.5}, "beta_end = 1.5"),
        ({"beta_start": "0.1"}, "beta_start = '0.1'"),
        ({"beta_end": 0.9}, "beta_end = 0.9, num_train_timesteps = 1000: nothing is left of the image"),
        ({"beta_start": True}, "beta_start = True must be a number from 0 to 1"),
        ({"beta_end": float("nan")}, "beta_end = nan must be a number from 0 to 1"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start = 0.5, beta_end = 0.1: must satisfy"),
        (
            {"num_train_timesteps": 10**9},
            "num_train_timesteps = 1000000000 must be an integer from 1 to 100000",
        ),
        ({"beta_schedule": ["linear"]}, r"beta_schedule = \['linear'\] must be a short string"),
        ({"rescale_betas_zero_snr": "false"}, "rescale_betas_zero_snr = 'false' must be true or false"),
    ],
)
def test_refuses_by_key_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_config(STABLE_DIFFUSION | change)


SCHEDULERS = [(name, betas) for betas, names in schedule_module._BETAS.items() for name in names]


@each_row(("name", "betas"), SCHEDULERS)
def test_absent_keys_have_the_defaults_of_the_class(name, betas):
    diffusers = pytest.importorskip("diffusers")
    theirs = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert tuple(theirs[key].default for key in ("beta_start", "beta_end", "beta_schedule")) == betas
    assert theirs["num_train_timesteps"].default == 1000
    assert theirs["prediction_type"].default == "epsilon"
    spelt = dict(zip(("beta_start", "beta_end", "beta_schedule"), betas, strict=True))
    expected = Schedule.from_config({**spelt, "num_train_timesteps": 1000})
    read = Schedule.from_config({"_class_name": name})
    np.testing.assert_array_equal(read.alphas_cumprod, expected.alphas_cumprod)
    assert read.prediction_type == "epsilon"
    np.testing.assert_array_equal(
        Schedule.from_config({"_class_name": name, "beta_end": 0.03}).betas[-1], np.float32(0.03)
    )


def test_the_schedulers_that_diffusers_pipelines_exchange_have_defaults():
    pytest.importorskip("diffusers")
    from diffusers.schedulers import KarrasDiffusionSchedulers

    # Their processes are others: noise from a stochastic differential equation, and levels of EDM.
    others = {"DPMSolverSDEScheduler", "EDMEulerScheduler"}
    names = {scheduler.name for scheduler in KarrasDiffusionSchedulers} - others
    assert names <= {name for names in schedule_module._BETAS.values() for name in names}


def test_refuses_a_scheduler_of_another_process():
    with pytest.raises(
        ValueError,
        match=r"_class_name = 'FlowMatchEulerDiscreteScheduler'\): missing key\(s\) beta_start, beta_end,",
    ):
        Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000})


def log_normal(x, mean, variance):
    return -np.sum((x - mean) ** 2) / (2 * variance)


def central_difference(f, x, step):
    return np.array([(f(x + d) - f(x - d)) / (2 * step) for d in step * np.eye(x.size)])


@each_row("prediction_type", ["epsilon", "v_prediction"])
@each_row("t", [1, 11, 500, 999])
def test_time_weights_against_the_gaussians_they_come_from(t, prediction_type):
    """DSPO Eq. 22-28 with log-densities in float64 and their gradients by central differences."""
    rng = np.random.default_rng(t)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = np.cumprod(1 - betas)
    beta, before, at = betas[t], alphas_cumprod[t - 1], alphas_cumprod[t]
    variance = beta * (1 - before) / (1 - at)
    x0, noise, policy_error, reference_error = rng.normal(size=(4, 6))
    x_t = np.sqrt(at) * x0 + np.sqrt(1 - at) * noise
    # The errors are those of the network's output; an error of v is 1 / sqrt(abar) times one of eps.
    to_epsilon = 1.0 if prediction_type == "epsilon" else np.sqrt(at)

    def reverse_mean(error):
        return (x_t - beta / np.sqrt(1 - at) * (noise + to_epsilon * error)) / np.sqrt(1 - beta)

    def reward(x):  # Eq. 6 with lambda = 1
        policy, reference = reverse_mean(policy_error), reverse_mean(reference_error)
        return log_normal(x, policy, variance) - log_normal(x, reference, variance)

    def log_density(error):  # of x_{t-1} under the x_0 that makes `noise + error` its noise; Eq. 27
        sigma = np.sqrt(1 - before)
        return lambda x: log_normal(x, posterior_mean - sigma * (noise + to_epsilon * error), sigma**2)

    posterior_mean = reverse_mean(np.zeros(6))
    step = 1e-3 * np.sqrt(variance)
    gradients = [
        central_difference(f, posterior_mean, step)
        for f in (reward, log_density(policy_error), log_density(np.zeros(6)))
    ]
    preference_score = gradients[0] / (policy_error - reference_error)
    data_score = (gradients[1] - gradients[2]) / policy_error

    schedule = Schedule.scaled_linear(prediction_type=prediction_type)
    rtol = 2e-4  # 1 - abar in float32 at small t
    errors = policy_error @ policy_error - reference_error @ reference_error
    np.testing.assert_allclose(-0.5 * schedule.reward_weight(t) * errors, reward(posterior_mean), rtol=rtol)
    np.testing.assert_allclose(schedule.score_ratio(t), data_score / preference_score, rtol=rtol)
    # A(t) = omega(t) (preference score)^2 with omega = sigma^2 is w(t) again.
    np.testing.assert_allclose(schedule.reward_weight(t), variance * preference_score**2, rtol=rtol)
    np.testing.assert_allclose(schedule.denoising_weight(t), variance * data_score**2, rtol=rtol)


def test_stated_figures_of_the_time_weights():
    schedule = Schedule.scaled_linear()
    weight = np.asarray(schedule.reward_weight(jnp.arange(1000)))
    assert weight[1] == pytest.approx(1.006, abs=5e-4)
    assert weight[500] == pytest.approx(0.0066, abs=2e-4)
    assert weight.max() / weight.min() == pytest.approx(150, rel=0.03)
    assert weight[0] == weight[1]
    ratio = np.asarray(schedule.score_ratio(jnp.arange(11, 1000)))
    assert ratio.min() == pytest.approx(0.956, abs=1e-3)
    assert ratio.max() == pytest.approx(0.997, abs=5e-4)


def test_denoising_weight_is_the_ratio_of_variances():
    t = np.arange(1, 1000)
    schedule = Schedule.scaled_linear()
    expected = np.asarray(schedule.betas)[1:] / (1 - np.asarray(schedule.alphas_cumprod)[1:])
    np.testing.assert_allclose(schedule.denoising_weight(t), expected, rtol=1e-5)


ZERO_SNR = STABLE_DIFFUSION | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def zero_snr_in_float64():
    """abar [T] by the definition: sqrt(abar) shifted to end at 0 and scaled to begin where it began."""
    signal = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    return np.interp(signal, [signal[-1], signal[0]], [0.0, signal[0]]) ** 2


def test_zero_terminal_snr_matches_diffusers_and_float64(images):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    keys = ("beta_schedule", "beta_start", "beta_end", "prediction_type", "rescale_betas_zero_snr")
    theirs = diffusers.DDPMScheduler(**{key: ZERO_SNR[key] for key in keys})
    ours = Schedule.from_config(ZERO_SNR)
    assert ours.has_zero_terminal_snr
    assert not Schedule.scaled_linear().has_zero_terminal_snr
    assert (ours.alphas_cumprod[-1], ours.betas[-1]) == (0, 1)
    expected = zero_snr_in_float64()
    np.testing.assert_allclose(ours.alphas_cumprod, expected, rtol=1e-6, atol=1e-15)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-3)
    np.testing.assert_allclose(ours.betas[1:], 1 - expected[1:] / expected[:-1], rtol=1e-5)

    x0, noise = images
    inputs = torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(TIMESTEPS)
    np.testing.assert_allclose(ours.add_noise(x0, noise, TIMESTEPS), theirs.add_noise(*inputs), atol=1e-5)
    np.testing.assert_allclose(ours.target(x0, noise, TIMESTEPS), theirs.get_velocity(*inputs), atol=1e-5)
    np.testing.assert_array_equal(ours.add_noise(x0, noise, TIMESTEPS)[-1], noise[-1])
    np.testing.assert_array_equal(ours.target(x0, noise, TIMESTEPS)[-1], -x0[-1])


@each_row("t", [1, 500, 998, 999])
def test_time_weights_at_zero_terminal_snr(t, images):
    """From x_0 rather than from the noise, of which an error of v says nothing where abar is 0."""
    schedule, alphas_cumprod = Schedule.from_config(ZERO_SNR), zero_snr_in_float64()
    before, at = alphas_cumprod[t - 1], alphas_cumprod[t]
    alpha = at / before
    # Of an error of v by 1: the error of x_0, and those of the means of x_{t-1} that are compared.
    of_x0 = np.sqrt(1 - at)
    step = np.sqrt(before) * (1 - alpha) / (1 - at) * of_x0
    variance = (1 - alpha) * (1 - before) / (1 - at)
    # The densities of x_{t-1} itself: their means are sqrt(1 - before) times an error of eps apart (Eq. 27).
    direct = np.sqrt(1 - before) * np.sqrt(at)
    rtol = 2e-4
    np.testing.assert_allclose(schedule.snr(t), at / (1 - at), rtol=rtol)
    np.testing.assert_allclose(schedule.min_snr_weight(t, 5.0), min(at / (1 - at), 5) * of_x0**2, rtol=rtol)
    np.testing.assert_allclose(schedule.reward_weight(t), step**2 / variance, rtol=rtol)
    ratio = direct / (1 - before) / (step / variance)
    np.testing.assert_allclose(schedule.score_ratio(t), ratio, rtol=rtol)
    np.testing.assert_allclose(schedule.denoising_weight(t), step**2 / variance * ratio**2, rtol=rtol)

    x0, noise = images
    x_t = np.sqrt(at) * x0 + np.sqrt(1 - at) * noise
    v = np.sqrt(at) * noise - np.sqrt(1 - at) * x0
    times = np.full(len(x0), t)
    np.testing.assert_allclose(schedule.to_x0(v, x_t, times), x0, atol=1e-5)
    np.testing.assert_allclose(schedule.to_epsilon(v, x_t, times), noise, atol=1e-5)
