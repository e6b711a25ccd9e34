"""Hooks of the training loop: log, validate, draw, save, profile."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
from absl import logging

from dspo_jax.models.model import Params
from dspo_jax.monitoring.clock import Clock, Profiler
from dspo_jax.monitoring.devices import memory_peaks
from dspo_jax.monitoring.metrics import VALIDATION_PREFIX, MetricsWriter
from dspo_jax.monitoring.progress import Progress
from dspo_jax.parallel import processes
from dspo_jax.training.loop import AfterStep, Hook, Stream
from dspo_jax.training.sample_grids import SampleGrids
from dspo_jax.training.step import TrainState
from dspo_jax.training.task import Metrics, cast, of_components, policy_params
from dspo_jax.training.validation import score
from dspo_jax.weights.checkpoints import Checkpoints

# Beside the speed.
_ON_BAR = ("mfu", "loss", "implicit_accuracy", "reward")
# Of a validation, what tells whether the model learns what it should.
_SHOWN = ("implicit_accuracy", "margin", "winner_drift", "winner_error")
_SHOWN_REWARDS = r"(reward|win_rate)_(?!.*_(low|high)$)"


@dataclasses.dataclass
class Speed:
    """Measures examples per second, FLOP/s and memory between two lines of metrics.

    Attributes:
      clock: of the run.
      batch_size: examples of a step.
      step: the last step that was measured.
      unit: what an example is called: pairs or images.
      flops_per_example: FLOPs of an example on each device; None where they cannot be counted.
      peak_flops: FLOP/s that a device can do in the run's dtype; None where that is not known.
    """

    clock: Clock
    batch_size: int
    step: int
    unit: str = "pairs"
    flops_per_example: float | None = None
    peak_flops: float | None = None

    def measure(self, step: int) -> dict[str, float]:
        """Metrics of the time since the last call; call it when `step` has been computed.

        Speeds are left out where only the first step was made, which compiled.
        """
        self.clock.tick((step - self.step) * self.batch_size)
        self.step = step
        per_second = self.clock.lap()
        values = {"examples_seen": float(step * self.batch_size), **memory_peaks()}
        if not per_second:
            return values
        values |= {f"{self.unit}_per_second": per_second, "data_wait": self.clock.data_wait}
        if self.flops_per_example is not None:
            flops = self.flops_per_example * per_second
            values["tflops_per_device"] = flops / 1e12
            if self.peak_flops is not None:
                values["mfu"] = flops / self.peak_flops
        return values


class Log:
    """Writes the metrics of every few steps, and moves the progress bar.

    The metrics of a step are read only after the next one was dispatched, so that the device never waits for
    the host; but before another hook looks at the state, so that a checkpoint is never ahead of the metrics.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        progress: Progress,
        speed: Speed,
        *,
        every: int,
        before: Sequence[Hook] = (),
        check: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    ):
        """Takes where metrics go.

        Args:
          writer: gets a line of metrics.
          progress: shows some of them.
          speed: adds what is measured.
          every: steps between two lines.
          before: hooks that metrics are written before.
          check: looks at what was written, and may raise to end the run.
        """
        self._writer, self._progress, self._speed = writer, progress, speed
        self._every, self._before, self._check = every, before, check
        self._pending: tuple[int, Metrics] | None = None

    def due(self, at: AfterStep) -> bool:
        """Returns True at steps that are logged, one step later, and where the other hooks are due."""
        return self._pending is not None or self._is_logged(at) or self._precedes(at)

    def __call__(self, at: AfterStep, state: TrainState, metrics: Metrics) -> None:
        """Writes the metrics that are pending, and those of this step if it cannot be put off."""
        self._write_pending()
        if self._is_logged(at):
            self._pending = at.step, metrics
        if self._precedes(at):
            jax.block_until_ready(state)  # steps that still run are training time
            self._write_pending()

    def _is_logged(self, at: AfterStep) -> bool:
        return at.step > 0 and (at.last or at.step % self._every == 0)

    def _precedes(self, at: AfterStep) -> bool:
        return any(hook.due(at) for hook in self._before)

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in metrics.items()}  # waits for the step
        values |= self._speed.measure(step)
        self._writer.write(step, values)
        shown = {
            name.replace("_per_second", "/s"): values[name]
            for name in ("pairs_per_second", "images_per_second", *_ON_BAR)
            if name in values
        }
        self._progress.update(step, shown)
        self._check(step, values)


