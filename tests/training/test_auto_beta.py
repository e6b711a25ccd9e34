"""A beta that follows the margins: its formula in float64, its place in a run, and who refuses it."""

import jax
import jax.numpy as jnp
import numpy as np
import objectives_numpy
import pytest
from dense_task import make_batch, make_reference, make_state, make_task
from tables import each_row
from tiny_run import make_config, read_reproducible

from dspo_jax.objectives import Predictions, get_objective
from dspo_jax.schedules.variance_preserving import Schedule
from dspo_jax.training.auto_beta import AutoBeta, make_auto_beta
from dspo_jax.training.losses.preference import draw_noise
from dspo_jax.training.run import train
from dspo_jax.training.step import train_step

FOLLOWING = ("diffusion_dpo", "diffusion_dpo_l2", "sdpo", "dmpo", "alpha_dpo", "hinge", "npo")
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
KEY = jax.random.key(0)


def task_of(accumulation=1):
    rule = {"auto_beta": AutoBeta(most=200.0, decay=0.6), "accumulation": accumulation}
    return make_task("diffusion_dpo", rule, beta=200.0, auto_beta=0.6)


def batch_at(start):
    return make_batch() | {"index": jnp.arange(start, start + 8, dtype=jnp.uint32)}


def half_differences(task, policy, reference, batch):
    """-D / 2 of each pair, the network and the noising in float64."""
    latents, noise, timesteps, drop = jax.tree.map(np.float64, draw_noise(task.loss.draws, batch, KEY))
    alphas_cumprod = np.cumprod(1 - BETAS)[timesteps.astype(int)][..., None, None, None]
    noisy = np.sqrt(alphas_cumprod) * latents + np.sqrt(1 - alphas_cumprod) * noise
    tokens = np.where(drop[:, None], 0, np.asarray(batch["tokens"][:, 0]))
    text = 0.01 * tokens.mean(1)[:, None, None, None, None]

    def error(params):
        params = {name: np.float64(leaf) for name, leaf in params.items()}
        hidden = noisy @ params["in"] + timesteps[..., None, None, None] / 1000 + text
        output = np.tanh(np.tanh(hidden) @ params["middle"]) @ params["out"]
        return ((output - noise) ** 2).mean((2, 3, 4))

    drift = error(policy) - error(reference)
    return (drift[:, 1] - drift[:, 0]) / 2


def test_beta_follows_the_mean_size_of_the_margins_before():
    task = task_of()
    state, reference = make_state(task), make_reference(task, seed=1)
    step, mean, betas = jax.jit(train_step), 0.0, []
    for number, weight in enumerate((1.0, 0.5, 0.4, 0.4)):  # 1, 1/2, and 1 - decay, which is above 1/3
        batch = batch_at(8 * number)
        margin = half_differences(task, state.params["unet"], reference["unet"], batch)
        beta = min(200.0, np.log(4) / mean) if mean else 200.0
        p = np.float64(batch["preference"])
        loss = p * np.logaddexp(0, -beta * margin) + (1 - p) * np.logaddexp(0, beta * margin)
        mean += weight * (np.abs(margin).mean() - mean)
        state, metrics = step(state, reference, batch, KEY)
        assert metrics["beta"] == pytest.approx(beta, rel=1e-4)
        assert metrics["loss"] == pytest.approx(loss.mean(), rel=1e-4)
        assert state.margin_size == pytest.approx(mean, rel=1e-4)
        betas.append(beta)
    assert betas[0] == 200 > betas[1] != betas[2]
    assert state.arrays()["margin_size"] is state.margin_size
    spoilt = batch_at(0)
    spoilt |= {"moments": spoilt["moments"].at[3, 0].set(jnp.nan)}
    after, metrics = step(state, reference, spoilt, KEY)
    assert metrics["skipped"] == 1
    assert after.margin_size == state.margin_size


