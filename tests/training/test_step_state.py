"""What a step does to the state: skipped updates, the moving average, dtypes, every optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_task import make_batch, make_params, make_reference, make_state, make_task

from configs import common
from dspo_jax.limits import parse
from dspo_jax.schedules.variance_preserving import UniformTimesteps
from dspo_jax.training.losses.preference import draw_noise
from dspo_jax.training.optim import OPTIMIZERS, OptimizerSettings, make_optimizer
from dspo_jax.training.stability import Health
from dspo_jax.training.step import mean_gradient, train_step
from dspo_jax.training.task import cast, policy_params

KEY = jax.random.key(0)


def batch_at(start):
    """A batch of other examples of the same stream."""
    return make_batch() | {"index": jnp.arange(start, start + 8, dtype=jnp.uint32)}


def poisoned(start):
    batch = batch_at(start)
    return batch | {"moments": batch["moments"].at[3, 0].set(jnp.nan)}


def run(task, batches):
    """The state and metrics after each batch; the reference is not the start."""
    step = jax.jit(train_step)
    state, reference, states, metrics = make_state(task), make_reference(task, seed=1), [], []
    for batch in batches:
        state, values = step(state, reference, batch, KEY)
        states.append(state)
        metrics.append({name: float(value) for name, value in values.items()})
    return states, metrics


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def changing_rate():
    """AdamW with a rate that depends on the number of updates made."""
    schedule = optax.linear_schedule(0.01, 0.0, 10)
    return {"optimizer": optax.adamw(schedule), "learning_rate": schedule, "ema_decay": 0.5}


def test_a_batch_with_nan_changes_nothing_but_the_counts():
    task = make_task("diffusion_dpo", changing_rate(), beta=10.0)
    with_nan, metrics = run(task, [batch_at(0), poisoned(8), poisoned(16), batch_at(24)])
    without, expected = run(task, [batch_at(0), batch_at(24)])
    for name in ("params", "opt_state", "ema"):
        assert_same(getattr(with_nan[1], name), getattr(with_nan[0], name))
        assert_same(getattr(with_nan[3], name), getattr(without[1], name))
    assert [int(state.step) for state in with_nan] == [1, 2, 3, 4]
    assert [values["skipped"] for values in metrics] == [0, 1, 2, 2]
    assert [values["skipped_in_a_row"] for values in metrics] == [0, 1, 2, 0]
    assert np.isnan(metrics[1]["loss"])
    # The rate is that of the optimizer's own count.
    assert metrics[3]["learning_rate"] == expected[1]["learning_rate"] == pytest.approx(0.009)


@pytest.mark.parametrize(("loss_spike", "skipped"), [(0.0, 0), (6.0, 1)])
def test_a_spike_of_the_loss_is_skipped_if_asked(loss_spike, skipped):
    task = make_task("sft", {"loss_spike": loss_spike})
    state = make_state(task)
    quiet = Health(jnp.int32(0), jnp.int32(0), jnp.int32(60), jnp.float32(0.5), jnp.float32(1e-6))
    state = dataclasses.replace(state, health=quiet)
    after, metrics = train_step(state, make_reference(task), make_batch(), KEY)
    assert metrics["loss"] > 0.6
    assert metrics["skipped"] == skipped
    same = [np.array_equal(after.params["unet"][name], leaf) for name, leaf in state.params["unet"].items()]
    assert all(same) if skipped else not any(same)


def test_the_moving_average_follows_the_parameters_and_is_the_result():
    task = make_task("sft", {"ema_decay": 0.75})
    states, _ = run(task, [batch_at(8 * number) for number in range(3)])
    expected = make_params(0)
    for state in states:
        expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, expected, state.params["unet"])
        for name, leaf in expected.items():
            np.testing.assert_allclose(state.ema["unet"][name], leaf, rtol=1e-6)
            assert np.abs(state.ema["unet"][name] - state.params["unet"][name]).max() > 1e-4
    assert states[-1].result is states[-1].ema
    assert set(states[-1].arrays()) == {"step", "params", "opt_state", "ema", "health"}
    without = make_state(make_task("sft"))
    assert without.result is without.params
    assert "ema" not in without.arrays()


def settings(name):
    config = common.get_config().optimizer.to_dict()
    rate = 1e4 if name == "prodigy" else 1e-2  # which begins at 1e-6 of it
    changes = {"name": name, "learning_rate": rate, "warmup_steps": 0, "weight_decay": 0.0}
    return parse(OptimizerSettings, config | changes, "config.optimizer")


@pytest.mark.ci
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_every_optimizer_moves_every_parameter_in_its_dtype_and_not_the_reference(name, param_dtype):
    optimizer, rate = make_optimizer(settings(name), 10, 8)
    changes = {"optimizer": optimizer, "learning_rate": rate, "param_dtype": param_dtype, "ema_decay": 0.9}
    task = make_task("diffusion_dpo", changes, beta=10.0)
    params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), {"unet": make_params(0)})
    state = dataclasses.replace(make_state(task), params=params)
    reference = make_reference(task)
    kept = jax.tree.map(np.array, reference)
    for number in range(2):
        state, metrics = jax.jit(train_step)(state, reference, batch_at(8 * number), KEY)
    # What Prodigy found is 1e-6 until it has moved.
    assert metrics["learning_rate"] == pytest.approx(1e-2)
    assert_same(reference, kept)
    # Of single weights, too; half of Lion's two steps lead back, and Muon's are small for bfloat16.
    least = {"lion": 0.4, "muon": 0.6}.get(name, 0.8)
    for name, leaf in state.params["unet"].items():
        assert leaf.dtype == param_dtype
        assert np.mean(leaf != params["unet"][name]) > least
    floats = [
        x for x in jax.tree.leaves((state.opt_state, state.ema)) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_gradients_are_accumulated_in_float32():
    """The sum of four parts in bfloat16 would be off by up to a part in 256."""
    changes = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), {"unet": make_params(0)})
    grads = {}
    for accumulation in (1, 4):
        task = make_task("sft", {**changes, "accumulation": accumulation})
        _, grads[accumulation] = jax.jit(mean_gradient, static_argnums=1)(
            params, task, make_reference(task), batch_at(0), KEY
        )
    for leaf in jax.tree.leaves(grads):
        assert leaf.dtype == jnp.float32
    # A quarter of a sum of bfloat16 numbers need not be one.
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), grads[4])
    assert any(
        np.any(a != b) for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(grads[4]), strict=True)
    )


def test_a_reference_kept_in_float32_is_computed_in_the_compute_dtype():
    task = make_task("diffusion_dpo", {"compute_dtype": "bfloat16"}, beta=10.0)
    reference = make_reference(task)
    policy = policy_params(task, {"unet": make_params(0)}, reference)
    assert {leaf.dtype for leaf in jax.tree.leaves(policy)} == {jnp.dtype("bfloat16")}
    assert_same(policy, cast(task, reference))
    _, metrics = run(task, [batch_at(0)])
    assert metrics[0]["deviation"] > 0  # from a reference of other weights
    _, at_start = train_step(make_state(task), reference, batch_at(0), KEY)
    assert at_start["loss"] == pytest.approx(np.log(2), rel=1e-3)


@pytest.mark.parametrize(("first", "last"), [(0, 999), (100, 400), (7, 7)])
def test_timesteps_are_drawn_from_the_range_with_both_ends(first, last):
    task = make_task("sft", {"levels": UniformTimesteps(first, last)})
    batch = make_batch(count=4000)
    _, _, timesteps, _ = draw_noise(task.loss.draws, batch, KEY)
    assert first <= timesteps.min() <= first + 5
    assert last - 5 <= timesteps.max() <= last
