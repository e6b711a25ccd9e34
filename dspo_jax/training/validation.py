"""Validation on held-out pairs or labelled images: implicit accuracy, margins and errors by timestep.

The implicit reward of an image is the decrease of its denoising error against the reference, averaged over
draws of timestep and noise (Diffusion-DPO, S4.1, where it serves as a reward model in Table S2).
Every call uses the same noise and the same timesteps, so that curves over a run compare like with like.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dspo_jax.data import loader, shards
from dspo_jax.data.datasets import Dataset, count_examples, read_datasets
from dspo_jax.data.records import HostBatch
from dspo_jax.errors import UserError
from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models.model import Params
from dspo_jax.monitoring.metrics import read_validations
from dspo_jax.monitoring.progress import Progress
from dspo_jax.objectives import Predictions
from dspo_jax.objectives.implicit_reward import error_drift, squared_error
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import batch_share, make_mesh, replicated, shard_batch
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.schedules.process import Process
from dspo_jax.training.validation_scalars import summarise, summarise_labelled
from dspo_jax.training.watch_settings import ValidationSettings
from dspo_jax.weights.saved_params import read_run_config, split_run

# (parameters, noisy latents [B, P, h, w, C], levels [B, P], what the denoiser is conditioned on by name)
# -> the denoiser's output [B, P, h, w, C].
Predict = Callable[[Params, jax.Array, jax.Array, Mapping[str, jax.Array]], jax.Array]


_SEED = 20_241  # seed of the noise: changing it moves every validation curve


# On either side of an accuracy. Two accuracies of N pairs differ by 1 / (2 N) at least: enough up to 250,000.
_TIE_BREAK = 1e-6


def score(scores: Mapping[str, float]) -> float:
    """Returns what models are compared by: implicit accuracy; without a reference, minus the winners' error.

    Where images are scored by rewards it is their `score`. Among equal accuracies, which few held-out pairs
    often give, the higher margin is better.

    Args:
      scores: of a validation.
    """
    if "score" in scores:
        return scores["score"]
    accuracy, margin = scores.get("implicit_accuracy"), scores.get("margin", 0.0)
    if accuracy is None:
        return -scores["winner_error"]
    return accuracy + (_TIE_BREAK * margin / (1 + abs(margin)) if math.isfinite(margin) else 0.0)


def read_scores(workdir: Path, until: int) -> dict[int, float]:
    """Returns step -> score of the validations of a run up to a step, {} where it has not begun."""
    path = workdir / "metrics.jsonl"
    found = read_validations(path) if path.is_file() else {}
    return {step: score(scores) for step, scores in found.items() if step <= until}


def exhausted(scores: Mapping[int, float], patience: int) -> bool:
    """Tells whether none of the last `patience` validations was better than the best before them.

    Args:
      scores: by step.
      patience: 0 never ends a run.
    """
    if patience < 1 or len(scores) <= patience:
        return False
    values = [-math.inf if math.isnan(scores[step]) else scores[step] for step in sorted(scores)]
    return max(values[-patience:]) <= max(values[:-patience])


class Validator:
    """Judges a model on one split; compiled once (for each image size, where there are buckets)."""

    def __init__(
        self,
        predict: Predict,
        schedule: Process,
        mesh: Mesh,
        datasets: Sequence[Dataset],
        settings: ValidationSettings,
        *,
        inputs: Sequence[str],
    ):
        """Opens the split.

        Args:
          predict: runs the text encoders and the denoiser.
          schedule: the forward process.
          mesh: the devices, which must split a batch evenly.
          datasets: from `read_datasets`.
          settings: `split`, the held-out one; `batch_size`, examples in one call; `draws`, (level, noise)
            draws for each example, with the midpoints of so many equal bins as noise levels.
          inputs: arrays of a batch that `predict` takes (`Pipeline.conditioning_inputs`).

        Raises:
          UserError: a split that is missing or empty.
        """
        self.num_examples = sum(count_examples(datasets, settings.split).values())
        self._datasets, self._split, self._batch_size = datasets, settings.split, settings.batch_size
        self._mesh, self._inputs, draws = mesh, inputs, settings.draws
        self._levels = schedule.level_between(np.arange(draws) + 0.5, draws)
        self._timesteps = np.asarray(schedule.network_time(self._levels)).astype(np.int32)

        def add_noise(
            batch: dict[str, jax.Array], timestep: jax.Array, level: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            mean, _ = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)

            def draw(index: jax.Array) -> jax.Array:
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(_SEED), index), timestep)
                return jax.random.normal(key, (1, *mean.shape[2:]))

            noise = jnp.broadcast_to(jax.vmap(draw)(batch["index"]), mean.shape)
            levels = jnp.full(mean.shape[:2], level)
            return (
                schedule.add_noise(mean, noise, levels),
                schedule.target(mean, noise, levels),
                levels,
            )

        def score(
            policy: jax.Array, frozen: jax.Array | None, target: jax.Array, levels: jax.Array
        ) -> dict[str, jax.Array]:
            predictions = jax.tree.map(
                lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x,
                Predictions(policy, frozen, target, levels),
            )
            judged = {"error": squared_error(predictions, "mean")}
            if frozen is not None:
                judged["drift"] = error_drift(predictions, "mean")
            return judged

        # The networks are a program of their own, run for the policy and again for the reference: compiled
        # together with the scores, the two are fused differently, and equal weights differ in the last bit.
        self._add_noise, self._predict = jax.jit(add_noise), jax.jit(on_mesh(predict, mesh))
        # Every process reads the scores, so they must be on every device.
        self._score = jax.jit(score, out_shardings=replicated(mesh))

    def __call__(
        self, policy: Params, reference: Params | None, report: Callable[[int], None] = lambda judged: None
    ) -> dict[str, float]:
        """Returns scalars of the whole split.

        Both are what `predict` takes, in the same dtype; `reference` is None for a run without one. `report`
        is told how many examples have been judged.

        `winner_error` and, with a reference, `winner_drift` (error of the policy minus the reference's); for
        pairs `loser_error`, `loser_drift`, `margin` (reward of the winner minus the loser's, no scale), and
        `implicit_accuracy`: the share of pairs whose margin, averaged over the draws, is positive (ties one
        half), with the ends of its 95 % interval (Wilson; it takes the pairs as independent); `num_pairs`.

        Of lists the winner is the image of the highest score and the loser that of the lowest, the accuracy
        the share of a list's pairs of images that the rewards rank as the scores do, averaged over the lists,
        which its interval takes as independent; and `num_lists`.

        Where single images are labelled, `winner_` is of the liked and `loser_` of the disliked ones, by the
        weight of their labels; `margin` is the difference of their mean rewards, and `implicit_accuracy` the
        share of pairs of a liked and a disliked image, of whatever prompts, of which the liked one has the
        higher reward (ties one half), without an interval; and `num_images`.

        With `_t500` and the like at the end, those of one timestep bin: the drifts, margin and accuracy, or
        the errors where there is no reference.
        """
        results, liked, scores = [], [], []
        judged = 0
        for examples in self._batches():
            draws = [self._judge_examples(policy, reference, examples, i) for i in range(len(self._levels))]
            results.append(np.stack(draws, axis=1))
            liked.append(examples["preference"])
            if "scores" in examples:
                scores.append(examples["scores"])
            judged += len(examples["index"])
            report(judged)
        values_SDBP = np.concatenate(results, axis=2)  # (error, drift) x draw x example x image
        liked_B = np.concatenate(liked)
        labelled = values_SDBP.shape[3] == 1 and bool((liked_B < 0.5).any())
        if labelled:
            return summarise_labelled(values_SDBP[..., 0], self._timesteps, liked_B)
        if values_SDBP.shape[3] > 2:
            return summarise(values_SDBP, self._timesteps, np.concatenate(scores))
        return summarise(values_SDBP, self._timesteps)

    def _batches(self) -> Iterator[HostBatch]:
        batches = loader.eval_batches(self._datasets, batch_size=self._batch_size, split=self._split)
        yield from batches
        batches.close()

    def _judge_examples(
        self, policy: Params, reference: Params | None, examples: HostBatch, draw: int
    ) -> np.ndarray:
        """Judges a batch at the level of a draw, [2 or 1 (no reference), B, P].

        A short batch is filled with its first example.
        """
        count = len(examples["index"])
        take = np.where(np.arange(self._batch_size) < count, np.arange(self._batch_size), 0)
        share, shares = batch_share(self._mesh)
        take = np.split(take, shares)[share]
        batch = {name: examples[name][take] for name in ("moments", *self._inputs)}
        batch["index"] = examples["index"][take].astype(np.uint32)
        placed = shard_batch(batch, self._mesh)
        noisy, target, levels = self._add_noise(placed, self._timesteps[draw], self._levels[draw])
        conditioning = {name: placed[name] for name in self._inputs}
        outputs = [
            None if params is None else self._predict(params, noisy, levels, conditioning)
            for params in (policy, reference)
        ]
        judged = self._score(*outputs, target, levels)
        return np.stack([np.asarray(judged[name])[:count] for name in ("error", "drift") if name in judged])


def judge(
    model: str | Path,
    reference: str | Path | None,
    data: str | Path,
    *,
    split: str,
    draws: int,
    batch_size: int,
    compute_dtype: str,
    text: Mapping[str, int | None] | None = None,
) -> dict[str, float]:
    """Validates a model against its reference on all devices, with the scalars of `Validator`.

    Args:
      model: a training workdir or a diffusers folder, as `load_pipeline` takes it.
      reference: what it was compared with in training; None takes the one in the workdir's config.
      data: a dataset of pairs written by `dspo_jax.encode`, or several separated by commas.
      split, draws: see `Validator`.
      batch_size: pairs in one call, filled up to a multiple of the devices.
      compute_dtype: of the networks.
      text: how both models read captions, as `load_pipeline` takes it by keyword.

    Raises:
      UserError: no reference, a run that was trained with another `text`, data of another model or of single
        images without labels, or what `Validator` refuses.
      FileNotFoundError: a folder is missing.
    """
    if reference is None:
        run = split_run(model)
        if run is None:
            raise UserError(
                f"--model={model}: no training workdir; give --reference, what it was trained from"
            )
        config = read_run_config(run[0], "model")
        reference = config.get("reference", {}).get("model") or config["model"]
    policy = load_pipeline(model, **(text or {}))
    pipes = policy, load_pipeline(reference, **policy.text)
    datasets = [dataset.without_states() for dataset in read_datasets(data)]  # either model runs its own T5
    count_examples(datasets, split, "--split", "choose another with --split=NAME")
    for dataset in datasets:
        shards.check_manifest(dataset.manifest, pipes[1].fingerprint(), path=dataset.folder)
        if dataset.manifest["images_per_example"] == 1 and not dataset.disliked(split):
            raise UserError(
                f"--data={dataset.folder}: holds single images; implicit accuracy is of pairs, or of images "
                "with labels"
            )
    ours, theirs = (pipe.networks[pipe.denoiser] for pipe in pipes)
    if (ours.class_name, ours.settings) != (theirs.class_name, theirs.settings):
        raise UserError(f"--reference={reference}: its denoiser is another one than that of {model}")
    mesh = make_mesh({"data": -1})

    def place(pipe: Pipeline) -> Params:
        params = {name: pipe.read_params(name, compute_dtype) for name in pipe.components}
        return jax.device_put(params, replicated(mesh))

    def predict(
        params: Params, noisy: jax.Array, levels: jax.Array, batch: Mapping[str, jax.Array]
    ) -> jax.Array:
        return pipes[0].predict_pairs(params, noisy.astype(compute_dtype), levels, batch)

    validator = Validator(
        predict,
        pipes[0].schedule,
        mesh,
        datasets,
        ValidationSettings(
            split=split,
            every=1,
            draws=draws,
            patience=0,
            batch_size=math.ceil(batch_size / mesh.size) * mesh.size,
        ),
        inputs=pipes[0].conditioning_inputs,
    )
    with Progress(
        "validate", validator.num_examples, first="compiling", active=processes.is_first()
    ) as progress:
        return validator(place(pipes[0]), place(pipes[1]), progress.update)