def test_the_parts_of_a_batch_have_one_beta():
    found = []
    for accumulation in (1, 4):
        task = task_of(accumulation)
        state, reference = make_state(task), make_reference(task, seed=1)
        for number in range(3):
            state, metrics = jax.jit(train_step)(state, reference, batch_at(8 * number), KEY)
        found.append((float(metrics["beta"]), float(metrics["loss"]), float(state.margin_size)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][0] < 200


@each_row("name", FOLLOWING)
def test_a_given_beta_takes_the_place_of_the_objectives_own(name):
    random = np.random.default_rng(0)
    shape = (4, 2, 3, 2, 2)
    reference, target, noise = random.normal(size=(3, *shape))
    arrays = {"policy": reference + 0.5 * noise, "reference": reference, "target": target}
    arrays |= {"timesteps": np.full((4, 2), 500), "preference": np.array([1.0, 0.9, 0.5, 0.7])}
    given = {key: jnp.asarray(value, jnp.float32) for key, value in arrays.items() if key != "timesteps"}
    predictions = Predictions(**given, levels=jnp.full((4, 2), 500), beta=jnp.full(4, 1.7))
    objective = get_objective(name, beta=50.0, auto_beta=0.9)
    loss, metrics = objective(predictions, Schedule.scaled_linear())
    keys = objective.hyperparameters | {"beta": 1.7}
    expected, of_expected = objectives_numpy.evaluate(name, arrays, BETAS, "epsilon", **keys)
    np.testing.assert_allclose(loss, expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["beta"], 1.7, rtol=1e-6)
    np.testing.assert_allclose(
        metrics["margin_size"], np.abs(of_expected["margin"]) / 1.7, rtol=2e-4, atol=1e-6
    )
    assert make_auto_beta(objective) == AutoBeta(50.0, 0.9)


def test_without_the_key_nothing_is_kept():
    task = make_task("diffusion_dpo", beta=10.0)
    assert make_auto_beta(task.loss.objective) is None
    state = make_state(task)
    assert "margin_size" not in state.arrays()
    _, metrics = train_step(state, make_reference(task), make_batch(), KEY)
    assert not {"beta", "margin_size"} & metrics.keys()


@each_row("name", ["ipo", "linear_dpo", "kto", "dspo", "orpo", "lpo_list"])
def test_who_has_no_such_beta_refuses_it(name):
    with pytest.raises(ValueError, match=rf"^argument of objective '{name}' = 'auto_beta': unknown[^\n]*$"):
        get_objective(name, auto_beta=0.9)


@each_row("value", [0.0, 1.0, 2.0])
def test_the_decay_lies_between_0_and_1(value):
    with pytest.raises(ValueError, match=rf"^config\.objective\.auto_beta = {value}: .*above 0 and below 1$"):
        get_objective("diffusion_dpo", auto_beta=value)


@pytest.mark.ci
def test_a_run_goes_on_with_its_beta_on_any_mesh(shallow_model, tiny_pairs, tmp_path):
    changes = {"objective.name": "diffusion_dpo", "objective.auto_beta": 0.6, "batch_size": 16}
    changes |= {"objective.beta": 5000.0, "optimizer.eps": 1e-4, "checkpoint.every": 1}
    split = {"mesh.fsdp": 4, "accumulation": 2}
    for folder, ends, more in (("whole", (4,), {}), ("parts", (2, 4), {}), ("split", (4,), split)):
        for steps in ends:
            config = make_config(shallow_model, tiny_pairs, changes | more | {"steps": steps})
            assert train(config, tmp_path / folder).finished
    whole, parts, split = (read_reproducible(tmp_path / name) for name in ("whole", "parts", "split"))
    assert whole == parts
    assert whole[0]["beta"] == 5000 > whole[2]["beta"] != whole[3]["beta"]
    for record, other in zip(whole, split, strict=True):
        assert other["beta"] == pytest.approx(record["beta"], rel=2e-2)
