"""Losses that differentiate a reward through the sampler: against the plain derivative, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row, slow
from tiny_run import make_config

from dspo_jax.parallel.mesh import shard_batch
from dspo_jax.sampling.guidance import GuidedDenoiser
from dspo_jax.training.losses.reward_gradient import RewardGradientLoss
from dspo_jax.training.start import make_state, mesh_of, prepare
from dspo_jax.training.step import mean_gradient
from dspo_jax.training.task import policy_params

PROMPTS = ["a cat", "a dog", "a bird", "a red car"]
CALLS = 4
CHANGES = {
    "stream.kind": "prompts",
    "stream.prompts": PROMPTS,
    "stream.num_inference_steps": CALLS,
    "stream.guidance_scale": 3.0,
    "rewards.train": "colourfulness",
    "batch_size": 16,  # which any of the meshes here splits
}
KEY = jax.random.key(7)


def make(model, changes=None, devices=1):
    """The experiment on some devices, its state and reference."""
    experiment = prepare(make_config(model, "", {**CHANGES, **(changes or {})}))
    mesh = mesh_of(experiment.settings, jax.devices()[:devices])
    return (experiment, mesh, *make_state(experiment.task, mesh, experiment.adapters))


def make_batch(experiment, mesh, count=4):
    own = experiment.own_images
    prompts = [PROMPTS[i % 4] for i in range(count)]
    batch = {
        "tokens": experiment.task.pipe.tokenize(prompts),
        "reward_tokens": own.trained.tokenize(prompts),
        "index": np.arange(count, dtype=np.uint32),
        "update": np.full(count, 3, np.uint32),
    }
    return shard_batch(batch, mesh)


def gradient(experiment, mesh, state, reference, batch):
    def run(params, reference, batch):
        return mean_gradient(params, experiment.task, reference, batch, KEY)

    (loss, metrics), grads = jax.jit(run)(state.params, reference, batch)
    return float(loss), {name: float(value) for name, value in metrics.items()}, jax.device_get(grads)


def written_out(loss: RewardGradientLoss, task, params, reference, batch, attached):
    """The loss with every step in one expression, x taken as a constant before the first attached one."""
    pipe, sampler = task.pipe, loss.drawing.make_sampler(task.pipe)
    denoiser = GuidedDenoiser(pipe, loss.drawing)
    policy = policy_params(task, params, reference)
    conditioning = denoiser.encode(policy, batch["tokens"], loss.size)
    shape = (*loss.size, pipe.latent_channels)

    def noise(i):
        keys = [jax.random.fold_in(jax.random.fold_in(KEY, index), i) for index in batch["index"]]
        return jnp.stack([jax.random.normal(key, shape) for key in keys])

    x, drift = sampler.start(noise(0)).latents, 0.0
    for i in range(CALLS):
        if not attached[:i].any():
            x = jax.lax.stop_gradient(x)
        of_step = policy if attached[i] else jax.lax.stop_gradient(policy)
        seen = []

        def predict(x, t, of_step=of_step, attached=attached[i], seen=seen):
            prediction = denoiser.predict(of_step, x, t, conditioning)
            prediction = prediction if attached else jax.lax.stop_gradient(prediction)
            if loss.needs_reference:
                frozen = denoiser.predict(policy_params(task, {}, reference), x, t, conditioning)
                seen.append(jnp.square(prediction - jax.lax.stop_gradient(frozen)).mean((1, 2, 3)))
            return prediction

        state, deviation = sampler.transition(predict, sampler.start(x)._replace(latents=x), i)
        x = state.latents + deviation * noise(i + 1)
        drift += seen[0] if attached[i] and seen else 0.0
    return x, drift / attached.sum()


def judge(loss, task, reference, latents, batch):
    pixels = jnp.clip(task.pipe.decode({"vae": reference["vae"]}, latents) / 2 + 0.5, 0.0, 1.0)
    return loss.reward.function(reference["reward"], pixels, batch["reward_tokens"]) / loss.reward.divisor


@pytest.mark.ci
@pytest.mark.parametrize(
    ("changes", "attached"),
    [
        slow({"reward_gradient.name": "draft"}, [1, 1, 1, 1]),
        slow({"reward_gradient.name": "draft_k", "reward_gradient.k": 2.0, "stream.eta": 0.0}, [0, 0, 1, 1]),
        ({"reward_gradient.name": "draft_plus", "reward_gradient.beta": 3.0, "lora.rank": 2}, [0, 0, 0, 1]),
        slow({"reward_gradient.name": "draft_k", "stream.sampler": "euler_ancestral"}, [0, 0, 0, 1]),
    ],
    ids=["draft", "draft_k", "draft_plus", "euler_ancestral"],
)
def test_the_gradient_is_that_of_the_written_out_program(changes, attached, shallow_model):
    experiment, mesh, state, reference = make(shallow_model, changes)
    task, batch, attached = experiment.task, make_batch(experiment, mesh), np.array(attached, bool)
    params = jax.tree.map(
        lambda leaf: leaf + 0.01 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), state.params
    )
    state = state.__class__(**{**vars(state), "params": params})

    def expected(params):
        latents, drift = written_out(task.loss, task, params, reference, batch, attached)
        rewards = judge(task.loss, task, reference, latents, batch)
        return (-rewards + task.loss.method.beta * drift).mean(), rewards

    (value, rewards), grads = jax.jit(jax.value_and_grad(expected, has_aux=True))(params)
    loss, metrics, found = gradient(experiment, mesh, state, reference, batch)
    assert loss == pytest.approx(float(value), rel=1e-5)
    assert metrics["reward"] == pytest.approx(float(rewards.mean()) * task.loss.reward.divisor, rel=1e-5)
    assert metrics["attached_steps"] == attached.sum()
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    assert largest > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4 * largest), found, grads)


@pytest.mark.slow
def test_draft_lv_adds_the_gradient_of_the_noised_result(shallow_model):
    experiment, mesh, state, reference = make(shallow_model, {"reward_gradient.name": "draft_lv"})
    task, batch = experiment.task, make_batch(experiment, mesh)
    pipe, loss = task.pipe, task.loss
    sampler, denoiser = loss.drawing.make_sampler(pipe), GuidedDenoiser(pipe, loss.drawing)
    last = np.array([0, 0, 0, 1], bool)

    def expected(params):
        latents, _ = written_out(loss, task, params, reference, batch, last)
        keys = [jax.random.fold_in(jax.random.fold_in(KEY, index), 2**30) for index in batch["index"]]
        eps = jnp.stack([jax.random.normal(key, latents.shape[1:]) for key in keys])
        noised = pipe.schedule.add_noise(jax.lax.stop_gradient(latents), eps, int(sampler.timesteps[-1]))
        policy = policy_params(task, params, reference)
        conditioning = denoiser.encode(policy, batch["tokens"], loss.size)
        state, deviation = sampler.transition(
            lambda x, t: denoiser.predict(policy, x, t, conditioning), sampler.start(noised), CALLS - 1
        )
        keys = [jax.random.fold_in(jax.random.fold_in(KEY, index), CALLS) for index in batch["index"]]
        again = state.latents + deviation * jnp.stack([jax.random.normal(k, latents.shape[1:]) for k in keys])
        both = [judge(loss, task, reference, each, batch) for each in (latents, again)]
        return -(both[0] + both[1]).mean()

    value, grads = jax.jit(jax.value_and_grad(expected))(state.params)
    found_value, _, found = gradient(experiment, mesh, state, reference, batch)
    assert found_value == pytest.approx(float(value), rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4 * largest), found, grads)


@pytest.mark.ci
def test_refl_differentiates_the_image_that_one_late_step_expects(shallow_model):
    changes = {
        "reward_gradient.name": "refl",
        "reward_gradient.first": 0.5,
        "reward_gradient.threshold": 100.0,
        "reward_gradient.beta": 3.0,
    }
    experiment, mesh, state, reference = make(shallow_model, changes)
    task, batch = experiment.task, make_batch(experiment, mesh)
    params = jax.tree.map(lambda leaf: leaf * 1.01, state.params)
    state = state.__class__(**{**vars(state), "params": params})
    pipe, loss = task.pipe, task.loss
    sampler, denoiser = loss.drawing.make_sampler(pipe), GuidedDenoiser(pipe, loss.drawing)
    of_update = jax.random.fold_in(jax.random.fold_in(KEY, 3), 2**31)
    call = int(np.argmax(loss.method.attached(CALLS, of_update)))
    assert call >= 2

    def expected(params):
        policy = policy_params(task, params, reference)
        conditioning = denoiser.encode(policy, batch["tokens"], loss.size)

        def noise(i):
            keys = [jax.random.fold_in(jax.random.fold_in(KEY, index), i) for index in batch["index"]]
            return jnp.stack([jax.random.normal(k, (*loss.size, pipe.latent_channels)) for k in keys])

        x = sampler.start(noise(0)).latents
        for i in range(call):
            state, deviation = sampler.transition(
                lambda x, t: denoiser.predict(policy, x, t, conditioning),
                sampler.start(x)._replace(latents=x),
                i,
            )
            x = state.latents + deviation * noise(i + 1)
        x, t = jax.lax.stop_gradient(x), int(sampler.timesteps[call])
        prediction = denoiser.predict(policy, x, jnp.asarray(t), conditioning)
        frozen = denoiser.predict(policy_params(task, {}, reference), x, jnp.asarray(t), conditioning)
        drift = jnp.square(prediction - jax.lax.stop_gradient(frozen)).mean((1, 2, 3))
        rewards = judge(loss, task, reference, pipe.schedule.to_x0(prediction, x, t), batch)
        return (1e-3 * (100.0 - rewards) + 3.0 * drift).mean()

    value, grads = jax.jit(jax.value_and_grad(expected))(state.params)
    found_value, _, found = gradient(experiment, mesh, state, reference, batch)
    assert found_value == pytest.approx(float(value), rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    assert largest > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4 * largest), found, grads)


@pytest.mark.slow
def test_devices_and_parts_of_a_batch_do_not_change_the_update(shallow_model):
    """Randomness follows from the prompt's number: 1 device, 8, sharded parameters, and two parts agree."""
    changes = {"reward_gradient.name": "alignprop"}
    results = []
    for devices, more in ((1, {}), (8, {}), (8, {"mesh.data": 2, "mesh.fsdp": 4}), (1, {"accumulation": 2})):
        experiment, mesh, state, reference = make(shallow_model, {**changes, **more}, devices)
        batch = make_batch(experiment, mesh, 8)
        results.append(gradient(experiment, mesh, state, reference, batch))
    loss, metrics, grads = results[0]
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    for other in results[1:]:
        assert other[0] == pytest.approx(loss, rel=1e-4)
        assert other[1]["attached_steps"] == metrics["attached_steps"]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-3 * largest), other[2], grads
        )


