"""What samplers promise whatever the scheduler: spacing, one trace of the network, exactness, refusals.

`test_samplers_diffusers.py` compares them with diffusers.
"""

import functools
import inspect
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.samplers import (
    SAMPLERS,
    TIMESTEP_SPACINGS,
    Sampler,
    State,
    make_sampler,
    own_sampler,
    samplers_of,
    spaced_timesteps,
)
from dspo_jax.schedules.variance_preserving import Schedule

SCHEDULE = Schedule.scaled_linear()
NAMES = samplers_of(SCHEDULE)
SHAPE = (2, 4, 4, 3)
LATENTS = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
IMAGE = np.linspace(-2, 2, LATENTS.size, dtype=np.float32).reshape(SHAPE)


def draw(i: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(1), i), SHAPE)


@each_row("timestep_spacing", TIMESTEP_SPACINGS)
def test_timesteps_match_diffusers(timestep_spacing: str) -> None:
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    for steps, offset in itertools.product((1, 2, 3, 7, 10, 50, 333, 500, 999), (0, 1)):
        theirs = diffusers.DDIMScheduler(timestep_spacing=timestep_spacing, steps_offset=offset)
        theirs.set_timesteps(steps)
        ours = spaced_timesteps(1000, steps, timestep_spacing=timestep_spacing, steps_offset=offset)
        np.testing.assert_array_equal(ours, theirs.timesteps.numpy())


@each_row("timestep_spacing", TIMESTEP_SPACINGS)
def test_as_many_distinct_timesteps_as_steps(timestep_spacing: str) -> None:
    for steps in range(1, 1001):
        timesteps = spaced_timesteps(1000, steps, timestep_spacing=timestep_spacing)
        assert timesteps.shape == (steps,)
        assert np.all(np.diff(timesteps) < 0)
        assert timesteps.min() >= 0
        assert timesteps.max() <= 999


@pytest.mark.ci
@each_row("prediction_type", ["epsilon", "v_prediction"])
@each_row("timestep_spacing", TIMESTEP_SPACINGS)
@each_row("name", [name for name in NAMES if name != "pndm"])
def test_a_perfect_network_recovers_the_image(name: str, timestep_spacing: str, prediction_type: str) -> None:
    schedule = Schedule.scaled_linear(prediction_type=prediction_type)
    config = {"timestep_spacing": timestep_spacing, "set_alpha_to_one": True}
    sampler = make_sampler(name, schedule, config, 10, strength=0.8)
    np.testing.assert_allclose(run_perfect(sampler, prediction_type), IMAGE, atol=1e-4)


def test_a_perfect_network_recovers_the_image_by_pndm() -> None:
    """It averages predictions of several timesteps, which agree for epsilon only."""
    sampler = make_sampler("pndm", SCHEDULE, {"set_alpha_to_one": True}, 10)
    np.testing.assert_allclose(run_perfect(sampler, "epsilon"), IMAGE, atol=1e-4)


@functools.partial(jax.jit, static_argnums=1)
def run_perfect(sampler: Sampler, prediction_type: str) -> jax.Array:
    """The sampler from a noised image, with a network that knows the image."""
    sigmas = np.sqrt(1 / np.asarray(SCHEDULE.alphas_cumprod) - 1)

    def predict(x: jax.Array, t: jax.Array) -> jax.Array:
        sigma = jnp.interp(t.astype(jnp.float32), np.arange(1000.0), sigmas)
        signal, scale = 1 / jnp.sqrt(1 + sigma**2), sigma / jnp.sqrt(1 + sigma**2)
        noise = (x - signal * IMAGE) / scale
        return noise if prediction_type == "epsilon" else signal * noise - scale * IMAGE

    return sampler.run(predict, sampler.start(LATENTS, IMAGE), draw)


@each_row("name", NAMES)
def test_the_network_is_traced_once_and_called_with_float32_latents(name: str) -> None:
    traces, noises, calls = [], [], []

    def predict(x: jax.Array, t: jax.Array) -> jax.Array:
        traces.append((x.dtype, t.shape, t.dtype))
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return jnp.tanh(x).astype(jnp.bfloat16)

    def noise(i: jax.Array) -> jax.Array:
        noises.append((i.shape, i.dtype))
        return draw(i)

    run = jax.jit(lambda sampler, x: sampler.run(predict, sampler.start(x), noise))
    sampler = make_sampler(name, SCHEDULE, {}, 7)
    result = run(sampler, LATENTS)
    assert result.dtype == jnp.float32
    jax.effects_barrier()
    assert sorted(calls, reverse=True) == sampler.timesteps.tolist()
    # Another schedule, spacing or prediction type is the same program.
    other = Schedule.scaled_linear(beta_end=0.02, prediction_type="v_prediction")
    run(make_sampler(name, other, {"timestep_spacing": "trailing"}, 7), 2 * LATENTS)
    assert traces == [(jnp.float32, (), jnp.float32 if name.startswith("euler") else jnp.int32)]
    assert noises == ([((), jnp.int32)] if name in ("ddpm", "euler_ancestral") else [])


