"""The training step: the gradient of a loss over a batch, and one optimizer update.

`train_step(state, reference, batch, key) -> (state, metrics)` is the whole step; the loop is in loop.py.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Float32, Key, PyTree

from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.kernels.layouts import format_of
from dspo_jax.models.model import Params
from dspo_jax.parallel.host_memory import to_device
from dspo_jax.parallel.mesh import replicated
from dspo_jax.training import stability
from dspo_jax.training.task import USABLE, Batch, Metrics, Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of a training run: everything that changes from step to step, which is what a checkpoint holds.

    Attributes:
      step: updates done, skipped ones included, int32 scalar.
      params: trained parameters by component: the denoiser and, where they are trained, the text encoders;
        all parameters of each, or with LoRA the adapters alone.
      opt_state: of the optimizer.
      ema: moving average of `params` in float32, or the optimizer's own; None where none is kept.
      health: skipped updates and statistics of the loss.
      margin_size: moving mean that the objective's beta follows, scalar, or None where beta stays.
      task: static configuration; it is not saved.
    """

    # Not an array each: JAX also makes states of shapes and of shardings.
    step: PyTree
    params: Params
    opt_state: PyTree
    ema: PyTree
    health: stability.Health
    margin_size: PyTree
    task: Task = dataclasses.field(metadata={"static": True})

    def arrays(self) -> dict[str, object]:
        """Returns the state without its task: what is saved."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in arrays.items() if name != "task" and value is not None}

    @property
    def result(self) -> Params:
        """The parameters that a run is judged by and that leave it: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def init_state(task: Task, params: Params) -> TrainState:
    """Returns the state at step 0; jit it, or its parts share memory."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=task.update.optimizer.init(_float32(params)),
        ema=_float32(params) if task.update.ema_decay or task.update.average else None,
        health=stability.start(),
        margin_size=jnp.zeros(()) if task.update.auto_beta else None,
        task=task,
    )


def _float32(params: Params) -> Params:
    """Casts to float32, in which the optimizer works however the parameters are kept."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def train_step(
    state: TrainState, reference: Params, batch: Batch, key: Key[jax.Array, ""]
) -> tuple[TrainState, Metrics]:
    """Makes one optimizer update.

    Args:
      state: may be donated.
      reference: frozen parameters by component, in `task.precision.reference_dtype`: what is not trained, and
        every network for a loss that needs a reference. With LoRA the base model, with adapters that add
        nothing.
      batch: arrays [B, ...] that `task.loss` reads.
      key: of the run, the same for every step: an example's randomness follows from its index.

    Returns:
      The new state and scalar metrics: `loss`, `grad_norm` (before clipping), `learning_rate`, `skipped` and
      `skipped_in_a_row` (see `stability.Health`), and those of the loss. An update that is skipped leaves
      everything but the step and those counts as it was.
    """
    task, rule = state.task, state.task.update
    if rule.auto_beta is not None:
        batch = rule.auto_beta.put_into(batch, state.margin_size)
    (loss, metrics), grads = mean_gradient(state.params, task, reference, batch, key)
    grad_norm = optax.tree.norm(grads)
    updates_made = state.health.updates
    good, health = stability.judge(state.health, loss, grad_norm, rule.loss_spike)
    params, before = _float32(state.params), to_device(state.opt_state)
    updates, opt_state = rule.optimizer.update(grads, before, params)
    moved = optax.apply_updates(params, updates)
    params = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state.params)
    ema = None
    if rule.average is not None:
        ema = rule.average(opt_state, moved)
    elif state.ema is not None:
        decay = rule.ema_decay
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, _float32(params))

    def keep(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)

    metrics |= {
        "loss": loss,
        "grad_norm": grad_norm,
        # Prodigy's rate is a factor of the one that it found.
        "learning_rate": rule.learning_rate(updates_made) * optax.tree.get(state.opt_state, "estim_lr", 1.0),
        "skipped": health.skipped.astype(jnp.float32),
        "skipped_in_a_row": health.skipped_in_a_row.astype(jnp.float32),
    }
    margin_size = None
    if rule.auto_beta is not None:
        margin_size = rule.auto_beta.follow(state.margin_size, metrics, updates_made)
    params, opt_state, ema, margin_size = keep(
        (params, opt_state, ema, margin_size),
        (state.params, before, state.ema, state.margin_size),
    )
    return TrainState(state.step + 1, params, opt_state, ema, health, margin_size, task), metrics


