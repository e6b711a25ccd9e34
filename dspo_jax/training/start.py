"""What a run starts from: its config as a task, its parameters on the devices, its data, its workdir.

Every refusal that needs no step is made here.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from dspo_jax import spelling
from dspo_jax.data import datasets, shards
from dspo_jax.errors import UserError
from dspo_jax.models import lora
from dspo_jax.models.model import Params
from dspo_jax.models.remat import check_policy
from dspo_jax.monitoring.metrics import import_wandb
from dspo_jax.objectives import Objective, get_objective
from dspo_jax.parallel.mesh import check_batch_size, make_mesh
from dspo_jax.parallel.rules import make_shardings, place
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.training import sample_grids
from dspo_jax.training.optim import make_optimizer
from dspo_jax.training.step import TrainState, init_state
from dspo_jax.training.task import Task
from dspo_jax.training.validation import check_settings
from dspo_jax.weights import model_dir
from dspo_jax.weights.layout import DTYPES

_DTYPES = ("float32", "bfloat16")


def prepare(config: ConfigDict) -> tuple[Task, Mesh, Params]:
    """Everything that can be refused before weights are read: (task, mesh, adapters or nothing).

    Raises:
      ValueError, OSError: a config, model or data that cannot be trained.
    """
    if not config.model:
        raise UserError("config.model is not set: give --config.model=DIR, a diffusers folder")
    if (Path(config.model) / "checkpoints").is_dir():
        raise UserError(
            f"config.model = {config.model!r}: a training workdir; write its model out, and name that: "
            f"python -m dspo_jax.convert export --run={config.model} --out=DIR"
        )
    pipe = load_pipeline(config.model)
    for line in model_dir.foresee_export(pipe.path):
        logging.warning("config.model = %s: %s", config.model, line)
    task = make_task(config, pipe)
    adapters = make_adapters(config, pipe)
    check_data(config, pipe, task.objective)
    sizes = config.mesh.to_dict()
    dcn_sizes = sizes.pop("dcn")
    mesh = make_mesh(sizes, dcn_sizes=dcn_sizes)
    check_batch_size(
        config.batch_size // config.accumulation, mesh, "config.batch_size / config.accumulation"
    )
    if config.validation.every:
        check_settings(config.validation.batch_size, config.validation.draws, mesh)
    if config.samples.every:
        samples, end = config.samples, pipe.schedule.num_train_timesteps
        sample_grids.check_settings(samples.seeds, samples.guidance_scale, samples.num_inference_steps, end)
    if config.wandb_project:
        import_wandb(config.wandb_project)
    return task, mesh, adapters


def make_task(config: ConfigDict, pipe: Pipeline) -> Task:
    """What a config asks to be computed with a model.

    Raises:
      ValueError: a config value that is unknown or out of range, by key.
    """
    _check_values(config)
    arguments = {name: value for name, value in config.objective.to_dict().items() if value is not None}
    optimizer, learning_rate = make_optimizer(config.optimizer.to_dict(), config.steps, config.batch_size)
    return Task(
        pipe=pipe,
        objective=get_objective(arguments.pop("name"), **arguments),
        optimizer=optimizer,
        learning_rate=learning_rate,
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        reference_dtype=reference_dtype(config),
        remat=config.remat,
        timesteps=_timesteps(config, pipe),
        caption_dropout=config.caption_dropout,
        share_timesteps=config.share_timesteps,
        share_noise=config.share_noise,
        positive_ratio=config.positive_ratio,
        accumulation=config.accumulation,
        train_text_encoder=config.train_text_encoder,
        adapters=config.lora.rank > 0,
        ema_decay=config.ema_decay,
        loss_spike=config.stability.loss_spike,
    )


def _check_values(config: ConfigDict) -> None:
    values = flatten_dict(config.to_dict(), sep=".")
    check_policy(config.remat)
    for key in ("compute_dtype", "param_dtype", "reference_dtype"):
        if values[key] not in _DTYPES and (key, values[key]) != ("reference_dtype", None):
            raise UserError(spelling.unknown(f"config.{key}", values[key], _DTYPES))
    for key in ("caption_dropout", "positive_ratio"):
        if not 0 <= values[key] <= 1:
            raise UserError(f"config.{key} = {values[key]}: must be between 0 and 1")
    if not 0 <= values["ema_decay"] < 1:
        raise UserError(f"config.ema_decay = {values['ema_decay']}: must be at least 0 and below 1")
    for key in (
        "steps",
        "batch_size",
        "accumulation",
        "log_every",
        "checkpoint.every",
        "checkpoint.max_to_keep",
    ):
        if values[key] < 1:
            raise UserError(f"config.{key} = {values[key]}: must be at least 1")
    for key in (
        "stability.loss_spike",
        "stability.max_skipped",
        "validation.every",
        "samples.every",
        "profile.steps",
    ):
        if values[key] < 0:
            raise UserError(f"config.{key} = {values[key]}: must not be negative")
    if config.batch_size % config.accumulation:
        raise UserError(
            f"config.accumulation = {config.accumulation}: must divide "
            f"config.batch_size = {config.batch_size}"
        )
    # The policy is rounded to param_dtype and then to the compute dtype. Where the reference is rounded
    # otherwise, the two differ before the first update. (With LoRA they are one tree.)
    rounded, theirs = (
        "bfloat16" in (config.compute_dtype, dtype) for dtype in (config.param_dtype, reference_dtype(config))
    )
    if rounded != theirs and not config.lora.rank:
        raise UserError(
            f"config.reference_dtype = {reference_dtype(config)!r}: policy and reference would differ from "
            f"the start, with config.param_dtype = {config.param_dtype!r} and config.compute_dtype = "
            f"{config.compute_dtype!r}; leave reference_dtype unset, or set it to {config.param_dtype!r}"
        )


def _timesteps(config: ConfigDict, pipe: Pipeline) -> tuple[int, int]:
    end = pipe.schedule.num_train_timesteps - 1
    first, last = config.timesteps.first, end if config.timesteps.last is None else config.timesteps.last
    if not 0 <= first <= last <= end:
        raise UserError(
            f"config.timesteps.first = {first} and config.timesteps.last = {last}: must be in order and "
            f"between 0 and {end}"
        )
    return first, last


def reference_dtype(config: ConfigDict) -> str:
    """What the reference is stored in: the lesser of parameters and computation unless the config says."""
    return config.reference_dtype or (
        "bfloat16" if "bfloat16" in (config.param_dtype, config.compute_dtype) else "float32"
    )


def make_adapters(config: ConfigDict, pipe: Pipeline) -> Params:
    """What is trained with LoRA at its start: adapters of the trained networks, or none where it is off.

    Raises:
      ValueError: a rank below 0, a pattern that is no regular expression, or a network without a match.
    """
    if config.lora.rank < 0:
        raise UserError(f"config.lora.rank = {config.lora.rank}: must be at least 1, or 0 to turn LoRA off")
    if config.lora.rank == 0:
        return {}
    models = {"unet": pipe.unet, **(pipe.text_encoders if config.train_text_encoder else {})}
    key = jax.random.key(config.seed)
    try:
        return {
            name: lora.init_adapters(model.abstract_params(), config.lora.targets, config.lora.rank, key)
            for name, model in models.items()
        }
    except (UserError, re.error) as error:
        raise UserError(f"config.lora.targets = {config.lora.targets}: {error}") from error


def make_state(
    task: Task, mesh: Mesh, adapters: Params | None = None, *, abstract: bool = False
) -> tuple[TrainState, Params]:
    """The state at step 0 and the frozen reference, read from the model; every array is born sharded.

    With adapters these are what is trained. The reference has them too, as they start: they add nothing, and
    policy and reference remain one program.

    Args:
      task: from `make_task`.
      mesh: from `mesh.make_mesh`.
      adapters: from `make_adapters`.
      abstract: read nothing, and return `jax.ShapeDtypeStruct` leaves with their sharding.
    """

    def put(params: Params, dtype: str) -> Params:
        shardings = make_shardings(params, mesh)
        if abstract:
            return _abstract(params, shardings, dtype)
        return place(jax.tree.map(lambda leaf: np.asarray(leaf, DTYPES[dtype]), params), shardings)

    def read(name: str, dtype: str) -> Params:
        pipe = task.pipe
        return put(
            pipe.networks[name].abstract_params() if abstract else pipe.read_params(name, dtype), dtype
        )

    networks = ("unet", *task.pipe.text_encoders)
    trained = () if adapters else networks if task.train_text_encoder else ("unet",)
    params = {name: read(name, task.param_dtype) for name in trained}
    # What is not trained; and all of it where the objective looks at the reference.
    frozen = [name for name in networks if task.objective.needs_reference or name not in trained]
    reference = {name: read(name, task.reference_dtype) for name in frozen}
    if adapters:
        params = put(adapters, task.param_dtype)
        reference = lora.combine(reference, put(adapters, task.reference_dtype))
    shapes = jax.eval_shape(partial(init_state, task), params)
    shardings = make_shardings(shapes, mesh)
    if abstract:
        return jax.tree.map(_abstract, shapes, shardings), reference
    return jax.jit(partial(init_state, task), donate_argnums=0, out_shardings=shardings)(params), reference


def _abstract(tree: Any, shardings: Any, dtype: str | None = None) -> Any:
    def leaf(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree, shardings)


def check_data(config: ConfigDict, pipe: Pipeline, objective: Objective) -> None:
    """Refuses data that is damaged, empty or made with another model, or single images where two compare.

    Also several datasets that do not fit one another, and weights that do not fit them.
    """
    if not config.data.path:
        raise UserError(
            "config.data.path is not set: give --config.data.path=DIR, written by dspo_jax.encode"
        )
    found = datasets.read_datasets(config.data.path)
    datasets.check_weights(config.data.weights, found)
    for dataset in found:
        shards.check_manifest(dataset.manifest, pipe.fingerprint(), path=dataset.folder)
    images = found[0].manifest["images_per_example"]
    if objective.needs_loser and images == 1:
        raise UserError(
            f"config.objective.name = {objective.name!r}: compares winner and loser, but {config.data.path} "
            "holds single images; use sft or ddpm, or encode pairs"
        )
    if objective.images == "one" and images == 1:
        raise UserError(
            f"config.objective.name = {objective.name!r}: needs liked and disliked images, but "
            f"{config.data.path} holds single images without such labels; use sft or ddpm, or encode pairs"
        )
    # These raise where there are no examples. What is held out need not be so in every dataset.
    for dataset in found:
        datasets.count_examples([dataset], config.data.split, "config.data.split")
    if config.validation.every:
        datasets.count_examples(
            found,
            config.validation.split,
            "config.validation.split",
            "choose another with --config.validation.split=NAME, train without held-out examples with "
            "--config.validation.every=0, or encode the data so that some are held out",
        )
    for dataset in found:
        shards.verify_shards(dataset.folder, dataset.manifest)