def test_the_number_of_calls() -> None:
    for name, strength, calls in (("ddim", 1.0, 10), ("ddim", 0.55, 5), ("pndm", 1.0, 11), ("pndm", 0.55, 6)):
        assert make_sampler(name, SCHEDULE, {}, 10, strength=strength).timesteps.shape == (calls,)
    np.testing.assert_array_equal(make_sampler("pndm", SCHEDULE, {}, 4).timesteps, [750, 500, 500, 250, 0])


def test_the_start_is_noise_or_a_noised_image() -> None:
    image = np.ones(SHAPE, np.float32)
    for name in ("ddim", "dpmpp_2m"):
        sampler = make_sampler(name, SCHEDULE, {"timestep_spacing": "trailing"}, 10)
        np.testing.assert_array_equal(sampler.start(LATENTS).latents, LATENTS)
        np.testing.assert_allclose(
            sampler.start(LATENTS, image).latents,
            SCHEDULE.add_noise(image, LATENTS, np.array([999, 999])),
            rtol=1e-4,
        )
    sigma = np.sqrt(1 / SCHEDULE.alphas_cumprod[999] - 1)
    sampler = make_sampler("euler", SCHEDULE, {"timestep_spacing": "trailing"}, 10)
    np.testing.assert_allclose(sampler.start(LATENTS).latents, sigma * LATENTS, rtol=1e-4)
    np.testing.assert_allclose(sampler.start(LATENTS, image).latents, image + sigma * LATENTS, rtol=1e-4)
    with pytest.raises(ValueError, match=r"strength = 0\.5: needs an image"):
        make_sampler("ddim", SCHEDULE, {}, 10, strength=0.5).start(LATENTS)


def test_a_sampler_that_adds_noise_needs_it() -> None:
    with pytest.raises(ValueError, match="noise = None"):
        make_sampler("ddpm", SCHEDULE, {}, 10).run(lambda x, t: x, State(jnp.asarray(LATENTS)))


def test_karras_can_be_asked_for_and_declined() -> None:
    for name in ("euler", "dpmpp_2m"):
        plain, levels = ({"use_karras_sigmas": value} for value in (False, True))
        asked = make_sampler(name, SCHEDULE, plain, 10, karras=True)
        declined = make_sampler(name, SCHEDULE, levels, 10, karras=False)
        np.testing.assert_array_equal(asked.step_x, make_sampler(name, SCHEDULE, levels, 10).step_x)
        np.testing.assert_array_equal(declined.timesteps, make_sampler(name, SCHEDULE, plain, 10).timesteps)
        assert not np.allclose(asked.timesteps, declined.timesteps)
    with pytest.raises(ValueError, match=r"karras = True: sampler 'ddim'.*these have: dpmpp_2m, euler"):
        make_sampler("ddim", SCHEDULE, {}, 10, karras=True)


def test_ddim_with_eta_of_one_has_the_noise_and_the_mean_of_ddpm() -> None:
    """They agree where both end a step at the same timestep: at even spacing, and at x_0."""
    config = {"set_alpha_to_one": True}
    ddim, ddpm = (
        make_sampler("ddim", SCHEDULE, config, 50, eta=1.0),
        make_sampler("ddpm", SCHEDULE, config, 50),
    )
    assert ddim.step_noise is not None
    assert ddpm.step_noise is not None
    assert ddim.step_noise[0] > 0.4
    np.testing.assert_allclose(ddim.step_noise, ddpm.step_noise, rtol=1e-6)
    np.testing.assert_allclose(ddim.step_x, ddpm.step_x, rtol=1e-5)
    np.testing.assert_allclose(ddim.step_outputs, ddpm.step_outputs, rtol=1e-5)
    assert make_sampler("ddim", SCHEDULE, config, 50, eta=0.0).step_noise is None


