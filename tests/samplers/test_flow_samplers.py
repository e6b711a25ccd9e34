"""Samplers of rectified flow against diffusers' schedulers, closed forms on a Gaussian, and refusals.

Both sides call the same fixed nonlinear network, written in JAX and in torch, on the same noise.
"""

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.samplers import State, log_probability, make_sampler, own_sampler, samplers_of
from dspo_jax.schedules.rectified_flow import RectifiedFlow
from dspo_jax.schedules.variance_preserving import Schedule

RNG = np.random.default_rng(0)
SHAPE = (2, 4, 6, 4)
NOISE, IMAGE = (RNG.normal(size=SHAPE).astype(np.float32) for _ in range(2))
MIX = RNG.normal(size=(4, 4)).astype(np.float32) * 0.4
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLOW = RectifiedFlow.from_config(EULER)
STOCHASTIC = ("flow_ancestral", "flow_grpo")


def network(x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.tanh(0.3 * x + x @ MIX + jnp.sin(t / 300))


@jax.jit
def run(sampler: Any, image: jax.Array | None = None) -> jax.Array:
    """One program for all samplers of the same sizes."""
    return sampler.run(network, sampler.start(NOISE, image), lambda i: jnp.zeros(SHAPE))


CLASSES = {
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
    "flow_heun": "FlowMatchHeunDiscreteScheduler",
    "flow_dpmpp_2m": "DPMSolverMultistepScheduler",
}


def make_scheduler(name: str, shift: float) -> Any:
    diffusers = pytest.importorskip("diffusers")
    if name == "flow_dpmpp_2m":
        return diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
        )
    return getattr(diffusers, CLASSES[name])(shift=shift)


def their_latents(scheduler: Any, x: np.ndarray, first: int = 0) -> np.ndarray:
    torch = pytest.importorskip("torch")
    latents = torch.from_numpy(x)
    for t in scheduler.timesteps[first:]:
        prediction = torch.tanh(0.3 * latents + latents @ torch.from_numpy(MIX) + torch.sin(t / 300))
        latents = scheduler.step(prediction, t, latents).prev_sample
    return latents.numpy()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@each_row("shift", [1.0, 3.0])
@each_row("name", CLASSES)
def test_latents_match_diffusers(name: str, shift: float) -> None:
    for steps in (1, 2, 4, 10, 28, 50):
        scheduler = make_scheduler(name, shift)
        config = json.loads(scheduler.to_json_string())
        assert own_sampler(config) == name
        scheduler.set_timesteps(steps)
        sampler = make_sampler(name, RectifiedFlow.from_config(config), config, steps)
        label = f"{name}, {steps} steps, shift {shift}"
        np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), rtol=2e-7, err_msg=label)
        if name == "flow_dpmpp_2m":
            assert sampler.timesteps.dtype == np.int32
        theirs = their_latents(scheduler, NOISE)
        # Their Heun step divides a rounded difference by the level it ends at, down to 0.001.
        tolerance = (1e-4 if name == "flow_heun" else 2e-5) * np.abs(theirs).max()
        np.testing.assert_allclose(run(sampler), theirs, atol=tolerance, err_msg=label)


def test_the_grid_of_stable_diffusion_3() -> None:
    """Its last level is shifted twice: .00893, where once would give .00299."""
    sampler = make_sampler("flow_euler", FLOW, EULER, 28)
    times = np.asarray(sampler.timesteps) / 1000
    stated = [1, 0.98738, 0.97411, 0.1998, 0.1109, 0.00893]
    np.testing.assert_allclose(times[[0, 1, 2, -3, -2, -1]], stated, atol=6e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@each_row("name", ["flow_euler", "flow_heun"])
def test_image_to_image_starts_where_diffusers_pipeline_does(name: str) -> None:
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    for steps, strength in ((10, 0.3), (10, 0.35), (10, 0.6), (28, 0.5), (7, 0.75), (10, 1.0)):
        pipe = object.__new__(diffusers.StableDiffusion3Img2ImgPipeline)
        object.__setattr__(pipe, "scheduler", make_scheduler(name, 3.0))
        pipe.scheduler.set_timesteps(steps)
        timesteps, _ = pipe.get_timesteps(steps, strength, "cpu")
        start = pipe.scheduler.scale_noise(torch.from_numpy(IMAGE), timesteps[:1], torch.from_numpy(NOISE))
        theirs = their_latents(pipe.scheduler, start.numpy(), len(pipe.scheduler.timesteps) - len(timesteps))
        sampler = make_sampler(name, FLOW, EULER, steps, strength=strength)
        label = f"{name}, {steps} steps, strength {strength}"
        np.testing.assert_allclose(sampler.timesteps, timesteps.numpy(), rtol=2e-7, err_msg=label)
        np.testing.assert_allclose(run(sampler, IMAGE), theirs, atol=1e-4, err_msg=label)


def test_an_image_is_forgotten_at_strength_1() -> None:
    sampler = make_sampler("flow_euler", FLOW, EULER, 10)
    np.testing.assert_array_equal(sampler.start(NOISE, 100 * IMAGE).latents, NOISE)


def test_without_noise_the_ancestral_step_is_eulers_bit_for_bit() -> None:
    """And Flow-GRPO's is."""
    for steps in (1, 2, 4, 10, 28, 50):
        euler = make_sampler("flow_euler", FLOW, EULER, steps)
        for name in STOCHASTIC:
            other = make_sampler(name, FLOW, EULER, steps, eta=0.0)
            assert jax.tree.structure(other) == jax.tree.structure(euler)
            for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(euler), strict=True):
                np.testing.assert_array_equal(ours, theirs)


