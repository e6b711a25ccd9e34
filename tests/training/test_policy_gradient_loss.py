"""The loss of policy gradients: log-probabilities of the draw, a ratio of 1, and rows that do not count."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from online_run import PROMPTS, STEPS, OnlineRun, moved
from tables import each_row

from dspo_jax.parallel.mesh import shard_batch
from dspo_jax.training.rollouts import Rollout
from dspo_jax.training.step import compile_step, mean_gradient

INDEX = np.arange(4, dtype=np.uint32)


class Case:
    """A run with rows of a rollout: 3 steps of each of 4 images."""

    def __init__(self, model, changes):
        self.run = run = OnlineRun(model, changes)
        rollout = Rollout(run.task, run.settings.stream.drawing, run.size, run.mesh)
        tokens = run.pipe.tokenize([*PROMPTS, PROMPTS[0]])
        states = np.asarray(rollout(run.params, run.reference, tokens, INDEX, run.key))
        images = run.loss.method.images

        def rows(states):
            states = states.reshape(STEPS, 4 // images, images, *states.shape[2:])
            return np.moveaxis(states, 0, 1).reshape(-1, *states.shape[2:])

        count = STEPS * 4 // images
        self.deviation = np.asarray(rollout.sampler.step_noise)
        self.batch = {
            "state": rows(states[:-1]),
            "next_state": rows(states[1:]),
            "call": np.tile(np.arange(STEPS, dtype=np.int32), 4 // images),
            "tokens": np.repeat(tokens[::images], STEPS, axis=0),
            "advantage": np.linspace(-1, 1, count, dtype=np.float32),
            "weight": np.ones(count, np.float32),
            "old_log_probability": np.full((count, images), np.nan, np.float32),
            "first": np.ones(count, bool),
        }
        self.steps = jax.jit(partial(run.loss.make_steps, with_reference=True), static_argnums=1)
        self.gradient = jax.jit(jax.value_and_grad(run.loss, has_aux=True), static_argnums=1)

    def make_steps(self):
        """Of the parameters that drew the images."""
        return self.steps(self.run.params, self.run.task, self.run.reference, self.batch)

    def evaluate(self, params=None, **changes):
        run = self.run
        params = run.params if params is None else params
        return self.gradient(params, run.task, run.reference, {**self.batch, **changes}, run.key)


@pytest.fixture(scope="module")
def grpo(shallow_model):
    return Case(shallow_model, {"policy_gradient.name": "grpo", "policy_gradient.beta": 0.1})


def test_log_probabilities_are_those_of_the_noise_that_was_drawn(grpo):
    run, size = grpo.run, math.prod((*grpo.run.size, 4))
    steps = grpo.make_steps()
    for row, (image, call) in enumerate(np.ndindex(4, STEPS)):
        key = jax.random.fold_in(jax.random.fold_in(run.key, INDEX[image]), call + 1)
        z = np.asarray(jax.random.normal(key, (*run.size, 4)), np.float64)
        expected = -0.5 * np.square(z).sum() - size * (
            math.log(grpo.deviation[call]) + 0.5 * math.log(2 * math.pi)
        )
        # A difference of 1e-6 in a number of x is 1e-6 / s in z.
        assert steps.log_probability[row, 0] == pytest.approx(expected, abs=1e-5 * size)
    np.testing.assert_array_equal(steps.log_probability, steps.reference_log_probability)
    assert not np.any(steps.kl)
    assert not np.any(steps.prediction_error)


def test_the_first_update_has_a_ratio_of_exactly_1_and_the_gradient_of_the_advantages(grpo):
    (loss, metrics), gradient = grpo.evaluate()
    assert metrics["ratio"] == 1
    assert metrics["approximate_kl"] == metrics["clipped"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-9)
    assert loss == pytest.approx(-grpo.batch["advantage"].mean(), abs=1e-6)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0


@pytest.mark.ci
def test_later_updates_compare_with_the_given_log_probabilities(grpo):
    run, later = grpo.run, np.zeros(12, bool)
    old = grpo.make_steps().log_probability
    (_, same), _ = grpo.evaluate(first=later, old_log_probability=old)
    assert same["ratio"] == pytest.approx(1, abs=1e-6)
    (_, other), _ = grpo.evaluate(moved(run.params), first=later, old_log_probability=old)
    assert abs(other["ratio"] - 1) > 1e-4
    assert other["approximate_kl"] > 0
    assert other["kl"] > 0


def test_a_row_of_weight_0_counts_nothing_even_if_it_is_not_finite(grpo):
    state = grpo.batch["state"].copy()
    state[:3] = np.nan
    weight = np.where(np.arange(12) < 3, 0, 12 / 9).astype(np.float32)
    results, gradient = grpo.evaluate(state=state, weight=weight)
    expected, of_others = grpo.evaluate(weight=weight)
    for got, want in zip(
        jax.tree.leaves((results, gradient)), jax.tree.leaves((expected, of_others)), strict=True
    ):
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.ci
@each_row("parts", [1, 3, 12])
def test_parts_of_an_update_and_the_order_of_its_rows_do_not_matter(parts, grpo):
    """One gradient of the whole, of ratios other than 1, with rows that count more and less."""
    run, order = grpo.run, np.random.default_rng(parts).permutation(12)
    other = {
        "first": np.zeros(12, bool),
        "old_log_probability": np.asarray(grpo.make_steps().log_probability),
        "weight": np.linspace(0, 2, 12, dtype=np.float32),
    }
    params = moved(run.params)
    (loss, metrics), expected = grpo.evaluate(params, **other)
    assert abs(metrics["ratio"] - 1) > 1e-4
    task = dataclasses.replace(run.task, update=dataclasses.replace(run.task.update, accumulation=parts))
    batch = shard_batch({name: array[order] for name, array in (grpo.batch | other).items()}, run.mesh)
    (own_loss, own_metrics), gradient = jax.jit(mean_gradient, static_argnums=1)(
        params, task, run.reference, batch, run.key
    )
    assert float(own_loss) == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
    assert float(own_metrics["ratio"]) == pytest.approx(float(metrics["ratio"]), rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.ci
def test_an_update_moves_the_policy_and_not_the_reference(grpo):
    run, state = grpo.run, jax.tree.map(jnp.copy, grpo.run.state)
    before = jax.device_get((run.reference, state.params))
    after, _ = compile_step(state)(state, run.reference, shard_batch(grpo.batch, run.mesh), run.key)
    reference, params = jax.device_get((run.reference, after.params))
    jax.tree.map(np.testing.assert_array_equal, reference, before[0])
    moves = jax.tree.map(lambda new, old: np.any(new != old), params, before[1])
    assert np.mean(jax.tree.leaves(moves)) > 0.9


@pytest.mark.ci
def test_d3po_rows_are_pairs_of_images_with_the_reference(shallow_model):
    case = Case(shallow_model, {"policy_gradient.name": "d3po"})
    label = np.asarray([1, -1, 0] * 2, np.float32)
    (loss, metrics), gradient = case.evaluate(advantage=label)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin"] == pytest.approx(0, abs=1e-6)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0
    passes = case.run.loss.passes(1)
    assert (passes.policy, passes.reference) == (4, 4)
    shapes = case.run.loss.input_shapes(case.run.pipe, 2, case.run.pipe.image_size)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()} == {
        name: (array.shape[1:], array.dtype) for name, array in case.batch.items()
    }