@pytest.mark.ci
@pytest.mark.parametrize(
    "changes",
    [
        slow({"reward_gradient.name": "draft_plus"}),
        slow({"reward_gradient.name": "draft_lv"}),
        slow({"reward_gradient.name": "alignprop", "accumulation": 2}),
        {"reward_gradient.name": "refl", "reward_gradient.threshold": 100.0},
    ],
    ids=["draft_plus", "draft_lv", "alignprop", "refl"],
)
def test_an_image_without_a_reward_is_left_out(changes, shallow_model):
    """The update is the mean of those that each of the other images gives alone; of too many it is none."""
    experiment, mesh, state, reference = make(shallow_model, changes)
    reward = experiment.own_images.trained

    def function(params, images, bad):
        return jnp.where(bad, jnp.nan, 1.0) * reward.function(params, images, None)

    loss = dataclasses.replace(experiment.task.loss, reward=dataclasses.replace(reward, function=function))
    task = dataclasses.replace(experiment.task, loss=loss)
    whole, run = jax.device_get(make_batch(experiment, mesh)), jax.jit(mean_gradient, static_argnums=1)

    def update(rows, bad=(0, 0, 0, 0)):
        batch = {name: column[list(rows)] for name, column in whole.items() if name != "reward_tokens"}
        batch = shard_batch(batch | {"reward_tokens": np.array(bad, bool)}, mesh)
        return jax.device_get(run(state.params, task, reference, batch, KEY))

    alone = [update([row] * 4) for row in range(4)]
    for bad in ((0, 0, 0, 1), (1, 0, 1, 0)):
        (value, metrics), grads = update(range(4), bad)
        good = [each for each, left_out in zip(alone, bad, strict=True) if not left_out]
        (expected, of_images), slopes = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *good)
        assert metrics.pop("unusable_images") == sum(bad)
        assert of_images.pop("unusable_images") == 0
        assert value == pytest.approx(expected, rel=1e-5)
        assert metrics == pytest.approx(of_images, rel=1e-5)
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slopes))
        assert largest > 0
        for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(slopes), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * largest)
    (value, metrics), _ = update(range(4), (1, 1, 0, 1))
    assert np.isnan(value)
    assert metrics["unusable_images"] == 3


