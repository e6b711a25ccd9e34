"""A training task whose network compiles in a moment: three dense layers on every pixel."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from promoting_optimizer import promote_dtypes

from dspo_jax.objectives import get_objective
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.schedules.variance_preserving import Schedule, UniformTimesteps
from dspo_jax.training.losses.preference import Draws, PreferenceLoss
from dspo_jax.training.step import init_state
from dspo_jax.training.task import Precision, Task, UpdateRule

PAIRS, SIDE, CHANNELS, WIDTH = 8, 4, 4, 64


class DensePipeline(Pipeline):
    """Three dense layers on every pixel in place of a model's networks."""

    def __init__(self, schedule):
        fields = {"schedule": schedule, "empty_tokens": np.zeros((1, 77), np.int32)}
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # a `Pipeline` is frozen

    def encode_conditioning(self, params, batch, *, remat):
        """Ids, scaled."""
        scale = params["text_encoder"]["scale"]
        return scale * batch["tokens"][:, 0, :, None].astype(scale.dtype)

    def embed_captions(self, params, batch):
        """The first ids, scaled."""
        return self.encode_conditioning(params, batch, remat="none")[:, :5, 0]

    def predict(self, params, latents, timesteps, text, *, remat):
        """Three dense layers on every pixel."""
        params = params["unet"]
        hidden = (
            latents @ params["in"]
            + (timesteps / 1000).astype(latents.dtype)[:, None, None, None]
            + jnp.repeat(text.mean((1, 2)), len(latents) // len(text))[:, None, None, None]
        )
        return jnp.tanh(jnp.tanh(hidden) @ params["middle"]) @ params["out"]


def make_params(seed):
    """Of the network, float32."""
    rng = np.random.default_rng(seed)
    shapes = {"in": (CHANNELS, WIDTH), "middle": (WIDTH, WIDTH), "out": (WIDTH, CHANNELS)}
    return {
        name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
        for name, shape in shapes.items()
    }


def make_task(objective, changes: dict[str, Any] | None = None, schedule=None, **hyperparameters):
    """A task with an objective; `changes` are of the fields of its parts."""
    schedule = schedule or Schedule.scaled_linear()
    draws = Draws(
        UniformTimesteps(0, 999),
        caption_dropout=0.2,
        share_timesteps=True,
        share_noise=True,
        noise_offset=0.0,
        positive_ratio=0.8,
    )
    rate = UpdateRule(optax.sgd(0.1), lambda count: jnp.float32(0.1), 1, ema_decay=0.0, loss_spike=0.0)
    precision = Precision("float32", "float32", "float32", "none")
    draws, rate, precision = (change(part, changes or {}) for part in (draws, rate, precision))
    rate = dataclasses.replace(rate, optimizer=promote_dtypes(rate.optimizer))
    loss = PreferenceLoss(get_objective(objective, **hyperparameters), draws)
    return Task(DensePipeline(schedule), loss, rate, precision, train_text_encoder=False, adapters=None)


def change(part, changes):
    """The dataclass with those of the changes that are fields of it."""
    fields = {field.name for field in dataclasses.fields(part)}
    return dataclasses.replace(part, **{name: value for name, value in changes.items() if name in fields})


def make_state(task):
    """At step 0."""
    return init_state(task, {"unet": make_params(0)})


def make_reference(task, seed=0):
    """What a run holds: no second network for an objective without a reference."""
    reference = {"text_encoder": {"scale": jnp.float32(0.01)}}
    return reference | {"unet": make_params(seed)} if task.loss.needs_reference else reference


def make_batch(count=PAIRS, images=2):
    """As the loader gives it."""
    rng = np.random.default_rng(0)
    return {
        "moments": jnp.asarray(rng.normal(size=(count, images, SIDE, SIDE, 2 * CHANNELS)), jnp.float16),
        "tokens": jnp.asarray(rng.integers(0, 50, (count, 1, 77)), jnp.int32),
        "micro_conditioning": jnp.zeros((count, images, 6), jnp.int32),
        "preference": jnp.asarray(rng.uniform(0.5, 1.0, count), jnp.float32),
        "loser_won": jnp.zeros(count, bool),
        "index": jnp.arange(count, dtype=jnp.uint32),
    }
