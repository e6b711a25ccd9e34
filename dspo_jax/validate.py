"""Held-out pairs: does the model rank them as people did? Implicit accuracy, margins and errors by timestep.

    python -m dspo_jax.validate --model runs/mine --data data/pairs --split test --draws 16

The implicit reward of an image is the decrease of its denoising error against the reference, averaged over
draws of timestep and noise (Diffusion-DPO, S4.1, where it serves as a reward model in Table S2).
Every call uses the same noise and the same timesteps, so that curves over a run compare like with like.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from dspo_jax import cli, distributed
from dspo_jax.convert import read_base
from dspo_jax.data import datasets, loader, shards
from dspo_jax.files import write_json
from dspo_jax.metrics import Progress, binomial_interval
from dspo_jax.objectives import Predictions
from dspo_jax.objectives.implicit_reward import error_drift, squared_error
from dspo_jax.pipeline import Pipeline, load_pipeline
from dspo_jax.schedule import Schedule
from dspo_jax.sharding import (
    batch_share,
    check_batch_size,
    make_mesh,
    on_mesh,
    replicated,
    shard_batch,
    use_cpu_cores,
)

# (parameters, noisy latents [B, P, h, w, C], timesteps [B, P], tokens [B, E, S], micro-conditioning
# [B, P, 6]) -> the UNet's output.
Predict = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

_SEED = 20_241  # of the noise, fixed for ever: changing it moves every validation curve


def check_settings(batch_size: int, draws: int, mesh: Mesh) -> None:
    """Refuses a batch size that the mesh cannot split, and no draw.

    Raises:
      ValueError: by the key of the config.
    """
    check_batch_size(batch_size, mesh, "config.validation.batch_size")
    if draws < 1:
        raise ValueError(f"config.validation.draws = {draws}: must be at least 1")


class Validator:
    """Judges a model on one split; compiled once (for each image size, where there are buckets)."""

    def __init__(
        self,
        predict: Predict,
        schedule: Schedule,
        mesh: Mesh,
        *,
        path: str | Path,
        split: str,
        batch_size: int,
        draws: int,
    ):
        """Open the split.

        Args:
          predict: runs the text encoders and the UNet.
          schedule: the forward process.
          mesh: the devices.
          path: a dataset written by `dspo_jax.encode`, or several separated by commas.
          split: the held-out split.
          batch_size: examples in one call.
          draws: (timestep, noise) draws for each example; the timesteps are the midpoints of `draws` equal
            bins.

        Raises:
          ValueError: what `check_settings` refuses, or a split that is missing or empty.
        """
        check_settings(batch_size, draws, mesh)
        self.num_examples = loader.num_examples(path, split)
        self._path, self._split, self._batch_size, self._mesh = path, split, batch_size, mesh
        steps = schedule.num_train_timesteps
        self._timesteps = ((np.arange(draws) + 0.5) * steps / draws).astype(np.int32)

        def add_noise(
            batch: dict[str, jax.Array], timestep: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            mean, _ = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)

            def draw(index: jax.Array) -> jax.Array:
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(_SEED), index), timestep)
                return jax.random.normal(key, (1, *mean.shape[2:]))

            noise = jnp.broadcast_to(jax.vmap(draw)(batch["index"]), mean.shape)
            timesteps = jnp.full(mean.shape[:2], timestep)
            return (
                schedule.add_noise(mean, noise, timesteps),
                schedule.target(mean, noise, timesteps),
                timesteps,
            )

        def score(
            policy: jax.Array, frozen: jax.Array | None, target: jax.Array, timesteps: jax.Array
        ) -> dict[str, jax.Array]:
            predictions = jax.tree.map(
                lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x,
                Predictions(policy, frozen, target, timesteps),
            )
            judged = {"error": squared_error(predictions, "mean")}
            if frozen is not None:
                judged["drift"] = error_drift(predictions, "mean")
            return judged

        # The networks are a program of their own, run for the policy and again for the reference: compiled
        # together with the scores, the two are fused differently, and equal weights differ in the last bit.
        self._add_noise, self._predict = jax.jit(add_noise), jax.jit(on_mesh(predict, mesh))
        # What every process reads of the result must be on every device.
        self._score = jax.jit(score, out_shardings=replicated(mesh))

    def __call__(
        self, policy: Any, reference: Any, report: Callable[[int], None] = lambda judged: None
    ) -> dict[str, float]:
        """Scalars of the whole split.

        Both are what `predict` takes, in the same dtype; `reference` is None for a run without one. `report`
        is told how many examples have been judged.

        `winner_error` and, with a reference, `winner_drift` (error of the policy minus the reference's); for
        pairs `loser_error`, `loser_drift`, `margin` (reward of the winner minus the loser's, no scale), and
        `implicit_accuracy`: the share of pairs whose margin, averaged over the draws, is positive (ties one
        half), with the ends of its 95 % interval (Wilson; it takes the pairs as independent).

        With `_t500` and the like at the end, those of one timestep bin: the drifts, margin and accuracy, or
        the errors where there is no reference.
        """
        results = []
        judged = 0
        for examples in self._batches():
            draws = [self._judge_examples(policy, reference, examples, t) for t in self._timesteps]
            results.append(np.stack(draws, axis=1))
            judged += len(examples["index"])
            report(judged)
        values_SDBP = np.concatenate(results, axis=2)  # (error, drift) x draw x example x image
        return summarise(values_SDBP, self._timesteps)

    def _batches(self) -> Any:
        batches = loader.eval_batches(self._path, batch_size=self._batch_size, split=self._split)
        yield from batches
        batches.close()

    def _judge_examples(
        self, policy: Any, reference: Any, examples: Mapping[str, Any], timestep: int
    ) -> np.ndarray:
        """[2 or 1 (no reference), B, P] on the host; a short last batch is filled with its first example."""
        count = len(examples["index"])
        take = np.where(np.arange(self._batch_size) < count, np.arange(self._batch_size), 0)
        share, shares = batch_share(self._mesh)
        take = np.split(take, shares)[share]
        batch = {name: examples[name][take] for name in ("moments", "tokens", "micro_conditioning")}
        batch["index"] = examples["index"][take].astype(np.uint32)
        placed = shard_batch(batch, self._mesh)
        noisy, target, timesteps = self._add_noise(placed, jnp.int32(timestep))
        inputs = (noisy, timesteps, placed["tokens"], placed["micro_conditioning"])
        outputs = [
            None if params is None else self._predict(params, *inputs) for params in (policy, reference)
        ]
        judged = self._score(*outputs, target, timesteps)
        return np.stack([np.asarray(judged[name])[:count] for name in ("error", "drift") if name in judged])


def summarise(values: np.ndarray, timesteps: np.ndarray) -> dict[str, float]:
    """The scalars that `Validator` reports.

    Args:
      values: [S, D, N, P]: S = 2 (error, drift) or 1 (error) x draw x example x image (winner, loser).
      timesteps: [D].
    """
    images = ("winner", "loser")[: values.shape[3]]
    measures = ("error", "drift")[: len(values)]
    means_SDP = values.mean(2)
    summary = {
        f"{image}_{measure}": float(means_SDP[s, :, p].mean())
        for s, measure in enumerate(measures)
        for p, image in enumerate(images)
    }
    for d, timestep in enumerate(timesteps):
        for p, image in enumerate(images):
            summary[f"{image}_{measures[-1]}_t{timestep}"] = float(means_SDP[-1, d, p])
    if measures[-1] != "drift" or len(images) == 1:
        return summary
    margins_DN = values[1, :, :, 1] - values[1, :, :, 0]
    correct_N = _correct(margins_DN.mean(0))
    low, high = binomial_interval(correct_N.sum(), len(correct_N))
    summary |= {
        "margin": float(margins_DN.mean()),
        "implicit_accuracy": float(correct_N.mean()),
        "implicit_accuracy_low": low,
        "implicit_accuracy_high": high,
    }
    for timestep, margins_N in zip(timesteps, margins_DN, strict=True):
        summary[f"margin_t{timestep}"] = float(margins_N.mean())
        summary[f"implicit_accuracy_t{timestep}"] = float(_correct(margins_N).mean())
    return summary


def _correct(margins: np.ndarray) -> np.ndarray:
    """1 for a margin above 0, 1/2 for none at all, 0 for one below and for one that is not a number."""
    return np.where(np.isnan(margins), 0.0, 0.5 + 0.5 * np.sign(margins))


def judge(
    model: str | Path,
    reference: str | Path | None,
    data: str | Path,
    *,
    split: str,
    draws: int,
    batch_size: int,
    compute_dtype: str,
) -> dict[str, float]:
    """What `Validator` says of a model against its reference, on all devices.

    Args:
      model: a training workdir or a diffusers folder.
      reference: what it was trained from; None is what a workdir's config says.
      data: a dataset of pairs written by `dspo_jax.encode`, or several separated by commas.
      split, draws: see `Validator`.
      batch_size: pairs in one call, filled up to a multiple of the devices.
      compute_dtype: of the networks.

    Raises:
      ValueError: no reference, data of another model or of single images, or what `Validator` refuses.
      FileNotFoundError: a folder is missing.
    """
    if reference is None:
        if not (Path(model) / "checkpoints").is_dir():
            raise ValueError(
                f"--model={model}: no training workdir; give --reference, what it was trained from"
            )
        reference = read_base(Path(model))
    pipes = load_pipeline(model), load_pipeline(reference)
    found = datasets.read_datasets(data)
    datasets.count_examples(found, split, "--split", "choose another with --split=NAME")
    for dataset in found:
        shards.check_manifest(dataset.manifest, pipes[1].fingerprint(), path=dataset.folder)
        if dataset.manifest["images_per_example"] == 1:
            raise ValueError(f"--data={dataset.folder}: holds single images; implicit accuracy is of pairs")
    if pipes[0].unet.settings != pipes[1].unet.settings:
        raise ValueError(f"--reference={reference}: its UNet is another one than that of {model}")
    mesh = make_mesh({"data": -1})

    def place(pipe: Pipeline) -> Any:
        params = {name: pipe.read_params(name, compute_dtype) for name in ("unet", *pipe.text_encoders)}
        return jax.device_put(params, replicated(mesh))

    def predict(params: Any, noisy: jax.Array, *inputs: jax.Array) -> jax.Array:
        return pipes[0].predict_pairs(params, noisy.astype(compute_dtype), *inputs)

    validator = Validator(
        predict,
        pipes[0].schedule,
        mesh,
        path=data,
        split=split,
        batch_size=math.ceil(batch_size / mesh.size) * mesh.size,
        draws=draws,
    )
    with Progress("validate", validator.num_examples, active=distributed.is_first()) as progress:
        return validator(place(pipes[0]), place(pipes[1]), progress.update)


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    use_cpu_cores()
    distributed.initialize_from_flags()
    values = flags.FLAGS
    dtype = values.compute_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    scores = judge(
        values.model,
        values.reference,
        values.data,
        split=values.split,
        draws=values.draws,
        batch_size=values.batch_size,
        compute_dtype=dtype,
    )
    if not distributed.is_first():
        return
    if values.out:
        write_json(Path(values.out), scores, shared=True)
    table = Table(title=f"{values.data}, {values.split}: {values.draws} draw(s) for each pair, {dtype}")
    for heading in ("timestep", "implicit accuracy", "margin"):
        table.add_column(heading, justify="right")
    for name in scores:
        if name.startswith("implicit_accuracy_t"):
            timestep = name.removeprefix("implicit_accuracy_t")
            table.add_row(timestep, f"{scores[name]:.3f}", f"{scores[f'margin_t{timestep}']:+.3g}")
    low, high = scores["implicit_accuracy_low"], scores["implicit_accuracy_high"]
    accuracy = f"{scores['implicit_accuracy']:.3f} [{low:.3f}, {high:.3f}]"
    table.add_row("averaged", accuracy, f"{scores['margin']:+.3g}")
    Console().print(table)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A training workdir or a diffusers folder.", required=True)
    flags.DEFINE_string("reference", None, "What it was trained from (default: what its workdir says).")
    flags.DEFINE_string(
        "data",
        None,
        "Pairs written by dspo_jax.encode, or several such folders, separated by commas.",
        required=True,
    )
    flags.DEFINE_string("split", "validation", "Which of its splits.")
    flags.DEFINE_integer(
        "draws", 8, "Draws of timestep and noise for each pair; the timesteps lie evenly.", lower_bound=1
    )
    flags.DEFINE_integer("batch_size", 32, "Pairs in one call of the networks.", lower_bound=1)
    flags.DEFINE_enum(
        "compute_dtype",
        None,
        ["float32", "bfloat16"],
        "Of the networks (default: bfloat16 on an accelerator).",
    )
    flags.DEFINE_string("out", None, "A .json file for the numbers.")
    distributed.define_flags()
    cli.run(main)
