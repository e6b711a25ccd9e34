"""One step of a sampler as a function: what runs, rollouts, log-probabilities and gradients share."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ROOT

from dspo_jax.samplers import (
    TIMESTEP_SPACINGS,
    Sampler,
    State,
    log_probability,
    make_sampler,
    samplers_of,
)
from dspo_jax.schedules.variance_preserving import Schedule

SCHEDULE = Schedule.scaled_linear()
SHAPE = (3, 4, 2, 4)
RNG = np.random.default_rng(0)
LATENTS, REACHED = (RNG.normal(size=SHAPE).astype(np.float32) for _ in range(2))
MIX = RNG.normal(size=(4, 4)).astype(np.float32) * 0.4
STEPS = 6
# With and without noise of its own.
ALL = [*((name, 0.0) for name in samplers_of(SCHEDULE)), ("ddim", 0.7)]


def network(weight: jax.Array | float, x: jax.Array, t: jax.Array) -> jax.Array:
    t = t.reshape(t.shape + (1,) * (4 - t.ndim)) if t.ndim else t
    return weight * jnp.tanh(0.3 * x + x @ MIX + jnp.sin(t / 300))


predict = functools.partial(network, 1.0)


def draw(i: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(1), i), SHAPE)


def make(name: str, eta: float, timestep_spacing: str = "leading", **changes: Any) -> Sampler:
    return make_sampler(name, SCHEDULE, {"timestep_spacing": timestep_spacing}, STEPS, eta=eta, **changes)


def roll_out(sampler: Sampler) -> State:
    return jax.jit(lambda x: sampler.rollout(predict, sampler.start(x), draw))(LATENTS)


@pytest.mark.ci
@pytest.mark.parametrize("timestep_spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize(("name", "eta"), ALL)
def test_a_run_is_the_last_state_of_a_rollout_bit_for_bit(
    name: str, eta: float, timestep_spacing: str
) -> None:
    """The sampler is a constant of the program, as in `ImageSampler`."""
    sampler = make(name, eta, timestep_spacing)
    states = roll_out(sampler)
    clean = jax.jit(lambda x: sampler.run(predict, sampler.start(x), draw))(LATENTS)
    assert states.latents.shape == (len(sampler.timesteps) + 1, *SHAPE)
    np.testing.assert_array_equal(states.latents[-1], clean)
    np.testing.assert_allclose(states.latents[0], sampler.start(LATENTS).latents, rtol=1e-6)


@pytest.mark.parametrize(("name", "eta"), ALL)
def test_states_follow_from_one_another_by_the_transition(name: str, eta: float) -> None:
    sampler = make(name, eta)
    states = roll_out(sampler)
    step = jax.jit(lambda state, i: sampler.transition(predict, state, i))
    deviations = []
    for i in range(len(sampler.timesteps)):
        state, following = (jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in (i, i + 1))
        mean, deviation = step(state, i)
        deviations.append(float(deviation))
        reached = mean._replace(latents=mean.latents + deviation * draw(jnp.int32(i)))
        for ours, kept in zip(jax.tree.leaves(reached), jax.tree.leaves(following), strict=True):
            np.testing.assert_allclose(ours, kept, rtol=1e-4, atol=1e-5)
    if name in ("ddpm", "euler_ancestral") or eta:
        assert min(deviations[:-1]) > 0.01
    else:
        assert set(deviations) == {0.0}


def test_only_multistep_samplers_keep_outputs() -> None:
    kept = {name: len(make(name, 0.0).start(LATENTS).outputs) for name in samplers_of(SCHEDULE)}
    assert kept == {"ddim": 0, "ddpm": 0, "dpmpp_2m": 1, "euler": 0, "euler_ancestral": 0, "pndm": 4}


@pytest.mark.parametrize(("name", "eta"), [("dpmpp_2m", 0.0), ("euler_ancestral", 0.0), ("ddim", 1.0)])
def test_every_image_may_be_at_a_step_of_its_own(name: str, eta: float) -> None:
    sampler = make(name, eta)
    states = roll_out(sampler)
    calls = jnp.asarray([4, 0, 2])
    mixed = jax.tree.map(lambda leaf: leaf[calls, jnp.arange(3)], states)
    mean, deviation = sampler.transition(predict, mixed, calls)
    assert deviation.shape == (3,)
    for image, i in enumerate(calls.tolist()):
        state = jax.tree.map(lambda leaf, i=i: leaf[i], states)
        alone, its_deviation = sampler.transition(predict, state, i)
        np.testing.assert_allclose(deviation[image], its_deviation)
        for ours, theirs in zip(jax.tree.leaves(mean), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(ours[image], theirs[image], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("deviation", [0.3, [0.02, 1.0, 2.5]])
def test_log_probability_is_the_density_of_a_gaussian(deviation: float | list[float]) -> None:
    mean = 0.9 * REACHED + 0.05 * LATENTS
    ours = log_probability(jnp.asarray(REACHED), jnp.asarray(mean), jnp.float32(deviation))
    wide = np.broadcast_to(np.asarray(deviation, np.float64), 3)[:, None, None, None]
    residual = REACHED.astype(np.float64) - mean
    density = np.exp(-(residual**2) / (2 * wide**2)) / (wide * math.sqrt(2 * math.pi))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, np.log(density).sum((1, 2, 3)), rtol=1e-4)


def test_rounded_states_shift_a_ratio_by_more_than_the_clip() -> None:
    """Why trajectories are float32: the last of 50 steps deviates by 0.0206, and the clip is 1e-4."""
    config = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    sampler = make_sampler("ddim", SCHEDULE, config, 50, eta=1.0)
    assert sampler.step_noise is not None
    deviation = sampler.step_noise[-1]
    assert deviation == pytest.approx(0.0206, abs=5e-5)
    z, x = np.random.default_rng(1).normal(size=(2, 1, 64, 64, 4)).astype(np.float32)
    reached = jnp.asarray(x + deviation * z)

    def mean_log_p(reached: jax.Array) -> float:
        return float(log_probability(reached, jnp.asarray(x), jnp.float32(deviation))[0]) / x.size

    def shift(dtype: Any) -> float:
        return mean_log_p(reached.astype(dtype).astype(jnp.float32)) - mean_log_p(reached)

    assert shift(jnp.bfloat16) < -20 * 1e-4
    assert abs(shift(jnp.float16)) < 1e-4


def test_a_step_without_noise_has_no_density() -> None:
    assert jnp.isnan(log_probability(jnp.asarray(REACHED), jnp.asarray(REACHED), jnp.float32(0))).all()


def test_the_gradient_of_a_log_probability_is_that_of_finite_differences() -> None:
    sampler, i = make("ddim", 1.0), 3
    assert sampler.step_noise is not None
    columns = (sampler.step_x[i], sampler.step_outputs[i, 0], sampler.step_noise[i])
    step_x, step_output, deviation = map(np.float64, columns)

    def objective(weight: jax.Array) -> jax.Array:
        mean, deviation = sampler.transition(
            functools.partial(network, weight), State(jnp.asarray(LATENTS)), i
        )
        return log_probability(jnp.asarray(REACHED), mean.latents, deviation).sum()

    def in_float64(weight: float) -> float:
        x = LATENTS.astype(np.float64)
        output = np.tanh(0.3 * x + x @ MIX + np.sin(sampler.timesteps[i] / 300))
        mean = step_x * x + step_output * weight * output
        return -(((REACHED - mean) / deviation) ** 2).sum() / 2

    expected = (in_float64(1 + 1e-5) - in_float64(1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(objective)(1.0), expected, rtol=1e-3)


@pytest.mark.parametrize(("name", "eta"), [("dpmpp_2m", 0.0), ("pndm", 0.0), ("ddim", 0.7)])
def test_transitions_taken_backwards_give_the_gradient_of_the_run(name: str, eta: float) -> None:
    """So the kept states are whole: what a multistep sampler remembers carries gradient, too."""
    sampler = make(name, eta)

    @jax.jit
    def through_the_run(weight: jax.Array) -> jax.Array:
        clean = sampler.run(functools.partial(network, weight), sampler.start(LATENTS), draw)
        return (clean * REACHED).sum()

    @jax.jit
    def back(state: State, i: jax.Array, ahead: State) -> tuple[jax.Array, State]:
        def step(weight: jax.Array, state: State) -> State:
            return sampler.transition(functools.partial(network, weight), state, i)[0]

        return jax.vjp(step, 1.0, state)[1](ahead)

    states = roll_out(sampler)
    ahead = jax.tree.map(lambda leaf: jnp.zeros(SHAPE), states)._replace(latents=jnp.asarray(REACHED))
    total = 0.0
    for i in reversed(range(len(sampler.timesteps))):
        part, ahead = back(jax.tree.map(lambda leaf, i=i: leaf[i], states), jnp.int32(i), ahead)
        total += float(part)
    np.testing.assert_allclose(total, jax.grad(through_the_run)(1.0), rtol=1e-4)


def test_the_example_of_the_documentation() -> None:
    page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    example: dict[str, Any] = {}
    exec(code, example)
    z, deviation = np.asarray(example["noise"](10), np.float64), float(example["sampler"].step_noise[10])
    expected = (-(z**2) / 2 - math.log(deviation) - math.log(2 * math.pi) / 2).sum((1, 2, 3))
    np.testing.assert_allclose(example["log_p"], expected, rtol=1e-4)
    assert example["states"].latents.shape == (51, 2, 8, 8, 4)
    assert example["sampler"].step_noise[-1] == 0