def parts(sampler: Any) -> Iterator[tuple[float, float, float, float, float]]:
    """Levels t and s of each step, and what x_s has of the image, of the noise, and of new noise.

    With x_t = (1 - t) x_0 + t eps and the velocity eps - x_0, which is right for any image.
    """
    levels = [*np.asarray(sampler.timesteps, np.float64) / 1000, 0.0]
    news = np.zeros(len(levels) - 1) if sampler.step_noise is None else sampler.step_noise
    rows = zip(sampler.step_x, sampler.step_outputs[:, 0], news, strict=True)
    for (t, s), (of_x, of_v, new) in zip(itertools.pairwise(levels), rows, strict=True):
        yield t, s, of_x * (1 - t) - of_v, of_x * t + of_v, new


def test_ancestral_steps_keep_the_marginals_exactly_at_every_eta() -> None:
    """Of any Gaussian of images, N(m, d^2): (1 - s) m and (1 - s)^2 d^2 + s^2, however few the steps."""
    mean, deviation = 1.7, 1.3
    for steps, eta in itertools.product((1, 2, 4, 10, 28, 50), (0.0, 0.3, 0.7, 1.0)):
        for _, s, image, noise, new in parts(make_sampler("flow_ancestral", FLOW, EULER, steps, eta=eta)):
            assert image * mean == pytest.approx((1 - s) * mean, abs=1e-6)
            variance = image**2 * deviation**2 + noise**2 + new**2
            assert variance == pytest.approx((1 - s) ** 2 * deviation**2 + s**2, abs=1e-6)


def test_steps_of_flow_grpo_have_too_much_noise() -> None:
    """By what its docstring says."""
    eta = 0.7
    for i, (t, s, image, noise, new) in enumerate(parts(make_sampler("flow_grpo", FLOW, EULER, 10, eta=eta))):
        assert image == pytest.approx(1 - s, abs=1e-6)
        if i:  # where t is 1, another level stands for it
            rate, d = eta**2 * t / (1 - t), s - t
            excess = noise**2 + new**2 - s**2
            assert excess == pytest.approx(rate * d**2 / t + rate**2 * d**2 / (4 * t**2), abs=1e-6)


@each_row("eta", [0.0, 0.5, 1.0])
def test_many_ancestral_steps_draw_a_gaussian(eta: float) -> None:
    """With the best prediction from x_t alone, E[eps - x_0 | x_t], which is linear in x_t."""
    mean, deviation = 1.7, 1.3
    errors = []
    for steps in (100, 1000):
        sampler = make_sampler("flow_ancestral", RectifiedFlow(), {}, steps, eta=eta)
        levels = [*np.asarray(sampler.timesteps, np.float64) / 1000, 0.0]
        news = np.zeros(steps) if sampler.step_noise is None else sampler.step_noise
        center, variance = 0.0, 1.0
        for t, of_x, of_v, new in zip(levels, sampler.step_x, sampler.step_outputs[:, 0], news, strict=False):
            slope = (t - (1 - t) * deviation**2) / ((1 - t) ** 2 * deviation**2 + t**2)
            factor = float(of_x) + float(of_v) * slope
            center = factor * center - float(of_v) * mean * (1 + slope * (1 - t))
            variance = factor**2 * variance + float(new) ** 2
        assert center == pytest.approx(mean, abs=0.02)
        errors.append(abs(variance**0.5 - deviation))
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 5


def posterior(x_t: np.ndarray, x_0: np.ndarray, t: float, s: float) -> tuple[np.ndarray, float]:
    """Mean and variance of q(x_s | x_t, x_0), by the product of the two Gaussians."""
    keep = (1 - t) / (1 - s)
    added = t**2 - keep**2 * s**2
    variance = 1 / (keep**2 / added + 1 / s**2)
    return variance * (keep * x_t / added + (1 - s) * x_0 / s**2), variance


