"""The training loop."""

import math
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dspo_jax.data import loader
from dspo_jax.errors import UserError
from dspo_jax.interrupts import stop_requests
from dspo_jax.models.model import Params
from dspo_jax.monitoring.clock import Clock, Profiler
from dspo_jax.monitoring.curves import draw_curves
from dspo_jax.monitoring.devices import memory_peaks, peak_flops
from dspo_jax.monitoring.metrics import VALIDATION_PREFIX, MetricsWriter
from dspo_jax.monitoring.progress import Progress
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import batch_share, replicated, shard_batch
from dspo_jax.training.costs import mean_flops_per_pair
from dspo_jax.training.dry_run import describe
from dspo_jax.training.sample_grids import SampleGrids, first_captions
from dspo_jax.training.start import make_state, prepare
from dspo_jax.training.step import INPUTS, TrainState, compile_step
from dspo_jax.training.task import Metrics, Task, cast, policy_params, predict
from dspo_jax.training.validation import Validator
from dspo_jax.training.workdir import claim_workdir
from dspo_jax.weights.checkpoints import Checkpoints


class Unstable(UserError):
    """Too many updates in a row were skipped.

    Attributes:
      position: in the data, behind the examples of those updates.
    """

    def __init__(self, message: str, position: str):
        super().__init__(message)
        self.position = position


def train(config: ConfigDict, workdir: Path) -> int:
    """Runs or resumes a training run to `config.steps` or until it is asked to stop; returns the step."""
    with processes.claim(workdir):
        return _train(config, workdir)


def _train(config: ConfigDict, workdir: Path) -> int:
    task, mesh, adapters = prepare(config)
    claim_workdir(workdir, config)
    state, reference = make_state(task, mesh, adapters)
    if processes.is_first():
        for line in describe(config, task, mesh, state, reference):
            logging.info("%s", line)
    run = Run(config, workdir, task, mesh, state, reference)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state.arrays()
    )
    skip_to: str | None = None  # in the data
    rolled_back_to: int | None = None
    with (
        stop_requests() as stop_requested,  # until the last checkpoint is written, too
        Checkpoints(workdir / "checkpoints", config.checkpoint.max_to_keep) as checkpoints,
    ):
        while True:
            position, clock = None, Clock()
            if checkpoints.latest_step() is not None:
                del state  # or both would be in memory
                arrays, extra, _ = checkpoints.restore_newest(
                    abstract, config.checkpoint.fallback, processes.Vote(mesh).now
                )
                state = TrainState(**{"ema": None, **arrays}, task=task)
                position, clock = extra["data"], Clock(**extra["clock"])
            try:
                return run(state, checkpoints, skip_to or position, clock, stop_requested)
            except Unstable as error:
                latest = checkpoints.latest_step()
                if not config.stability.rollback or latest is None or latest == rolled_back_to:
                    raise
                logging.error("%s; going back to step %d, past the examples of those updates", error, latest)
                skip_to, rolled_back_to = error.position, latest