@each_row(
    ("name", "eta", "message"),
    [
        ("euler", 0.5, "eta = 0.5: sampler 'euler' has none; leave it out, or take one of: ddim"),
        ("ddpm", 1.0, "eta = 1.0: sampler 'ddpm' has none"),
        ("ddim", 1.1, "eta = 1.1: must be between 0 and 1"),
        ("ddim", -0.1, "eta = -0.1: must be between 0 and 1"),
        ("ddim", float("nan"), "eta = nan: must be between 0 and 1"),
    ],
)
def test_an_eta_that_a_sampler_does_not_have_is_refused(name: str, eta: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_sampler(name, SCHEDULE, {}, 10, eta=eta)


def test_a_scheduler_that_is_not_here_is_refused_by_its_class() -> None:
    assert own_sampler({"_class_name": "PNDMScheduler"}) == "pndm"
    for config in ({"_class_name": "UniPCMultistepScheduler"}, {}):
        with pytest.raises(ValueError, match=r"_class_name = .*: not supported; name one of"):
            own_sampler(config)


@each_row(
    ("name", "config", "message"),
    [
        ("ddim", {"timestep_spacing": "trailin"}, "timestep_spacing = 'trailin'.*did you mean 'trailing'"),
        ("ddim", {"steps_offset": 101}, r"steps_offset = 101: .*outside 0\.\.999"),
        ("ddim", {"steps_offset": -1}, "steps_offset = -1 must be an integer from 0 to 100000"),
        ("ddim", {"steps_offset": 0.5}, "steps_offset = 0.5 must be an integer from 0 to 100000"),
        ("ddim", {"steps_offset": None}, "steps_offset = None must be an integer from 0 to 100000"),
        (
            "ddim",
            {"timestep_spacing": ["leading"]},
            r"timestep_spacing = \['leading'\] must be a short string",
        ),
        (
            "dpmpp_2m",
            {"use_karras_sigmas": "yes"},
            "use_karras_sigmas = 'yes' must be true or false, or null",
        ),
        ("dpmpp_2m", {"sigma_min": -1}, "sigma_min = -1 must be a number from 1e-06 to 1e"),
        ("ddim", {"clip_sample": True}, "clip_sample = True: not supported.*set it to false"),
        ("ddpm", {"thresholding": True}, "thresholding = True: not supported"),
        ("ddpm", {"variance_type": "learned_range"}, "variance_type = 'learned_range'.*set it to \"fixed_sm"),
        ("pndm", {"skip_prk_steps": False}, "skip_prk_steps = false: not supported"),
        ("pndm", {"_class_name": "PNDMScheduler"}, "skip_prk_steps = false: not supported"),
        ("euler", {"use_beta_sigmas": True}, "use_beta_sigmas = True: not supported"),
        ("euler", {"timestep_type": "continuous"}, "timestep_type = 'continuous': not supported"),
        (
            "euler",
            {"interpolation_type": "loglinear"},
            "interpolation_type = 'loglinear'.*did you mean 'log_linear'",
        ),
        ("euler", {"final_sigmas_type": "sigma"}, "final_sigmas_type = 'sigma'.*did you mean 'sigma_min'"),
        ("euler_ancestral", {"steps_offset": 101, "timestep_spacing": "leading"}, "steps_offset = 101"),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type = 'sde-dpmsolver"),
        ("dpmpp_2m", {"solver_order": 3}, "solver_order = 3: not supported.*set it to 2"),
        ("dpmpp_2m", {"solver_type": "heun"}, "solver_type = 'heun': not supported"),
        ("dpmpp_2m", {"lambda_min_clipped": -5.1}, r"lambda_min_clipped = -5\.1: not supported"),
        ("dpmpp_2m", {"variance_type": "learned"}, "variance_type = 'learned': not supported"),
        ("dpmpp_2m", {"use_lu_lambdas": True}, "use_lu_lambdas = True: not supported"),
    ],
)
def test_what_is_not_computed_is_refused_by_key_and_value(
    name: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(name, SCHEDULE, config, 10)


@each_row(
    ("name", "key", "value"),
    [("ddim", "clip_sample", False), ("ddpm", "clip_sample", False), ("pndm", "skip_prk_steps", True)],
)
def test_two_absent_keys_do_not_take_the_default_of_the_class(name: str, key: str, value: bool) -> None:
    """docs/sampling.md: by design, as latents are not bounded and Runge-Kutta steps are not computed."""
    diffusers = pytest.importorskip("diffusers")
    theirs = inspect.signature(getattr(diffusers, SAMPLERS[name].scheduler).__init__).parameters
    assert theirs[key].default is not value
    absent, spelt = (make_sampler(name, SCHEDULE, config, 10) for config in ({}, {key: value}))
    for ours, expected in zip(jax.tree.leaves(absent), jax.tree.leaves(spelt), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_keys_of_other_schedulers_are_not_read() -> None:
    config = {"skip_prk_steps": False, "clip_sample": True, "variance_type": "fixed_small", "solver_order": 3}
    make_sampler("euler", SCHEDULE, config, 10)


@each_row(
    ("name", "steps", "strength", "message"),
    [
        ("dpm2m", 10, 1.0, "sampler = 'dpm2m': unknown; did you mean 'dpmpp_2m'"),
        ("ddim", 0, 1.0, "num_inference_steps = 0.*between 1 and the schedule's 1000"),
        ("euler", 1001, 1.0, "num_inference_steps = 1001.*between 1 and the schedule's 1000"),
        ("dpmpp_2m", 1000, 1.0, "num_inference_steps = 1000.*at most 999 steps"),
        ("ddim", 10, 1.5, r"strength = 1\.5: must be between 0 and 1"),
        (
            "ddim",
            3,
            0.3,
            r"strength = 0\.3: takes none of num_inference_steps = 3; .* at least 1 / 3",
        ),
    ],
)
def test_refused_arguments(name: str, steps: int, strength: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(name, SCHEDULE, {}, steps, strength=strength)
