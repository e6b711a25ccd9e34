"""Every sampler against the diffusers scheduler that it is equal to, and against the pipelines that call it.

Both sides call the same fixed nonlinear network, written in JAX and in torch, on the same noise.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspo_jax.samplers import SAMPLERS, TIMESTEP_SPACINGS, make_sampler
from dspo_jax.schedule import Schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# diffusers hands torch tensors to NumPy in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RNG = np.random.default_rng(0)
SHAPE = (2, 4, 4, 4)
NOISE, IMAGE = (RNG.normal(size=SHAPE).astype(np.float32) for _ in range(2))
STEP_NOISE = RNG.normal(size=(51, *SHAPE)).astype(np.float32)
MIX = RNG.normal(size=(4, 4)).astype(np.float32) * 0.4

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# What the classes default to and no latent model wants.
WANTED = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
}
TOLERANCE = 1e-4


def network(x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.tanh(0.3 * x + x @ MIX + jnp.sin(t / 300))


def torch_network(x: Any, t: Any) -> Any:
    return torch.tanh(0.3 * x + x @ torch.from_numpy(MIX) + torch.sin(t / 300))


@jax.jit
def run(sampler: Any, noise: jax.Array, image: jax.Array | None = None) -> jax.Array:
    """One program for all samplers of the same sizes."""
    return sampler.run(network, sampler.start(noise, image), lambda i: jnp.asarray(STEP_NOISE)[i])


@pytest.fixture(autouse=True)
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' schedulers draw `STEP_NOISE`, each run from its beginning."""
    for scheduler in (diffusers.DDPMScheduler, diffusers.EulerAncestralDiscreteScheduler):
        draws = iter(STEP_NOISE)

        def set_timesteps(self: Any, *args: Any, real: Any = scheduler.set_timesteps, **kwargs: Any) -> None:
            nonlocal draws
            draws = iter(STEP_NOISE)
            real(self, *args, **kwargs)

        def randn_tensor(shape: Any, **kwargs: Any) -> Any:
            noise = torch.from_numpy(next(draws))
            return noise if noise.shape == shape else noise.permute(0, 3, 1, 2)

        monkeypatch.setattr(scheduler, "set_timesteps", set_timesteps)
        monkeypatch.setitem(scheduler.step.__globals__, "randn_tensor", randn_tensor)


def make_scheduler(name: str, **settings: Any) -> Any:
    scheduler = SAMPLERS[name].scheduler
    return getattr(diffusers, scheduler)(**{**STABLE_DIFFUSION, **WANTED.get(scheduler, {}), **settings})


def their_latents(scheduler: Any, num_inference_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The latents that diffusers ends with, and its timesteps."""
    scheduler.set_timesteps(num_inference_steps)
    x = torch.from_numpy(NOISE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = torch_network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(prediction, t, x).prev_sample
    return x.numpy(), scheduler.timesteps.numpy()


def assert_same(name: str, num_inference_steps: int, **settings: Any) -> None:
    scheduler = make_scheduler(name, **settings)
    config = dict(scheduler.config)
    sampler = make_sampler(name, Schedule.from_config(config), config, num_inference_steps)
    theirs, timesteps = their_latents(scheduler, num_inference_steps)
    label = f"{name}, {num_inference_steps} steps, {settings}"
    np.testing.assert_allclose(sampler.timesteps, timesteps, rtol=1e-5, atol=1e-3, err_msg=label)
    assert_close(run(sampler, NOISE), theirs, label)


def assert_close(ours: jax.Array, theirs: np.ndarray, label: str) -> None:
    assert np.isfinite(theirs).all(), label
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    assert error < TOLERANCE, f"{label}: {error}"


@pytest.mark.parametrize("timestep_spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_match_diffusers(name: str, prediction_type: str, timestep_spacing: str) -> None:
    settings = {"prediction_type": prediction_type, "timestep_spacing": timestep_spacing}
    for steps in (
        1,
        2,
        3,
        7,
        10,
        25,
        50,
    ):  # 3 and 7 do not divide 1000; from 15 on DPM-Solver++ ends otherwise
        for offset in (0, 1) if timestep_spacing == "leading" else (0,):
            assert_same(name, steps, steps_offset=offset, **settings)