class Run:
    """The loop around the step, and what watches it."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        task: Task,
        mesh: Mesh,
        state: TrainState,
        reference: Params,
    ):
        """Prepares what does not change from a start of the loop to the next.

        Args:
          config: of the run.
          workdir: its folder.
          task: what it computes.
          mesh: the devices.
          state: at step 0; the pictures show it beside what it becomes.
          reference: the frozen parameters.
        """
        self._config, self._workdir, self._task, self._mesh = config, workdir, task, mesh
        self._reference = reference
        self._step = compile_step(state)
        self._compiled: set[tuple[int, ...]] = set()  # shapes of batches
        self._key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated(mesh))()
        self._flops_per_pair = None
        if processes.is_first():
            self._flops_per_pair = mean_flops_per_pair(config, task, mesh)
        self._peak_flops = peak_flops(mesh.devices.flat[0]) if task.compute_dtype == "bfloat16" else None
        self._validator = None
        if config.validation.every:
            self._validator = Validator(
                partial(predict, task),
                task.pipe.schedule,
                mesh,
                path=config.data.path,
                split=config.validation.split,
                batch_size=config.validation.batch_size,
                draws=config.validation.draws,
            )
        self._grids = None
        if config.samples.every:
            samples = config.samples
            split = config.validation.split if config.validation.every else config.data.split
            self._grids = SampleGrids(
                task.pipe,
                policy_params(task, state.params, reference),
                mesh,
                workdir,
                prompts=samples.prompts or first_captions(config.data.path, split),
                seeds=samples.seeds,
                num_inference_steps=samples.num_inference_steps,
                guidance_scale=samples.guidance_scale,
                compute_dtype=task.compute_dtype,
            )

    def __call__(
        self,
        state: TrainState,
        checkpoints: Checkpoints,
        position: str | None,
        clock: Clock,
        stop_requested: Callable[[], bool],
    ) -> int:
        """Trains on from `state`, which is donated; returns the step at which it ended.

        Args:
          state: where to start.
          checkpoints: of the run.
          position: in the data, from the loader's `get_state`; None is the beginning.
          clock: of the run so far.
          stop_requested: asked between steps.

        Raises:
          Unstable: more than `config.stability.max_skipped` updates in a row were skipped.
          OSError: a checkpoint was not saved.
        """
        config, start = self._config, int(state.step)
        if start >= config.steps:
            logging.info("%s: already at step %d of %d", self._workdir, start, config.steps)
            return start
        batches = self._open_data(position)
        first = processes.is_first()
        found = checkpoints.best()
        best = -math.inf if found is None else found[1]
        vote = processes.Vote(self._mesh)
        pending: tuple[int, Metrics] | None = None
        with (
            closing(batches),
            MetricsWriter(
                self._workdir,
                start,
                active=first,
                wandb_project=config.wandb_project,
                config=config.to_dict(),
            ) as writer,
            Progress("train", config.steps, start, active=first) as progress,
            Profiler(
                self._workdir / "profile", start + 1 + config.profile.start, config.profile.steps, clock
            ) as profiler,
        ):
            logged = start

            def log(step: int, metrics: Metrics) -> None:
                nonlocal logged
                values = {name: float(value) for name, value in metrics.items()}  # waits for the step
                clock.tick((step - logged) * config.batch_size)
                logged = step
                self._write_metrics(writer, progress, clock, step, values)
                self._refuse_instability(step, values, checkpoints, batches.get_state())

            if start == 0:
                self._watch(0, state, writer, clock)
            for step in range(start + 1, config.steps + 1):
                with clock.waiting():
                    batch = next(batches)
                profiler.before(step, state)
                state, metrics = self._update(state, batch, clock)
                # The metrics of a step are read only after the next one was dispatched: the device never
                # waits.
                if pending is not None:
                    log(*pending)
                    pending = None
                stopping = vote(stop_requested())
                last = stopping or step == config.steps
                if step % config.log_every == 0 or last:
                    pending = (step, metrics)
                saving = last or step % config.checkpoint.every == 0
                watching = self._is_watched(step)
                if saving or watching:
                    # What still runs is training time. And a run that is killed just after a checkpoint would
                    # never write the metrics that are still pending.
                    jax.block_until_ready(state)
                    if pending is not None:
                        log(*pending)
                        pending = None
                score = self._watch(step, state, writer, clock) if watching else None
                if score is not None and score > best:
                    best, saving = score, True
                if saving:
                    extra = {"data": batches.get_state(), "clock": clock.state()}
                    with clock.paused():
                        checkpoints.save(step, state.arrays(), extra, score)
                if stopping:
                    checkpoints.wait()
                    logging.info("asked to stop: saved step %d; the same command resumes it", step)
                    break
        return step

    def _open_data(self, position: str | None) -> loader.BatchIterator:
        config = self._config
        share, shares = batch_share(self._mesh)
        batches = loader.train_batches(
            config.data.path,
            batch_size=config.batch_size,
            seed=config.seed,
            weights=config.data.weights,
            split=config.data.split,
            process_index=share,
            process_count=shares,
        )
        if position is not None:
            batches.set_state(position)
        return batches

    def _update(self, state: TrainState, batch: loader.Batch, clock: Clock) -> tuple[TrainState, Metrics]:
        """Dispatches a step. Compiling it for images of another size is not training time."""
        inputs = {name: batch[name] for name in INPUTS}
        inputs["index"] = inputs["index"].astype(np.uint32)
        placed = shard_batch(inputs, self._mesh)
        shape = placed["moments"].shape
        if shape in self._compiled:
            return self._step(state, self._reference, placed, self._key)
        self._compiled.add(shape)
        jax.block_until_ready(state)  # what still runs is
        with clock.paused():
            return self._step(state, self._reference, placed, self._key)

    def _is_watched(self, step: int) -> bool:
        """Whether held-out pairs are judged or pictures drawn after a step."""
        return self._is_due(self._config.validation.every, step) or self._is_due(
            self._config.samples.every, step
        )

    def _is_due(self, every: int, step: int) -> bool:
        return every > 0 and (step == self._config.steps or step % every == 0)

    def _watch(self, step: int, state: TrainState, writer: MetricsWriter, clock: Clock) -> float | None:
        """Validates and draws what is due; returns the score of the held-out pairs if they were judged."""
        config, task, score = self._config, self._task, None
        with clock.paused():
            policy = policy_params(task, state.result, self._reference)
            if self._validator is not None and self._is_due(config.validation.every, step):
                reference = cast(task, self._reference) if task.objective.needs_reference else None
                scores = self._validator(policy, reference)
                writer.write(step, {VALIDATION_PREFIX + name: value for name, value in scores.items()})
                score = scores.get("implicit_accuracy", -scores["winner_error"])
                if processes.is_first():
                    draw_curves(self._workdir / "metrics.jsonl", self._workdir / "curves.png")
            if self._grids is not None and step > 0 and self._is_due(config.samples.every, step):
                self._grids.write(step, policy)
        return score

    def _write_metrics(
        self, writer: MetricsWriter, progress: Progress, clock: Clock, step: int, values: dict[str, float]
    ) -> None:
        """One line of metrics, and the progress bar."""
        pairs_per_second = clock.lap()
        values |= {
            "pairs_per_second": pairs_per_second,
            "examples_seen": step * self._config.batch_size,
            "data_wait": clock.data_wait,
            **memory_peaks(),
        }
        if self._flops_per_pair is not None:
            flops = self._flops_per_pair * pairs_per_second / self._mesh.size
            values["tflops_per_device"] = flops / 1e12
            if self._peak_flops is not None:
                values["mfu"] = flops / self._peak_flops
        writer.write(step, values)
        shown = {"pairs/s": pairs_per_second}
        shown |= {name: values[name] for name in ("mfu", "loss", "implicit_accuracy") if name in values}
        progress.update(step, shown)

    def _refuse_instability(
        self, step: int, values: dict[str, float], checkpoints: Checkpoints, position: str
    ) -> None:
        allowed = self._config.stability.max_skipped
        if values["skipped_in_a_row"] <= allowed:
            return
        newest = checkpoints.latest_step()
        raise Unstable(
            f"step {step}: {values['skipped_in_a_row']:.0f} updates in a row were skipped "
            f"(config.stability.max_skipped = {allowed}): their losses or gradients were not finite, or the "
            "loss a spike; the last good checkpoint is "
            + ("none" if newest is None else f"{self._workdir / 'checkpoints' / str(newest)}")
            + "; lower config.optimizer.learning_rate, or go on from there past these examples with "
            "--config.stability.rollback=true",
            position,
        )
