"""A training run from its config: everything is prepared, and the loop goes on from the last checkpoint."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from absl import logging
from ml_collections import ConfigDict

from dspo_jax.hub_cache import hide_folders
from dspo_jax.interrupts import stop_requests
from dspo_jax.kernels.layouts import format_of
from dspo_jax.models.model import Params
from dspo_jax.monitoring.clock import Clock, Profiler
from dspo_jax.monitoring.curves import draw_curves
from dspo_jax.monitoring.devices import peak_flops
from dspo_jax.monitoring.metrics import MetricsWriter
from dspo_jax.monitoring.progress import Progress
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import replicated
from dspo_jax.training import hooks
from dspo_jax.training.costs import mean_flops_per_example
from dspo_jax.training.describe import describe_run
from dspo_jax.training.loop import Hook, Stream, fit
from dspo_jax.training.losses.reward_gradient import REWARD
from dspo_jax.training.moving_reference import MoveReference
from dspo_jax.training.prompt_states import with_prompt_states
from dspo_jax.training.reference_errors import store_errors
from dspo_jax.training.reward_validation import RewardValidator
from dspo_jax.training.sample_grids import SampleGrids, first_captions
from dspo_jax.training.settings import Settings
from dspo_jax.training.start import Experiment, make_state, prepare
from dspo_jax.training.step import TrainState, compile_step
from dspo_jax.training.streams import TimedStream, open_stream
from dspo_jax.training.task import policy_params, predict
from dspo_jax.training.updates import Step, Unstable, Updater, refuse_instability
from dspo_jax.training.validation import Validator, exhausted, read_scores
from dspo_jax.training.workdir import claim_workdir
from dspo_jax.weights.checkpoints import Checkpoints


class Outcome(NamedTuple):
    """Outcome of a call of `train`.

    Attributes:
      step: updates done in the whole run.
      finished: whether the run is at its end; False where it was asked to stop, and can go on.
      stop_requested: whether it was asked to stop, even if only in its last step. Who does more than train
        stops then.
      best: step of the checkpoint that the held-out pairs find best; None where none was judged.
    """

    step: int
    finished: bool
    stop_requested: bool
    best: int | None


class Run:
    """A run with its state on the devices: what stays when its loop starts again after a rollback."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        state: TrainState,
        reference: Params,
        make_step: Callable[[TrainState], Step] = compile_step,
        count_flops: Callable[..., float | None] = mean_flops_per_example,
    ):
        """Compiles nothing yet, but draws the images of the model at the start, if samples are drawn.

        Args:
          experiment: from `prepare`.
          workdir: folder of the run.
          state: at step 0.
          reference: the frozen parameters.
          make_step: gives the step for states like `state`.
          count_flops: FLOPs of an example, for metrics.
        """
        self._experiment, self._workdir, self._reference = experiment, workdir, reference
        settings, task, mesh = experiment.settings, experiment.task, experiment.mesh
        self._key = jax.jit(lambda: jax.random.key(settings.seed), out_shardings=replicated(mesh))()
        self._step = make_step(state)
        self.moving = None
        if settings.reference.every:
            moves = settings.reference
            self.moving = MoveReference(reference, state.params, every=moves.every, decay=moves.decay)
        self._flops_per_example = None
        if processes.is_first():
            flops = count_flops(task, experiment.datasets, settings.data, experiment.images_per_example)
            self._flops_per_example = None if flops is None else flops / mesh.size
        self._validator: Validator | RewardValidator | None = None
        self._grids = None
        own = experiment.own_images
        watches = settings.validation.every or settings.samples.every
        if own is not None and own.trained is not None and watches:  # its weights are among the reference's
            own = own.with_weights(reference[REWARD])
        if settings.validation.every and own is not None:
            self._validator = RewardValidator(task, own, settings, mesh, state.params, reference)
        elif settings.validation.every:
            self._validator = Validator(
                partial(predict, task),
                task.pipe.schedule,
                mesh,
                experiment.datasets,
                settings.validation,
                inputs=task.pipe.conditioning_inputs,
            )
        if settings.samples.every:
            self._grids = SampleGrids(
                task.pipe,
                policy_params(task, state.params, reference),
                mesh,
                workdir,
                settings.samples,
                prompts=_prompts(experiment),
                compute_dtype=settings.compute_dtype,
                rewards=own.watched if own is not None else (),
            )

    def more_arrays(self) -> dict[str, Params]:
        """Returns what a checkpoint has beside the state: the part of the reference that moves."""
        return {} if self.moving is None else {"reference": self.moving.arrays()}

    def fit(
        self,
        state: TrainState,
        stream: TimedStream,
        clock: Clock,
        checkpoints: Checkpoints,
        stop_requested: Callable[[], bool],
    ) -> int:
        """Trains on from `state`, which is donated; returns the step at which it ended.

        Args:
          state: where to start.
          stream: at the position that belongs to it.
          clock: of the run so far.
          checkpoints: of the run.
          stop_requested: asked between steps.

        Raises:
          Unstable: more than `config.stability.max_skipped` updates in a row were skipped.
          OSError: a checkpoint was not saved.
        """
        settings, mesh, start = self._experiment.settings, self._experiment.mesh, int(state.step)
        first, vote = processes.is_first(), processes.Vote(mesh)
        with (
            MetricsWriter(
                self._workdir,
                start,
                active=first,
                wandb_project=settings.wandb_project,
                config=hide_folders(settings.given),
            ) as writer,
            Progress("train", settings.steps, start, active=first) as progress,
            Profiler(
                self._workdir / "profile", start + 1 + settings.profile.start, settings.profile.steps, clock
            ) as profiler,
        ):
            if start:  # else the hooks are called before the first step
                profiler.before(start + 1, state)
            validate = self._make_validate(start, clock, writer)
            watching = self._make_hooks(validate, start, stream, clock, checkpoints, writer, progress)

            patience, asked = settings.validation.patience, False

            def stopping() -> bool:
                nonlocal asked
                worn_out = validate is not None and exhausted(validate.scores, patience)
                # The answer of several processes comes a step late, and inside a round it waits for the end.
                before, asked = asked, asked | vote(stop_requested() or worn_out)
                if asked > before and not stream.at_round_end and processes.is_first():
                    logging.info("the run stops behind this round of images")
                return asked and stream.at_round_end

            # The vote of the step before, which an unbroken run would have cast.
            vote(exhausted(read_scores(self._workdir, start - 1), patience))

            stream.progress = progress
            state = fit(
                Updater(self._step, self._reference, self._key, clock, progress, stream.metrics),
                state,
                stream,
                steps=settings.steps,
                hooks=[*watching, hooks.Profile(profiler)],
                stopping=stopping,
            )
        return int(state.step)

    def _make_validate(self, start: int, clock: Clock, writer: MetricsWriter) -> hooks.Validate | None:
        settings, workdir = self._experiment.settings, self._workdir
        if self._validator is None:
            return None
        group = settings.given[settings.method_key]
        chosen = {name: value for name, value in group.items() if value is not None}
        objective = [chosen.pop("name"), *(f"{name} {value}" for name, value in chosen.items())]
        recipe = [settings.recipe] if settings.recipe else []
        title = f"{workdir.name}: {', '.join([*recipe, *objective])}"
        return hooks.Validate(
            self._validator,
            self._reference,
            writer,
            clock,
            partial(draw_curves, workdir / "metrics.jsonl", workdir / "curves.png", title),
            every=settings.validation.every,
            steps=settings.steps,
            scores=read_scores(workdir, start),
        )

    def _make_hooks(
        self,
        validate: hooks.Validate | None,
        start: int,
        stream: Stream,
        clock: Clock,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        progress: Progress,
    ) -> list[Hook]:
        settings, mesh = self._experiment.settings, self._experiment.mesh
        watching: list[Hook] = []
        if validate is not None:
            watching.append(hooks.Announced(validate, progress, "validating"))
        if self._grids is not None:
            draw = hooks.DrawSamples(
                self._grids,
                self._reference,
                writer,
                clock,
                every=settings.samples.every,
                steps=settings.steps,
            )
            watching.append(hooks.Announced(draw, progress, "drawing samples"))
        if self.moving is not None:
            watching.append(self.moving)
        save = hooks.Save(
            checkpoints,
            stream,
            clock,
            every=settings.checkpoint.every,
            validate=validate if settings.validations_compare else None,
            more=self.more_arrays,
        )
        watching.append(hooks.Announced(save, progress, "saving"))
        peak = peak_flops(mesh.devices.flat[0].device_kind) if settings.compute_dtype == "bfloat16" else None
        speed = hooks.Speed(
            clock, settings.batch_size, start, settings.stream.unit, self._flops_per_example, peak
        )
        log = hooks.Log(
            writer,
            progress,
            speed,
            every=settings.log_every,
            before=watching,
            check=partial(refuse_instability, settings, checkpoints),
        )
        return [log, *watching]


