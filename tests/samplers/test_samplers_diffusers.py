"""Every sampler against the diffusers scheduler that it is equal to, and against the pipelines that call it.

Both sides call the same fixed nonlinear network, written in JAX and in torch, on the same noise.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.samplers import SAMPLERS, TIMESTEP_SPACINGS, State, make_sampler, own_sampler, samplers_of
from dspo_jax.schedules.variance_preserving import Schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# diffusers hands torch tensors to NumPy in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = samplers_of(Schedule.scaled_linear())
RNG = np.random.default_rng(0)
SHAPE = (2, 4, 6, 4)
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
# 3 and 7 do not divide 1000; from 15 on DPM-Solver++ ends otherwise.
STEPS = (1, 2, 3, 7, 10, 25, 50)
TOLERANCE = 2e-5


def network(x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.tanh(0.3 * x + x @ MIX + jnp.sin(t / 300))


def torch_network(x: Any, t: Any) -> Any:
    return torch.tanh(0.3 * x + x @ torch.from_numpy(MIX) + torch.sin(t / 300))


@jax.jit
def run(sampler: Any, noise: jax.Array, image: jax.Array | None = None) -> jax.Array:
    """One program for all samplers of the same sizes."""
    return sampler.run(network, sampler.start(noise, image), lambda i: jnp.asarray(STEP_NOISE)[i])


class Draws:
    """Stands for a torch generator: gives the rows of `STEP_NOISE` one after the other."""

    def __init__(self) -> None:
        self.rows = iter(STEP_NOISE)

    def randn_tensor(self, shape: Any) -> Any:
        noise = torch.from_numpy(next(self.rows))
        return noise if noise.shape == shape else noise.permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' schedulers draw from the `Draws` that they are given as generator."""
    for scheduler in (
        diffusers.DDIMScheduler,
        diffusers.DDPMScheduler,
        diffusers.EulerAncestralDiscreteScheduler,
    ):
        monkeypatch.setitem(
            scheduler.step.__globals__,
            "randn_tensor",
            lambda shape, generator, **_: generator.randn_tensor(shape),
        )


def make_scheduler(name: str, **settings: Any) -> Any:
    scheduler = SAMPLERS[name].scheduler
    return getattr(diffusers, scheduler)(**{**STABLE_DIFFUSION, **WANTED.get(scheduler, {}), **settings})