def mean_gradient(
    params: Params, task: Task, reference: Params, batch: Batch, key: Key[jax.Array, ""]
) -> tuple[tuple[Float32[jax.Array, ""], Metrics], Params]:
    """Computes loss, metrics and float32 gradient of a batch, part by part where it is split.

    Where the loss leaves examples out all of them are means over the others of the whole batch, however it is
    split; the metric `unusable_images` counts what is left out, and of more than half the loss is NaN.
    """
    (loss, metrics), grads = _mean_of_parts(params, task, reference, batch, key)
    usable = metrics.pop(USABLE, None)
    if usable is None:
        return (loss, metrics), grads
    (loss, metrics), grads = jax.tree.map(lambda x: x / usable, ((loss, metrics), grads))
    examples = len(jax.tree.leaves(batch)[0])
    unusable = jnp.round((1 - usable) * examples)
    loss = jnp.where(2 * unusable > examples, jnp.nan, loss)
    return (loss, metrics | {"unusable_images": unusable}), grads


def _mean_of_parts(
    params: Params, task: Task, reference: Params, batch: Batch, key: Key[jax.Array, ""]
) -> tuple[tuple[Float32[jax.Array, ""], Metrics], Params]:
    """Returns means over the parts of a batch, in which examples that a loss leaves out are zeros."""
    grad_fn = jax.value_and_grad(task.loss, has_aux=True)

    def evaluate(part: Batch) -> tuple[tuple[jax.Array, Metrics], Params]:
        results, grads = grad_fn(params, task, reference, part, key)
        return results, _float32(grads)

    count = task.update.accumulation
    if count == 1:
        return evaluate(batch)
    parts = split_batch(batch, count)
    shapes = jax.eval_shape(evaluate, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, evaluate(part)), None), zeros, parts
    )
    return jax.tree.map(lambda x: x / count, total)


def split_batch(batch: Batch, count: int) -> Batch:
    """Splits arrays [B, ...] into parts [count, B / count, ...].

    Part k takes every count-th example, so that each device keeps working on its own.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)


COMPILER_OPTIONS: dict[str, dict[str, str | int]] = {
    "cpu": {
        # By default XLA orders the program for concurrency, at up to twice the temporaries.
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        # By default XLA also uses half of the width that AVX-512 offers.
        "xla_cpu_prefer_vector_width": 512,
        # XLA of JAX 0.10 takes away the barriers of `jax.checkpoint`, finds that what is computed again was
        # computed before, and keeps it: rematerialisation would save nothing. Later ones do not.
        "xla_disable_hlo_passes": "cse_barrier_expander",
    },
    # By default XLA makes one product of queries, keys and values, and cuts its results and gradients apart.
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 0},
}


def compile_step(state: TrainState) -> jax.stages.Wrapped:
    """Jits `train_step` for the mesh of `state`, which is donated; the new state has the same layout."""
    formats = jax.tree.map(format_of, state)
    mesh = state.step.sharding.mesh
    platform = mesh.devices.flat[0].platform
    return jax.jit(
        on_mesh(train_step, mesh),
        donate_argnums=0,
        out_shardings=(formats, None),
        compiler_options=COMPILER_OPTIONS.get(platform),
    )


def lower_step(
    state: TrainState, reference: Params, batch: Mapping[str, object], mesh: Mesh
) -> jax.stages.Lowered:
    """Traces the step of a run, ready to be compiled for the devices of the mesh.

    Args:
      state, reference: from `start.make_state`, abstract.
      batch: from `costs.abstract_batch`.
      mesh: the devices.
    """
    return compile_step(state).lower(state, reference, batch, abstract_key(mesh))


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns the shape of a run's key, which every device holds."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
