"""The training step: a batch of encoded pairs, a frozen reference, one optimizer update.

`train_step(state, reference, batch, key) -> (state, metrics)` is all of it; the loop around it is train.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dspo_jax import stability
from dspo_jax.models import Params, lora
from dspo_jax.objectives import Objective, Predictions
from dspo_jax.pipeline import Pipeline
from dspo_jax.sharding import gather, on_mesh

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# What the step reads of a batch; captions and keys stay on the host.
INPUTS = ("moments", "tokens", "micro_conditioning", "preference", "loser_won", "index")


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a run computes: everything about the step that is fixed before it starts.

    Attributes:
      pipe: the model's architectures and schedule.
      objective: from `get_objective`.
      optimizer: the gradient transformation.
      learning_rate: number of updates done -> learning rate of the next one.
      param_dtype: of the trained parameters.
      compute_dtype: of the networks; losses, accumulated gradients and the optimizer are float32.
      reference_dtype: what the frozen parameters are stored in.
      remat: which activations the backward pass computes again, see models/remat.py.
      timesteps: (first, last) that are drawn, both included.
      caption_dropout: probability of dropping the caption of a pair.
      share_timesteps: whether the images of a pair share their timestep.
      share_noise: whether the images of a pair share their noise.
      positive_ratio: probability that the image drawn of a pair is the winner, for an objective that takes
        one.
      accumulation: parts a batch is worked through in.
      train_text_encoder: whether the text encoder is among the trained parameters.
      adapters: whether adapters alone are trained (models/lora.py).
      ema_decay: of the moving average of the trained parameters; 0 keeps none.
      loss_spike: see `stability.judge`.
    """

    pipe: Pipeline
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[jax.Array], jax.Array]
    param_dtype: str
    compute_dtype: str
    reference_dtype: str
    remat: str
    timesteps: tuple[int, int]
    caption_dropout: float
    share_timesteps: bool
    share_noise: bool
    positive_ratio: float
    accumulation: int
    train_text_encoder: bool
    adapters: bool
    ema_decay: float
    loss_spike: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What changes from step to step, and all that a checkpoint holds.

    `params` has "unet" and, where they are trained, the text encoders; of each all parameters, or with LoRA
    the adapters alone. `ema` is their moving average, or None where none is kept.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None
    health: stability.Health
    task: Task = dataclasses.field(metadata={"static": True})

    def arrays(self) -> dict[str, Any]:
        """The state without its task: what is saved."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in arrays.items() if name != "task" and value is not None}

    @property
    def result(self) -> Params:
        """The parameters that a run is judged by and that leave it: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def init_state(task: Task, params: Params) -> TrainState:
    """The state at step 0; jit it, or its parts share memory."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=task.optimizer.init(_float32(params)),
        ema=_float32(params) if task.ema_decay else None,
        health=stability.start(),
        task=task,
    )


def _float32(params: Params) -> Params:
    """What the optimizer sees: it works in float32, however the parameters are kept."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


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


def predict(
    task: Task,
    params: Params,
    noisy: jax.Array,
    timesteps: jax.Array,
    tokens: jax.Array,
    micro_conditioning: jax.Array,
) -> jax.Array:
    """`Pipeline.predict_pairs` in the task's compute dtype."""
    params, noisy = gather(params), noisy.astype(task.compute_dtype)
    return task.pipe.predict_pairs(params, noisy, timesteps, tokens, micro_conditioning, remat=task.remat)


def policy_params(task: Task, params: Params, reference: Params) -> Params:
    """The policy as `predict` takes it: trained parameters in the compute dtype, the rest of the reference.

    Until the first update it is the same numbers as the reference (`start.make_task` sees to the dtypes).
    """
    return lora.combine(cast(task, reference), cast(task, params))


def cast(task: Task, params: Params) -> Params:
    """Parameters in the compute dtype, which `predict` takes."""
    return jax.tree.map(lambda leaf: leaf.astype(task.compute_dtype), params)


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


def train_step(
    state: TrainState, reference: Params, batch: Batch, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """One optimizer update.

    Args:
      state: may be donated.
      reference: the frozen tree, in `task.reference_dtype`: the text encoders unless they are trained and no
        reference is needed, and "unet" for an objective that needs a reference. With LoRA the base model,
        with adapters that add nothing.
      batch: `moments` [B, P, h, w, 2C], `tokens` [B, E, S], `micro_conditioning` [B, P, 6], `preference`
        and `loser_won` [B], `index` [B] uint32 (unique over the run).
      key: of the run, the same for every step: an example's randomness follows from its index.

    Returns:
      The new state and scalar metrics: `loss`, `grad_norm` (before clipping), `learning_rate`, `skipped` and
      `skipped_in_a_row` (see `stability.Health`), and the objective's own. An update that is skipped leaves
      everything but the step and those counts as it was.
    """
    task = state.task
    (loss, metrics), grads = mean_gradient(state.params, task, reference, batch, key)
    grad_norm = optax.tree.norm(grads)
    updates_made = state.health.updates
    good, health = stability.judge(state.health, loss, grad_norm, task.loss_spike)
    updates, opt_state = task.optimizer.update(grads, state.opt_state, _float32(state.params))
    params = optax.apply_updates(state.params, updates)
    ema = None
    if state.ema is not None:
        decay = task.ema_decay
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, _float32(params))

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)

    metrics |= {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": task.learning_rate(updates_made),
        "skipped": health.skipped.astype(jnp.float32),
        "skipped_in_a_row": health.skipped_in_a_row.astype(jnp.float32),
    }
    params, opt_state, ema = keep((params, opt_state, ema), (state.params, state.opt_state, state.ema))
    return TrainState(state.step + 1, params, opt_state, ema, health, task), metrics


def mean_gradient(
    params: Params, task: Task, reference: Params, batch: Batch, key: jax.Array
) -> tuple[tuple[jax.Array, Metrics], Params]:
    """Loss and metrics of a batch and the gradient of the loss in float32, part by part where it is split."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def evaluate(part: Batch) -> tuple[tuple[jax.Array, Metrics], Params]:
        results, grads = grad_fn(params, task, reference, part, key)
        return results, _float32(grads)

    if task.accumulation == 1:
        return evaluate(batch)
    # Part k takes every accumulation-th example, so that each device keeps working on its own.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, task.accumulation, *x.shape[1:]), 1, 0), batch)
    shapes = jax.eval_shape(evaluate, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, evaluate(part)), None), zeros, parts
    )
    return jax.tree.map(lambda x: x / task.accumulation, total)


def compile_step(state: TrainState) -> Any:
    """`train_step`, jitted for the mesh of `state`; the new state is laid out like it, and it is donated."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    sharding: Any = state.step.sharding
    mesh = sharding.mesh
    for_cpu: dict[str, str | int] = {
        # By default XLA orders the program for concurrency, at up to twice the temporaries.
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        # And takes half of what AVX-512 offers.
        "xla_cpu_prefer_vector_width": 512,
    }
    return jax.jit(
        on_mesh(train_step, mesh),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=for_cpu if mesh.devices.flat[0].platform == "cpu" else None,
    )