class Validate:
    """Judges the held-out pairs, writes the scalars and draws the curves.

    Attributes:
      scores: step -> score of every validation of the run.
    """

    def __init__(
        self,
        validator: Callable[[Params, Params | None], dict[str, float]],
        reference: Params,
        writer: MetricsWriter,
        clock: Clock,
        draw: Callable[[], None],
        *,
        every: int,
        steps: int,
        scores: Mapping[int, float],
    ):
        """Takes the validator and where its scalars go.

        Args:
          validator: scalars of the policy's parameters and the reference's, on held-out examples or prompts.
          reference: the frozen parameters.
          writer: gets the scalars.
          clock: leaves out the time that this takes.
          draw: draws the curves of all that was written so far.
          every: steps between two validations; the first and the last step of the run are validated, too.
          steps: of the whole run.
          scores: of validations before this process began.
        """
        self._validator, self._reference, self._writer = validator, reference, writer
        self._clock, self._draw, self._every, self._steps = clock, draw, every, steps
        self.scores = dict(scores)

    def due(self, at: AfterStep) -> bool:
        """Tells whether the step is the first or the last of the run, or one of every few."""
        return at.step == self._steps or at.step % self._every == 0

    def __call__(self, at: AfterStep, state: TrainState, metrics: Metrics) -> None:
        """Validates the state."""
        del metrics
        task = state.task
        with self._clock.paused():
            policy = policy_params(task, state.result, self._reference)
            frozen = of_components(task, self._reference)
            reference = cast(task, frozen) if task.loss.needs_reference else None
            scores = self._validator(policy, reference)
            self._writer.write(at.step, {VALIDATION_PREFIX + name: value for name, value in scores.items()})
            self.scores[at.step] = score(scores)
            if processes.is_first():
                rewards = [name for name in scores if re.match(_SHOWN_REWARDS, name)]
                names = [*(name for name in _SHOWN if name in scores), *rewards]
                shown = [f"{name.replace('_', ' ')} {scores[name]:.4g}" for name in names]
                logging.info("step %d, held-out %s", at.step, ", ".join(shown))
                self._draw()


@dataclasses.dataclass(frozen=True)
class Announced:
    """A hook whose work the progress bar names."""

    hook: Hook
    progress: Progress
    doing: str

    def due(self, at: AfterStep) -> bool:
        """Asks the hook."""
        return self.hook.due(at)

    def __call__(self, at: AfterStep, state: TrainState, metrics: Metrics) -> None:
        """Calls the hook."""
        with self.progress.busy(self.doing):
            self.hook(at, state, metrics)


class DrawSamples:
    """Draws a grid of images, those of the model at the start beside those of the current model."""

    def __init__(
        self,
        grids: SampleGrids,
        reference: Params,
        writer: MetricsWriter,
        clock: Clock,
        *,
        every: int,
        steps: int,
    ):
        """Takes the grids, and when to draw them.

        Args:
          grids: of the run.
          reference: the frozen parameters.
          writer: shows each grid.
          clock: leaves out the time that this takes.
          every: steps between two grids; there is one of the last step, too.
          steps: of the whole run.
        """
        self._grids, self._reference, self._writer, self._clock = grids, reference, writer, clock
        self._every, self._steps = every, steps

    def due(self, at: AfterStep) -> bool:
        """Tells whether the step is the last of the run, or one of every few."""
        return at.step > 0 and (at.step == self._steps or at.step % self._every == 0)

    def __call__(self, at: AfterStep, state: TrainState, metrics: Metrics) -> None:
        """Writes workdir/samples/step_000500.png or the like."""
        del metrics
        with self._clock.paused():
            picture = self._grids.write(at.step, policy_params(state.task, state.result, self._reference))
            if picture is not None:
                self._writer.write_image(at.step, "samples", picture)


class Save:
    """Saves a checkpoint: every few steps, at the last, and when the held-out pairs find the model better."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        stream: Stream,
        clock: Clock,
        *,
        every: int,
        validate: Validate | None,
        more: Callable[[], Mapping[str, object]] = dict,
    ):
        """Takes where to save, the rest of the state of a run, and the hook whose scores count.

        Args:
          checkpoints: of the run.
          stream: whose position is saved.
          clock: whose time is saved; leaves out the time that saving takes.
          every: steps between two checkpoints.
          validate: the hook before this one that scores the model; None where nothing does.
          more: arrays to save beside those of the state, by name.
        """
        self._more = more
        self._checkpoints, self._stream, self._clock = checkpoints, stream, clock
        self._every, self._validate = every, validate
        found = checkpoints.best()
        self._best = -math.inf if found is None else found[1]
        self._owed = False

    def due(self, at: AfterStep) -> bool:
        """Tells whether the step is the last, one of every few, or has the best score so far."""
        # Inside a round of the model's own images there is no position to go on from.
        periodic = (at.step % self._every == 0 or self._owed) and getattr(self._stream, "at_round_end", True)
        return at.step > 0 and (at.last or periodic or self._is_better(at.step))

    def __call__(self, at: AfterStep, state: TrainState, metrics: Metrics) -> None:
        """Saves the state with the stream's position and the clock.

        Where updates are being skipped it waits until one is made again, as a rollback goes to the newest.
        """
        del metrics
        self._owed = not (at.last or self._is_better(at.step)) and int(state.health.skipped_in_a_row) > 0
        if self._owed:
            return
        found = self._score(at.step)
        self._best = max(self._best, -math.inf if found is None else found)
        extra = {"data": self._stream.get_state(), "clock": self._clock.state()}
        with self._clock.paused():
            self._checkpoints.save(at.step, {**state.arrays(), **self._more()}, extra, found)

    def _is_better(self, step: int) -> bool:
        found = self._score(step)
        return found is not None and found > self._best

    def _score(self, step: int) -> float | None:
        return self._validate.scores.get(step) if self._validate else None


class Profile:
    """Opens and closes the profiler's window between two steps."""

    def __init__(self, profiler: Profiler):
        """Takes the profiler, which must be open while the loop runs."""
        self._profiler = profiler

    def due(self, at: AfterStep) -> bool:
        """Returns whether a step follows."""
        return not at.last

    def __call__(self, at: AfterStep, state: TrainState, metrics: Metrics) -> None:
        """Tells the profiler which step comes next."""
        del metrics
        self._profiler.before(at.step + 1, state)