def test_at_eta_1_the_ancestral_step_is_the_posterior() -> None:
    sampler = make_sampler("flow_ancestral", FLOW, EULER, 10, eta=1.0)
    levels = np.asarray(sampler.timesteps, np.float64) / 1000
    x = NOISE.astype(np.float64)
    for i in range(9):
        mean, deviation = sampler.transition(network, State(jnp.asarray(NOISE)), i)
        v = np.asarray(network(jnp.asarray(NOISE), jnp.float32(levels[i] * 1000)), np.float64)
        expected, variance = posterior(x, x - levels[i] * v, levels[i], levels[i + 1])
        np.testing.assert_allclose(mean.latents, expected, atol=2e-5)
        np.testing.assert_allclose(deviation, np.sqrt(variance), rtol=1e-5)
    assert sampler.step_noise is not None
    assert sampler.step_noise[-1] == 0


@each_row("name", STOCHASTIC)
def test_log_probability_of_a_step_in_float64(name: str) -> None:
    sampler, i = make_sampler(name, FLOW, EULER, 10, eta=0.7), 4
    levels = np.asarray(sampler.timesteps, np.float64) / 1000
    t, s = levels[i], levels[i + 1]
    x = NOISE.astype(np.float64)
    v = np.asarray(network(jnp.asarray(NOISE), jnp.float32(t * 1000)), np.float64)
    if name == "flow_grpo":
        std, dt = 0.7 * np.sqrt(t / (1 - t)), s - t
        expected = x * (1 + std**2 / (2 * t) * dt) + v * (1 + std**2 * (1 - t) / (2 * t)) * dt
        deviation = std * np.sqrt(-dt)
    else:
        deviation = 0.7 * s * np.sqrt(t**2 - ((1 - t) / (1 - s)) ** 2 * s**2) / t
        image, eps = x - t * v, x + (1 - t) * v
        expected = (1 - s) * image + np.sqrt(s**2 - deviation**2) * eps
    mean, found = sampler.transition(network, State(jnp.asarray(NOISE)), i)
    np.testing.assert_allclose(mean.latents, expected, atol=2e-5)
    np.testing.assert_allclose(found, deviation, rtol=1e-5)
    reached = expected + deviation * IMAGE
    density = -0.5 * IMAGE.astype(np.float64) ** 2 - np.log(deviation) - 0.5 * np.log(2 * np.pi)
    ours = log_probability(jnp.asarray(reached, jnp.float32), mean.latents, found)
    np.testing.assert_allclose(ours, density.sum((1, 2, 3)), rtol=1e-4)


def test_the_last_step_of_flow_grpo_has_noise() -> None:
    """As in its released code; where sigma is 1 the second level stands in 1 - sigma."""
    sampler = make_sampler("flow_grpo", FLOW, EULER, 10, eta=0.7)
    levels = np.asarray(sampler.timesteps, np.float64) / 1000
    assert sampler.step_noise is not None
    first = 0.7 * np.sqrt(1 / (1 - levels[1])) * np.sqrt(1 - levels[1])
    last = 0.7 * np.sqrt(levels[-1] / (1 - levels[-1])) * np.sqrt(levels[-1])
    np.testing.assert_allclose(sampler.step_noise[[0, -1]], [first, last], rtol=1e-5)


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"sampler 'ddim': does not reverse .* flow_euler, flow_ancestral, "):
        make_sampler("ddim", FLOW, EULER, 10)
    with pytest.raises(UserError, match=r"sampler 'flow_euler': does not reverse .* ddim, "):
        make_sampler("flow_euler", Schedule.scaled_linear(), {}, 10)
    with pytest.raises(
        UserError, match=r"eta = 0.5: sampler 'flow_heun' has none.*flow_ancestral, flow_grpo"
    ):
        make_sampler("flow_heun", FLOW, EULER, 10, eta=0.5)
    with pytest.raises(UserError, match=r"strength = 0: takes none"):
        make_sampler("flow_euler", FLOW, EULER, 10, strength=0)
    with pytest.raises(UserError, match=r"solver_order = 3: not supported"):
        make_sampler("flow_dpmpp_2m", FLOW, {**EULER, "solver_order": 3}, 10)
    assert samplers_of(FLOW)[0] == "flow_euler"


def test_every_image_may_be_at_a_step_of_its_own() -> None:
    sampler = make_sampler("flow_heun", FLOW, EULER, 4)
    states = jax.jit(lambda x: sampler.rollout(network, sampler.start(x)))(NOISE)
    calls = jnp.asarray([3, 0])
    mixed = jax.tree.map(lambda leaf: leaf[calls, jnp.arange(2)], states)
    predict = functools.partial(lambda x, t: network(x, t.reshape(-1, 1, 1, 1)))
    mean, _ = sampler.transition(predict, mixed, calls)
    for image, i in enumerate(calls.tolist()):
        np.testing.assert_allclose(mean.latents[image], states.latents[i + 1, image], atol=1e-5)
