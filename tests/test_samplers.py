"""DDIM against diffusers' DDIMScheduler with a fixed fake network."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspo_jax.samplers import ddim, ddim_settings, spaced_timesteps
from dspo_jax.schedule import Schedule

SPACINGS = ("leading", "trailing", "linspace")


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("timestep_spacing", SPACINGS)
def test_timesteps_match_diffusers(timestep_spacing):
    diffusers = pytest.importorskip("diffusers")
    for steps, offset in itertools.product((1, 2, 3, 7, 10, 50, 333, 500, 999), (0, 1)):
        theirs = diffusers.DDIMScheduler(timestep_spacing=timestep_spacing, steps_offset=offset)
        theirs.set_timesteps(steps)
        ours = spaced_timesteps(1000, steps, timestep_spacing=timestep_spacing, steps_offset=offset)
        np.testing.assert_array_equal(ours, theirs.timesteps.numpy())


@pytest.mark.parametrize("timestep_spacing", SPACINGS)
def test_as_many_distinct_timesteps_as_steps(timestep_spacing):
    for steps in range(1, 1001):
        timesteps = spaced_timesteps(1000, steps, timestep_spacing=timestep_spacing)
        assert timesteps.shape == (steps,)
        assert np.all(np.diff(timesteps) < 0)
        assert timesteps.min() >= 0
        assert timesteps.max() <= 999


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize(
    ("num_inference_steps", "steps_offset", "set_alpha_to_one"),
    [(4, 1, False), (7, 0, True), (20, 1, False)],  # 7 does not divide 1000
)
def test_ddim_matches_diffusers(
    prediction_type, timestep_spacing, num_inference_steps, steps_offset, set_alpha_to_one, latents
):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        set_alpha_to_one=set_alpha_to_one,
        clip_sample=False,
    )
    theirs.set_timesteps(num_inference_steps)
    x = torch.from_numpy(latents)
    for t in theirs.timesteps:
        x = theirs.step(torch.tanh(0.5 * x + t / 1000), t, x).prev_sample

    result = ddim(
        lambda x, t: jnp.tanh(0.5 * x + t / 1000),
        latents,
        Schedule.from_config(dict(theirs.config)),
        num_inference_steps=num_inference_steps,
        **ddim_settings(dict(theirs.config)),
    )
    np.testing.assert_allclose(result, x.numpy(), rtol=1e-4, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
def test_a_perfect_network_recovers_the_image(prediction_type, timestep_spacing, latents):
    schedule = Schedule.scaled_linear(prediction_type=prediction_type)
    image = np.linspace(-2, 2, latents.size, dtype=np.float32).reshape(latents.shape)

    def predict(x, t):
        alpha_bar = jnp.asarray(schedule.alphas_cumprod)[t]
        noise = (x - jnp.sqrt(alpha_bar) * image) / jnp.sqrt(1 - alpha_bar)
        return schedule.target(image, noise, jnp.full(2, t))

    result = ddim(predict, latents, schedule, num_inference_steps=10, timestep_spacing=timestep_spacing)
    np.testing.assert_allclose(result, image, atol=1e-4)


def test_is_one_scan_in_float32_under_jit(latents):
    traces = []

    def predict(x, t):
        traces.append((x.dtype, t.shape, t.dtype))
        return x.astype(jnp.bfloat16)

    sample = jax.jit(lambda x, schedule: ddim(predict, x, schedule, num_inference_steps=50))
    result = sample(latents, Schedule.scaled_linear())
    assert result.dtype == jnp.float32
    assert traces == [(jnp.float32, (), jnp.int32)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep_spacing": "trailin"}, "timestep_spacing = 'trailin'.*did you mean 'trailing'"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0.*between 1 and the schedule's 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps = 1001.*between 1 and the schedule's 1000"),
        ({"num_inference_steps": 1000, "steps_offset": 1}, r"steps_offset = 1: .*outside 0\.\.999"),
        ({"steps_offset": -1}, r"steps_offset = -1: .*outside 0\.\.999"),
    ],
)
def test_refuses_by_key_and_value(change, message, latents):
    settings = {"num_inference_steps": 10} | change
    with pytest.raises(ValueError, match=message):
        ddim(lambda x, t: x, latents, Schedule.scaled_linear(), **settings)


def test_settings_are_read_from_a_scheduler_config():
    config = {
        "_class_name": "PNDMScheduler",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }
    assert ddim_settings(config) == {"steps_offset": 1, "set_alpha_to_one": False}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"clip_sample": True}, "clip_sample = True: not supported"),
        ({"thresholding": True}, "thresholding = True: not supported"),
        ({"timestep_spacing": "karras"}, "timestep_spacing = 'karras'"),
    ],
)
def test_unsupported_scheduler_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ddim_settings(config)
