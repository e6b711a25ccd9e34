"""Errors of a frozen reference, stored before the first step where examples have a few fixed draws."""

import hashlib
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dspo_jax import json_files
from dspo_jax.array_files import open_array
from dspo_jax.data import loader
from dspo_jax.data.datasets import Dataset, count_examples
from dspo_jax.errors import UserError
from dspo_jax.files import write_json
from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models.model import Params
from dspo_jax.monitoring.progress import Progress
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import batch_share, replicated, shard_batch
from dspo_jax.pipelines.same_kind import weights_digest
from dspo_jax.training.losses.preference import PreferenceLoss
from dspo_jax.training.settings import Settings
from dspo_jax.training.shard_stream import draw_index
from dspo_jax.training.task import Task

# Keys, or groups of keys, that decide the errors beside the weights of the reference and the data.
_KEYS = (
    *("seed", "share_timesteps", "share_noise", "noise_offset", "timesteps", "levels"),
    *("text", "caption_dropout", "encoder_dropout", "dropped_captions"),
    *("model", "lora", "data", "reference", "compute_dtype", "reference_dtype"),
)


def check_draws(settings: Settings, datasets: Sequence[Dataset]) -> None:
    """Refuses `config.reference.draws` where an example's error of the reference is not a fixed number.

    Args:
      settings: of the run.
      datasets: of `config.data`; none where there are other examples.

    Raises:
      UserError: by key.
    """
    draws = settings.reference.draws
    if not draws:
        return
    key = f"config.reference.draws = {draws}"
    if draws < 0:  # where `every` is 0, `limits.parse` does not look at the other keys of the group
        raise UserError(f"{key}: must not be negative")
    if settings.stream.kind != "dataset" or not datasets:
        raise UserError(f"{key}: is of the examples of encoded datasets (config.data.path); set it to 0")
    if not settings.objective.compares_errors:
        anchor = getattr(settings.objective, "anchor_weight", 0.0)
        why = f"config.objective.anchor_weight = {anchor:g}" if anchor else repr(settings.objective.name)
        raise UserError(
            f"{key}: {why} reads the reference's predictions, or no reference, and not its error alone; set "
            "it to 0, or use an objective of one margin of errors without an anchor, such as diffusion_dpo"
        )
    if settings.reference.every:
        raise UserError(
            f"{key}: the errors of a reference that moves cannot be stored (config.reference.every = "
            f"{settings.reference.every}); set one of them to 0"
        )
    if settings.lora.dropout:
        raise UserError(
            f"{key}: would repeat what is dropped, too (config.lora.dropout = {settings.lora.dropout:g}); "
            "set one of them to 0"
        )
    buckets = count_examples(datasets, settings.data.split)
    if len(buckets) > 1 or settings.data.weights or settings.data.curriculum_groups > 1:
        raise UserError(
            f"{key}: needs epochs in which every example comes once, and not images of several sizes, "
            "config.data.weights or config.data.curriculum_groups; set it to 0"
        )


def of_reference_and_data(task: Task, datasets: Sequence[Dataset]) -> str:
    """Returns a digest of the weights of the reference and of what the datasets say of themselves."""
    other = task.reference.pipe if task.reference is not None else task.pipe
    assert other is not None
    manifests = [dataset.manifest for dataset in datasets]
    return _digest(weights_digest(other), manifests)


def store_errors(
    task: Task, settings: Settings, datasets: Sequence[Dataset], mesh: Mesh, reference: Params, workdir: Path
) -> np.ndarray:
    """Computes the reference's errors for the draws of all examples, or goes on with them, or reads them.

    They are kept in reference_errors.npy of the workdir, written batch by batch; those of another reference,
    of other data or other draws are replaced.

    Args:
      task, settings, datasets, mesh: of the run, as `check_draws` lets them pass.
      reference: the frozen parameters, on the mesh.
      workdir: folder of the run.

    Returns:
      Mean squared errors [K, N, P] float32 of K draws of N examples, the same in every process.
    """
    assert isinstance(task.loss, PreferenceLoss)
    draws = settings.reference.draws
    count = sum(count_examples(datasets, settings.data.split).values())
    shape = (draws, count, datasets[0].manifest["images_per_example"])
    keys = {name: settings.given[name] for name in _KEYS}
    digest = _digest(of_reference_and_data(task, datasets), keys, shape)
    path, about = workdir / "reference_errors.npy", workdir / "reference_errors.json"
    processes.wait_for_all("errors of the reference")
    errors = np.full(shape, np.nan, np.float32)
    fix = "delete it, and the errors are computed again"
    if path.is_file() and about.is_file() and json_files.read_object(about, fix) == {"digest": digest}:
        kept = open_array(path, fix)
        if (kept.dtype, kept.shape) != (errors.dtype, shape):
            raise UserError(f"{path}: damaged ({kept.dtype} {kept.shape} in place of float32 {shape}); {fix}")
        errors = np.array(kept)  # NaN where it was stopped
        if np.isinf(errors).any() or (errors < 0).any():
            raise UserError(f"{path}: damaged (holds numbers that are no squares); {fix}")
    elif processes.is_first():
        np.save(path, errors)
        write_json(about, {"digest": digest})
    size = settings.batch_size // settings.accumulation
    missing = np.isnan(errors).any((0, 2))
    done = int(missing.argmax()) // size if missing.any() else math.ceil(count / size)
    if jax.process_count() > 1:  # of what the first one wrote, others may not see everything yet
        done = int(multihost_utils.process_allgather(np.int32(done)).min())
    if done * size >= count:
        logging.info("%s: holds the errors of the reference", path)
        return errors
    stored = np.lib.format.open_memmap(path, "r+") if processes.is_first() else None
    compute = jax.jit(on_mesh(partial(task.loss.reference_error, task), mesh), out_shardings=replicated(mesh))
    key = jax.jit(lambda: jax.random.key(settings.seed), out_shardings=replicated(mesh))()
    names = ("moments", *task.pipe.conditioning_inputs)
    batches = loader.eval_batches(datasets, batch_size=size, split=settings.data.split)
    position = json.loads(batches.get_state())
    batches.set_state(json.dumps({**position, "next_batch": done}))
    total = math.ceil(count / size)
    with Progress(
        "errors of the reference", total, done, first="compiling", active=processes.is_first()
    ) as progress:
        for number, batch in enumerate(batches, done + 1):
            rows = batch["row"]
            # A short batch is filled with its first example, and cut into the shares of the processes.
            taken = np.where(np.arange(size) < len(rows), np.arange(size), 0)
            share, shares = batch_share(mesh)
            taken = np.split(taken, shares)[share]
            arrays = {name: batch[name][taken] for name in names}
            for draw in range(draws):
                arrays["index"] = draw_index(rows[taken], draw, count).astype(np.uint32)
                found = np.asarray(compute(reference, shard_batch(arrays, mesh), key))[: len(rows)]
                if not np.isfinite(found).all():
                    raise UserError(
                        f"config.reference.draws = {draws}: the reference's error is not a number at one of "
                        f"the examples {rows[0]} to {rows[-1]}; set --config.compute_dtype=float32"
                    )
                errors[draw, rows] = found
            if stored is not None:
                stored[:, rows] = errors[:, rows]
            progress.update(number)
    batches.close()
    if stored is not None:
        stored.flush()
    return errors


def _digest(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
