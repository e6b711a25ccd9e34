"""The preference loss: noise for a batch of encoded pairs, both networks, the objective."""

import jax
import jax.numpy as jnp

from dspo_jax.models.model import Params
from dspo_jax.objectives import Predictions
from dspo_jax.training.task import Batch, Metrics, Task, cast, policy_params, predict


def draw_noise(task: Task, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Everything random about a batch, drawn from (key, index of the example) alone.

    So the draws depend neither on the devices nor on how a batch is split. Returns latents [B, P, h, w, C]
    (UNet units), noise of the same shape, timesteps [B, P] int32, and whether to drop each caption [B] bool.
    """
    mean, deviation = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
    images = mean.shape[1]
    of_noise, of_timesteps = (1 if shared else images for shared in (task.share_noise, task.share_timesteps))
    first, last = task.timesteps

    def draw(index: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.fold_in(key, index), 4)
        posterior = jax.random.normal(keys[0], mean.shape[1:])
        noise = jax.random.normal(keys[1], (of_noise, *mean.shape[2:]))
        timesteps = jax.random.randint(keys[2], (of_timesteps,), first, last + 1)
        return posterior, noise, timesteps, jax.random.bernoulli(keys[3], task.caption_dropout)

    posterior, noise, timesteps, drop = jax.vmap(draw)(batch["index"])
    latents = mean + deviation * posterior
    return latents, jnp.broadcast_to(noise, mean.shape), jnp.broadcast_to(timesteps, mean.shape[:2]), drop


def choose_images(
    task: Task, batch: Batch, key: jax.Array, *arrays: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """What the objective is trained on of each example: all its images, the winner, or one drawn image.

    What it is not trained on is then never run. The draw follows from (key, index), like the noise.

    Args:
      task: `task.objective.images` decides, and `task.positive_ratio` for one drawn image.
      batch: `preference`, `loser_won` and `index` are read.
      key: of the run.
      *arrays: [B, P, ...].

    Returns:
      The arrays [B, P', ...] and the preference [B]: of drawn images, the probability that it is a liked one.
      A loser that won another pair is liked, as in the released code of Diffusion-KTO.
    """
    images, preference = arrays[0].shape[1], batch["preference"]
    if task.objective.images == "all" or images == 1:
        return list(arrays), preference
    if task.objective.images == "winner":
        return [array[:, :1] for array in arrays], preference

    def draw(index: jax.Array) -> jax.Array:
        # The four keys of `draw_noise` are numbers 0 to 3.
        return jax.random.bernoulli(
            jax.random.fold_in(jax.random.fold_in(key, index), 4), 1 - task.positive_ratio
        )

    drawn = jax.vmap(draw)(batch["index"]).astype(jnp.int32)
    chosen = [
        jnp.take_along_axis(array, drawn.reshape(-1, *(1,) * (array.ndim - 1)), axis=1) for array in arrays
    ]
    liked_loser = jnp.where(batch["loser_won"], 1.0, 1 - preference)
    return chosen, jnp.where(drawn == 0, preference, liked_loser)


def forward(
    task: Task,
    params: Params,
    reference: Params,
    noisy: jax.Array,
    timesteps: jax.Array,
    tokens: jax.Array,
    micro_conditioning: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """What the policy and, where the objective needs it, the reference say about the inputs of `predict`."""

    def run(params: Params) -> jax.Array:
        if not task.objective.detaches_loser:
            return predict(task, params, noisy, timesteps, tokens, micro_conditioning)
        # The loser apart and from constants, so that nothing is kept for its backward pass or spent on it.
        outputs = []
        for i, of_image in enumerate((params, jax.lax.stop_gradient(params))):
            image = slice(i, i + 1)
            inputs = (noisy[:, image], timesteps[:, image], tokens, micro_conditioning[:, image])
            outputs.append(predict(task, of_image, *inputs))
        return jnp.concatenate(outputs, axis=1)

    policy = run(policy_params(task, params, reference))
    return policy, run(cast(task, reference)) if task.objective.needs_reference else None


def loss_fn(
    params: Params, task: Task, reference: Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Mean of the objective over a batch, and the means of its metrics."""
    schedule = task.pipe.schedule
    *drawn, drop = draw_noise(task, batch, key)
    (latents, noise, timesteps, micro_conditioning), preference = choose_images(
        task, batch, key, *drawn, batch["micro_conditioning"]
    )
    tokens = jnp.where(drop[:, None, None], task.pipe.empty_tokens[None], batch["tokens"])
    noisy = schedule.add_noise(latents, noise, timesteps)
    policy, frozen = forward(task, params, reference, noisy, timesteps, tokens, micro_conditioning)
    predictions = Predictions(
        policy=policy,
        reference=frozen,
        target=schedule.target(latents, noise, timesteps),
        timesteps=timesteps,
        preference=preference,
    )
    losses, metrics = task.objective(predictions, schedule)
    return losses.mean(), {name: values.mean() for name, values in metrics.items()}
