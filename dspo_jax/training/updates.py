"""Updates of a run: the compiled step, timed, and the end of a run in which too many are skipped."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from dspo_jax.errors import UserError
from dspo_jax.models.model import Params
from dspo_jax.monitoring.clock import Clock
from dspo_jax.monitoring.progress import Progress
from dspo_jax.training.settings import Settings
from dspo_jax.training.step import TrainState
from dspo_jax.training.task import Batch, Metrics
from dspo_jax.weights.checkpoints import Checkpoints

Step = Callable[[TrainState, Params, Batch, jax.Array], tuple[TrainState, Metrics]]

_ROLLBACK = "go on from there past these examples with --config.stability.rollback=true"


class Updater:
    """Compiled training steps of a run; the time that compiling takes is not training time."""

    def __init__(
        self,
        step: Step,
        reference: Params,
        key: jax.Array,
        clock: Clock,
        progress: Progress,
        of_batch: Callable[[], Mapping[str, Any]],
    ):
        """Takes what the run uses.

        Args:
          step: from `compile_step`.
          reference, key, clock, progress: of the run.
          of_batch: gives metrics of the batch itself.
        """
        self._of_batch = of_batch
        self._step, self._reference, self._key, self._clock = step, reference, key, clock
        self._progress = progress
        self._compiled: set[tuple[tuple[int, ...], ...]] = set()  # shapes of batches

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Dispatches a step, which donates the state."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes in self._compiled:
            return self._run(state, batch)
        self._compiled.add(shapes)
        jax.block_until_ready(state)  # steps that still run are training time
        with self._progress.busy("compiling the step", once=True), self._clock.paused():
            return self._run(state, batch)

    def _run(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = self._step(state, self._reference, batch, self._key)
        return state, {**metrics, **self._of_batch()}


class Unstable(UserError):
    """Too many updates in a row were skipped."""


def refuse_instability(
    settings: Settings, checkpoints: Checkpoints, step: int, values: Mapping[str, float]
) -> None:
    """Ends a run in which too many updates in a row were skipped.

    Raises:
      Unstable: more than `config.stability.max_skipped`; names the last good checkpoint.
    """
    allowed = settings.stability.max_skipped
    if values["skipped_in_a_row"] > allowed:
        newest = checkpoints.latest_step()  # waits for the one that is being written
        raise Unstable(
            f"step {step}: {values['skipped_in_a_row']:.0f} updates in a row were skipped "
            f"(config.stability.max_skipped = {allowed}): their losses or gradients were not finite, or the "
            "loss a spike; the last good checkpoint is "
            + ("none" if newest is None else f"{checkpoints.directory / str(newest)}")
            + "; lower config.optimizer.learning_rate"
            + ("" if settings.stability.rollback else f", or {_ROLLBACK}")
        )