@each_row(
    ("changes", "message"),
    [
        ({"rewards.train": "compressibility"}, r"has no gradient: .*ddpo"),
        ({"rewards.train": ""}, r"config.rewards.train is not set: .*'prompts'"),
        ({"stream.prompts": []}, r"config.stream.prompts is not set"),
        ({"stream.prompts": ["none.txt"]}, r"config.stream.prompts = 'none.txt': .*none.txt"),
        ({"reward_gradient.k": 5.0}, r"config.reward_gradient.k = 5: .*num_inference_steps = 4"),
        ({"reward_gradient.k": 1.5}, r"config.reward_gradient.k = 1.5: .*whole number"),
        ({"reward_gradient.name": "refl"}, "config.reward_gradient.threshold is not set: .*colourfulness"),
        ({"reward_gradient.name": "draftk"}, r"config.reward_gradient.name = 'draftk'.*'draft_k'"),
        (
            {
                "reward_gradient.name": "refl",
                "reward_gradient.threshold": 9.0,
                "stream.sampler": "euler_ancestral",
            },
            r"config.stream.sampler = 'euler_ancestral': .*'refl'.*'ddim'",
        ),
        ({"stream.sampler": "pndm"}, r"config.stream.sampler = 'pndm'"),
        ({"validation.every": 5}, r"config.rewards.prompts is not set"),
        (
            {"rewards.validation": ["colourfulness"]},
            r"config.rewards.validation = \['colourfulness'\]: .*trained by",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_key(changes, message, shallow_model):
    with pytest.raises(ValueError, match=message):
        prepare(make_config(shallow_model, "", {**CHANGES, **changes}))