def their_latents(scheduler: Any, num_inference_steps: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The latents that diffusers ends with, and its timesteps; options are of its `step`."""
    scheduler.set_timesteps(num_inference_steps)
    x = torch.from_numpy(NOISE) * scheduler.init_noise_sigma
    stochastic = "generator" in inspect.signature(scheduler.step).parameters
    options |= {"generator": Draws()} if stochastic else {}
    for t in scheduler.timesteps:
        prediction = torch_network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(prediction, t, x, **options).prev_sample
    return x.numpy(), scheduler.timesteps.numpy()


def assert_same(name: str, num_inference_steps: int, tolerance: float = TOLERANCE, **settings: Any) -> None:
    scheduler = make_scheduler(name, **settings)
    config = json.loads(scheduler.to_json_string())
    assert own_sampler(config) == name
    sampler = make_sampler(name, Schedule.from_config(config), config, num_inference_steps)
    theirs, timesteps = their_latents(scheduler, num_inference_steps)
    label = f"{name}, {num_inference_steps} steps, {settings}"
    np.testing.assert_allclose(sampler.timesteps, timesteps, rtol=1e-5, atol=1e-3, err_msg=label)
    assert_close(run(sampler, NOISE), theirs, label, tolerance)


def assert_close(ours: jax.Array, theirs: np.ndarray, label: str, tolerance: float = TOLERANCE) -> None:
    assert np.isfinite(theirs).all(), label
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    assert error < tolerance, f"{label}: {error}"


@pytest.mark.ci
@each_row("timestep_spacing", TIMESTEP_SPACINGS)
@each_row("prediction_type", ["epsilon", "v_prediction"])
@each_row("name", NAMES)
def test_latents_match_diffusers(name: str, prediction_type: str, timestep_spacing: str) -> None:
    settings = {"prediction_type": prediction_type, "timestep_spacing": timestep_spacing}
    for steps in STEPS:
        for offset in (0, 1) if timestep_spacing == "leading" else (0,):
            assert_same(name, steps, steps_offset=offset, **settings)


KARRAS = {"use_karras_sigmas": True}
FINAL = {"final_sigmas_type": "sigma_min"}


@each_row("prediction_type", ["epsilon", "v_prediction"])
@each_row(
    ("name", "settings"),
    [
        ("ddim", {"set_alpha_to_one": False}),
        ("ddim", {"beta_schedule": "linear"}),
        ("ddpm", {"num_train_timesteps": 130}),
        ("pndm", {"set_alpha_to_one": True}),
        ("euler", KARRAS),
        ("euler", {**KARRAS, "timestep_spacing": "leading", "steps_offset": 1}),
        ("euler", {**KARRAS, "sigma_min": 0.1, "sigma_max": 12.0}),
        ("euler", {"interpolation_type": "log_linear"}),
        ("euler", {**KARRAS, "interpolation_type": "log_linear"}),
        ("euler", FINAL),
        ("dpmpp_2m", KARRAS),
        ("dpmpp_2m", {**KARRAS, **FINAL}),
        ("dpmpp_2m", FINAL),
        ("dpmpp_2m", {**FINAL, "lower_order_final": False}),
        ("dpmpp_2m", {"lower_order_final": False}),
        ("dpmpp_2m", {**FINAL, "euler_at_final": True, "timestep_spacing": "trailing"}),
    ],
)
def test_what_a_config_can_choose_matches_diffusers(
    name: str, settings: dict[str, Any], prediction_type: str
) -> None:
    for steps in (1, 10, 25):
        assert_same(name, steps, prediction_type=prediction_type, **settings)


@each_row("set_alpha_to_one", [True, False])
@each_row("timestep_spacing", TIMESTEP_SPACINGS)
@each_row("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_with_eta_matches_diffusers(
    prediction_type: str, timestep_spacing: str, set_alpha_to_one: bool
) -> None:
    scheduler = make_scheduler(
        "ddim",
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        set_alpha_to_one=set_alpha_to_one,
    )
    config = json.loads(scheduler.to_json_string())
    schedule = Schedule.from_config(config)
    for steps, eta in ((1, 0.5), (7, 1.0), (50, 0.3), (50, 1.0)):
        sampler = make_sampler("ddim", schedule, config, steps, eta=eta)
        theirs, _ = their_latents(scheduler, steps, eta=eta)
        assert_close(run(sampler, NOISE), theirs, f"{steps} steps, eta {eta}")


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@each_row("timestep_spacing", TIMESTEP_SPACINGS)
@each_row(
    ("name", "settings"),
    [
        *((name, {}) for name in NAMES if name != "pndm"),
        ("ddim", {"set_alpha_to_one": False}),
        ("euler", KARRAS),
        ("dpmpp_2m", KARRAS),
        ("dpmpp_2m", FINAL),
    ],
)
def test_zero_terminal_snr_matches_diffusers(
    name: str, settings: dict[str, Any], timestep_spacing: str
) -> None:
    """Trailing and linspace begin at the last timestep, where abar is 0; the sigma samplers take 4096 there.

    Near 4096 float32 has a number every 2.4e-4 to 4.9e-4: diffusers' Euler steps from there lose as much.
    With 25 of Karras's levels, of which several are on one timestep, its DPM-Solver++ ends in an IndexError.
    """
    tolerance = 1e-3 if name.startswith("euler") else TOLERANCE
    for steps in (1, 7, 20):
        assert_same(name, steps, tolerance, timestep_spacing=timestep_spacing, **ZERO_SNR, **settings)


@each_row("name", ["euler", "euler_ancestral"])
def test_an_euler_step_from_zero_terminal_snr_in_float64(name: str) -> None:
    config = {**STABLE_DIFFUSION, **ZERO_SNR, "timestep_spacing": "trailing", "num_train_timesteps": 1000}
    sampler = make_sampler(name, Schedule.from_config(config), config, 1)
    sigma = np.sqrt(2.0**24 - 1)
    x = sigma * NOISE.astype(np.float64)
    scaled = x / np.sqrt(1 + sigma**2)
    v = np.tanh(0.3 * scaled + scaled @ MIX.astype(np.float64) + np.sin(999 / 300))
    expected = x / (1 + sigma**2) - sigma / np.sqrt(1 + sigma**2) * v  # x_0 of v (Karras et al., Table 1)
    np.testing.assert_allclose(run(sampler, NOISE), expected, atol=2e-6)


def test_ddim_with_eta_at_zero_terminal_snr_matches_diffusers() -> None:
    scheduler = make_scheduler("ddim", timestep_spacing="trailing", **ZERO_SNR)
    config = json.loads(scheduler.to_json_string())
    schedule = Schedule.from_config(config)
    for steps, eta in ((1, 0.5), (7, 0.5), (25, 0.9)):
        sampler = make_sampler("ddim", schedule, config, steps, eta=eta)
        assert sampler.timesteps[0] == 999
        theirs, _ = their_latents(scheduler, steps, eta=eta)
        assert_close(run(sampler, NOISE), theirs, f"{steps} steps, eta {eta}")
    # Their float32 rounds the noise that is kept at eta 1, none, below 0: NaN, where theory has their DDPM.
    theirs, _ = their_latents(make_scheduler("ddpm", timestep_spacing="trailing", **ZERO_SNR), 25)
    ours = run(make_sampler("ddim", schedule, config, 25, eta=1.0), NOISE)
    assert_close(ours, theirs, "25 steps, eta 1")


def test_pndm_at_zero_terminal_snr_is_refused() -> None:
    """diffusers' class does not read the key, and divides by abar."""
    assert "rescale_betas_zero_snr" not in make_scheduler("pndm").config
    config = {**STABLE_DIFFUSION, **ZERO_SNR, "num_train_timesteps": 1000}
    with pytest.raises(ValueError, match=r"sampler 'pndm': rescale_betas_zero_snr = true.* ddim$"):
        make_sampler("pndm", Schedule.from_config(config), config, 10)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_mean_and_deviation_of_a_ddim_step_match_diffusers(set_alpha_to_one: bool) -> None:
    scheduler = make_scheduler("ddim", set_alpha_to_one=set_alpha_to_one, steps_offset=1)
    config = json.loads(scheduler.to_json_string())
    for eta in (0.0, 0.4, 1.0):
        sampler = make_sampler("ddim", Schedule.from_config(config), config, 10, eta=eta)
        scheduler.set_timesteps(10)
        for i, t in enumerate(scheduler.timesteps):
            mean, with_ones = (
                scheduler.step(
                    torch_network(torch.from_numpy(NOISE), t),
                    t,
                    torch.from_numpy(NOISE),
                    eta=eta,
                    variance_noise=torch.full(SHAPE, value),
                ).prev_sample.numpy()
                for value in (0.0, 1.0)
            )
            ours, deviation = sampler.transition(network, State(jnp.asarray(NOISE)), i)
            assert_close(ours.latents, mean, f"mean of step {i}, eta {eta}")
            np.testing.assert_allclose(deviation, np.mean(with_ones - mean), rtol=1e-4, atol=1e-7)
            assert (deviation == 0) == (eta == 0 or (i == 9 and set_alpha_to_one))


@each_row("name", NAMES)
def test_default_spacing_and_final_step_are_the_schedulers(name: str) -> None:
    """A config without those keys, as older published ones are."""
    config = {**STABLE_DIFFUSION, "num_train_timesteps": 1000}
    theirs, _ = their_latents(make_scheduler(name), 10)
    assert_close(run(make_sampler(name, Schedule.from_config(config), config, 10), NOISE), theirs, name)


def test_what_diffusers_pipelines_replace_in_a_config(tiny_model: Path) -> None:
    """docs/sampling.md says it beside what is done here."""
    scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION, steps_offset=0)
    assert scheduler.config.clip_sample
    with pytest.warns(FutureWarning, match="steps_offset"):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            tiny_model, scheduler=scheduler, local_files_only=True
        )
    assert pipe.scheduler.config.steps_offset == 1
    assert pipe.scheduler.config.clip_sample is False


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    """diffusers' image-to-image pipeline, whose UNet is `torch_network`."""
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(tiny_model, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    def forward(x: Any, t: Any, **_: Any) -> Any:
        return (torch_network(x.permute(0, 2, 3, 1), t).permute(0, 3, 1, 2),)

    pipe.unet.forward = forward
    return pipe


@pytest.mark.ci
@each_row(
    ("name", "settings"),
    [*((name, {}) for name in NAMES), ("euler", KARRAS), ("dpmpp_2m", KARRAS)],
)
def test_image_to_image_matches_diffusers_pipeline(
    name: str, settings: dict[str, Any], pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_latents = diffusers.StableDiffusionImg2ImgPipeline.prepare_latents
    first_noise, image = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (NOISE, IMAGE))
    monkeypatch.setitem(prepare_latents.__globals__, "randn_tensor", lambda *_, **__: first_noise)
    pipeline.scheduler = make_scheduler(name, steps_offset=1, **settings)
    config = json.loads(pipeline.scheduler.to_json_string())
    for strength in (0.1, 0.3, 0.75, 0.9, 1.0):
        theirs = pipeline(
            image=image,
            prompt_embeds=torch.zeros(2, 77, 12),
            num_inference_steps=10,
            strength=strength,
            guidance_scale=1.0,
            generator=Draws(),
            output_type="latent",
        ).images
        sampler = make_sampler(name, Schedule.from_config(config), config, 10, strength=strength)
        ours = run(sampler, NOISE, IMAGE)
        assert_close(ours, theirs.permute(0, 2, 3, 1).numpy(), f"{name}, strength {strength}")