def _prompts(experiment: Experiment) -> Sequence[str]:
    """Returns what is drawn as samples, also where `config.samples` names no prompts."""
    if experiment.prompts:
        return experiment.prompts
    own, settings = experiment.own_images, experiment.settings
    if own is not None:
        return (own.held_out or own.prompts)[:4]
    split = settings.validation.split if settings.validation.every else settings.data.split
    return first_captions(experiment.datasets, split)


def train(
    config: ConfigDict | Settings,
    workdir: Path,
    *,
    make_step: Callable[[TrainState], Step] = compile_step,
    make_stream: Callable[[Experiment, Params], Stream] = open_stream,
    count_flops: Callable[..., float | None] = mean_flops_per_example,
) -> Outcome:
    """Runs or resumes a training run to its end, or until it is asked to stop.

    Args:
      config: the keys of configs/common.py, or what `settings.parse` made of them.
      workdir: folder of the run; a run that is there is resumed.
      make_step, count_flops: see `Run`.
      make_stream: opens the batches at their beginning, see `open_stream`.
    """
    with processes.claim(workdir):
        experiment = prepare(config)
        claim_workdir(workdir, experiment.settings.given, experiment.pins())
        return _train(experiment, workdir, make_step, make_stream, count_flops)


def _train(
    experiment: Experiment,
    workdir: Path,
    make_step: Callable[[TrainState], Step],
    make_stream: Callable[[Experiment, Params], Stream],
    count_flops: Callable[..., float | None],
) -> Outcome:
    """Runs the loop from the last checkpoint, and again from the last one whenever the run rolls back."""
    if experiment.settings.samples.every and experiment.task.pipe.stored_states is not None:
        experiment = dataclasses.replace(experiment, prompts=_prompts(experiment))
        experiment = with_prompt_states(experiment)
    settings, task, mesh = experiment.settings, experiment.task, experiment.mesh
    state, reference = make_state(task, mesh, experiment.adapters)
    if processes.is_first():
        for line in describe_run(experiment, state, reference):
            if line.startswith("warning: "):
                logging.warning("%s", line.removeprefix("warning: "))
            else:
                logging.info("%s", line)
        logging.info("to watch it: %s, or tensorboard --logdir %s", workdir / "curves.png", workdir)
    if settings.reference.draws:
        errors = store_errors(task, settings, experiment.datasets, mesh, reference, workdir)
        experiment = dataclasses.replace(experiment, reference_errors=errors)
    run = Run(experiment, workdir, state, reference, make_step, count_flops)
    saved = {**state.arrays(), **run.more_arrays()}
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), saved
    )
    formats = jax.tree.map(format_of, saved)  # checkpoints are read in the order of any device
    del saved

    def worn_out(step: int) -> bool:
        # A run ends with the step that follows its last validation; with several processes the one after, as
        # their vote is known a step later. One that was killed before goes on to there.
        until = step - min(jax.process_count(), 2)
        # Of what the first process wrote, others on a network's disk may not see everything yet.
        patience = settings.validation.patience
        found = processes.Vote(mesh).now(exhausted(read_scores(workdir, until), patience))
        if found:
            logging.info("ended at step %d: config.validation.patience = %d is exhausted", step, patience)
        return found

    def outcome(step: int, *, finished: bool) -> Outcome:
        best = checkpoints.best()
        return Outcome(step, finished, stop_requested(), None if best is None else best[0])

    skip_to: str | None = None  # position in the data after a rollback
    rolled_back_to: int | None = None
    with (
        stop_requests() as stop_requested,  # also while the last checkpoint is written
        Checkpoints(workdir / "checkpoints", settings.checkpoint.max_to_keep) as checkpoints,
    ):
        while True:
            position, clock = skip_to, Clock()
            if checkpoints.latest_step() is not None:
                del state  # else two states would be in memory
                arrays, extra, _ = checkpoints.restore_newest(
                    abstract, settings.checkpoint.fallback, processes.Vote(mesh).now
                )
                arrays = jax.device_put(arrays, formats, donate=True)
                if run.moving is not None:
                    run.moving.set_arrays(arrays.pop("reference"))
                state = TrainState(**{"ema": None, "margin_size": None, **arrays}, task=task)
                position, clock = skip_to or extra["data"], Clock(**extra["clock"])
            if (step := int(state.step)) >= settings.steps:
                logging.info("%s: already at step %d of %d", workdir, step, settings.steps)
                return outcome(step, finished=True)
            if worn_out(step):
                return outcome(step, finished=True)
            with closing(TimedStream(make_stream(experiment, reference), clock)) as stream:
                if position is not None:
                    stream.set_state(position)
                try:
                    step = run.fit(state, stream, clock, checkpoints, stop_requested)
                except Unstable as error:
                    latest = checkpoints.latest_step()
                    if not settings.stability.rollback or latest is None or latest == rolled_back_to:
                        raise
                    logging.error(
                        "%s; going back to step %d, past the examples of those updates", error, latest
                    )
                    skip_to, rolled_back_to = stream.get_state_past(), latest
                    continue
            if step == settings.steps or worn_out(step):
                return outcome(step, finished=True)
            checkpoints.wait()
            logging.info("asked to stop: saved step %d; the same command resumes it", step)
            return outcome(step, finished=False)
