"""The written adjoint of a sampler against automatic and numerical differentiation, on a small network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspo_jax.samplers import make_sampler
from dspo_jax.samplers.adjoint import checkpoint_images, run_with_gradients
from dspo_jax.schedules.variance_preserving import Schedule

CALLS, SHAPE = 6, (2, 2, 2, 3)
KEYS = jax.random.split(jax.random.key(3), 6)
SCHEDULE = Schedule.scaled_linear()
CONFIG = {
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def network(theta, x, t):
    """A prediction that depends on x, t and all of theta."""
    return jnp.tanh(x @ theta["w"] + (theta["b"] * (t / 1000))[None, None, None]) @ theta["v"]


def make_theta():
    shapes = {"w": (3, 4), "b": (4,), "v": (4, 3)}
    return {
        name: jax.random.normal(key, shape, jnp.float64) / 2
        for key, (name, shape) in zip(KEYS, shapes.items(), strict=False)
    }


def make_case(eta):
    """The derivative that steps keep, the step, x_0 and the noise of the steps; all float64."""
    sampler = make_sampler("ddim", SCHEDULE, CONFIG, CALLS, eta=eta)
    scale, of_prediction, times, kept = (
        jnp.asarray(column, jnp.float64)
        for column in (sampler.step_x, sampler.step_outputs[:, 0], sampler.timesteps, sampler.kept)
    )
    deviation = (
        jnp.zeros(CALLS) if sampler.step_noise is None else jnp.asarray(sampler.step_noise, jnp.float64)
    )
    x = jax.random.normal(KEYS[4], SHAPE, jnp.float64)
    noise = jax.random.normal(KEYS[5], (CALLS, *SHAPE), jnp.float64)

    def step(theta, noise, x, i, detached=False):
        prediction = network(theta, x, times[i])
        if detached:
            prediction = jax.lax.stop_gradient(prediction)
        after = scale[i] * x + of_prediction[i] * prediction + deviation[i] * noise[i]
        return after, jnp.square(prediction).mean((1, 2, 3))

    return kept, step, x, noise


def reward(x):
    return jnp.sin(x).sum() + (x**2).mean()


def value_by_adjoint(theta, x, noise, case, attached):
    kept, step, *_ = case
    last, penalty = run_with_gradients(step, theta, noise, x, attached, kept)
    return reward(last) + (jnp.asarray([0.3, 0.7]) * penalty).sum()


def value_by_scan(theta, x, noise, case, attached):
    """The same by its definition: predictions that are not attached are constants, and so is x before all."""
    _, step, *_ = case
    first, total = int(np.argmax(attached)), 0.0
    for i in range(CALLS):
        if i == first and first:
            x = jax.lax.stop_gradient(x)
        x, penalty = step(theta, noise, x, i, detached=not attached[i])
        total += (jnp.asarray([0.3, 0.7]) * penalty).sum() if attached[i] else 0.0
    return reward(x) + total


ATTACHED = {
    "the last": [0, 0, 0, 0, 0, 1],
    "the last five": [0, 1, 1, 1, 1, 1],
    "all": [1] * CALLS,
    "with gaps": [0, 1, 0, 1, 1, 0],
}


@pytest.mark.parametrize("name", ATTACHED)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_adjoint_is_the_gradient_of_the_scan(name, eta):
    case, theta = make_case(eta), make_theta()
    *_, x, noise = case
    attached = np.array(ATTACHED[name], bool)
    expected = jax.value_and_grad(value_by_scan, (0, 1))(theta, x, noise, case, attached)
    run = jax.value_and_grad(value_by_adjoint, (0, 1))
    # Which steps are attached may be known only when the program runs.
    found = jax.jit(lambda theta, x, attached: run(theta, x, noise, case, attached))(theta, x, attached)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), found, expected)
    assert bool(jnp.any(found[1][1] != 0)) == bool(attached[0])


def test_the_adjoint_of_all_steps_is_the_derivative():
    case, theta = make_case(1.0), make_theta()
    *_, x, noise = case
    attached = jnp.ones(CALLS, bool)
    grads = jax.grad(value_by_adjoint, (0, 1))(theta, x, noise, case, attached)
    directions = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), (theta, x)
    )
    size = 1e-5

    def at(sign):
        moved = jax.tree.map(lambda leaf, way: leaf + sign * size * way, (theta, x), directions)
        return value_by_adjoint(*moved, noise, case, attached)

    slope = (at(1) - at(-1)) / (2 * size)
    along = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), grads, directions)))
    np.testing.assert_allclose(along, slope, rtol=1e-7)


def test_kept_is_the_derivative_with_the_prediction_fixed():
    for name in ("ddim", "ddpm", "euler"):
        sampler = make_sampler(name, SCHEDULE, CONFIG, CALLS)

        def after(x, i, sampler=sampler):
            state, _ = sampler.transition(lambda *_: jnp.ones(SHAPE, jnp.float32), sampler.start(x), i)
            return state.latents

        ones = jnp.ones(SHAPE, jnp.float32)
        for i in range(CALLS):
            slope = jax.jvp(lambda x, i=i: after(x, i), (ones,), (ones,))[1]
            np.testing.assert_allclose(slope, sampler.kept[i] * sampler.pure_noise_scale, rtol=1e-6)


def test_memory_does_not_grow_with_the_steps_that_pass_gradients():
    """By the compiler's count: the number of attached steps is an argument of one program."""
    case, theta = make_case(0.0), make_theta()
    x = case[2]

    def temporaries(calls):
        sampler = make_sampler("ddim", SCHEDULE, CONFIG, calls)
        states = calls * x.nbytes

        def value(theta, x, attached):
            def step(theta, constants, x, i):
                after = sampler.transition(lambda x, t: network(theta, x, t), sampler.start(x), i)[0].latents
                return after, jnp.zeros(len(x), jnp.float32)

            last, _ = run_with_gradients(step, theta, (), x, attached, sampler.kept)
            return reward(last)

        arguments = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (theta, x))
        program = jax.jit(jax.grad(value)).lower(*arguments, jnp.ones(calls, bool)).compile()
        return program.memory_analysis().temp_size_in_bytes - states

    assert temporaries(40) < 1.2 * temporaries(5) + 4096


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_image_that_is_not_finite_passes_no_gradient(bad):
    """The gradient is that of the other image alone, to parameters and noise, also through the penalties."""
    kept, step, x, noise = make_case(1.0)
    theta, attached = make_theta(), jnp.asarray([0, 1, 1, 0, 1, 1], bool)
    spoilt = noise.at[2, 1, 0, 0, 0].set(bad)  # x_3 is the first state that is not finite

    def value(theta, x, noise):
        last, penalty = run_with_gradients(step, theta, noise, x, attached, kept)
        usable = jnp.isfinite(last).all((1, 2, 3))
        return (
            jnp.where(usable[:, None, None, None], jnp.sin(last), 0).sum()
            + jnp.where(usable, penalty, 0).sum()
        )

    found = jax.grad(value)(theta, x, spoilt)
    expected = jax.grad(value)(theta, x[:1], noise[:, :1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


def test_what_is_computed_again_passes_no_gradient_of_an_image_that_is_not_finite():
    theta, x = make_theta(), jax.random.normal(KEYS[4], SHAPE, jnp.float64)
    spoilt = x.at[1, 0, 0, 0].set(-1e200)

    def function(theta, x):
        return jnp.square(x) ** 2 @ theta["w"], x.sum((1, 2, 3))  # the square of the square overflows

    def value(theta, x):
        squares, sums = checkpoint_images(function, theta, x)
        return jnp.where(jnp.isfinite(squares), squares, 0).sum() + sums[0]

    (of_theta, of_x), (expected, of_x0) = (jax.grad(value, (0, 1))(theta, each) for each in (spoilt, x[:1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), of_theta, expected)
    np.testing.assert_allclose(of_x, jnp.concatenate([of_x0, jnp.zeros_like(of_x0)]), rtol=1e-12)
