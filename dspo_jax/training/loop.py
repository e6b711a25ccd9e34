"""The training loop, and the protocols of its arguments: stream of batches, hooks."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from dspo_jax.models.model import Params
from dspo_jax.training.step import TrainState
from dspo_jax.training.task import Batch, Metrics

Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class Stream(Protocol):
    """A source of batches whose position can be saved."""

    def next(self, params: Params) -> Batch:
        """Returns the next batch, on the devices.

        Args:
          params: the trained parameters, for streams that sample from them; `policy_params` joins them with
            the reference. The next update donates them, so they must not be kept.
        """

    def get_state(self) -> str:
        """Returns the position behind the last batch; the same in every process."""

    def set_state(self, state: str) -> None:
        """Continues behind the batch after which `get_state` was called."""

    def close(self) -> None:
        """Releases what the stream holds."""


class AfterStep(NamedTuple):
    """The time after a step, before the next one; after step 0 no update is done yet.

    Attributes:
      step: updates done.
      last: whether this process makes no further step.
    """

    step: int
    last: bool


class Hook(Protocol):
    """An action after some of the steps: logging, validation, drawing, saving."""

    def due(self, at: AfterStep) -> bool:
        """Returns whether to call the hook after this step."""

    def __call__(self, at: AfterStep, state: TrainState, metrics: Metrics) -> None:
        """Looks at the state, and at the metrics of the step just made, which may still be computed."""


def fit(
    update: Update,
    state: TrainState,
    stream: Stream,
    *,
    steps: int,
    hooks: Sequence[Hook] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Trains from `state` until `steps` updates are done, or until it is asked to stop.

    The loop never waits for a device: an update is dispatched before the metrics of the one before are read,
    which is for a hook to do (`hooks.Log`).

    Args:
      update: one optimizer step; it may donate the state.
      state: where to start; before step 1 the hooks that are due at step 0 see it.
      stream: of batches.
      steps: updates of the whole run, those before `state` included.
      hooks: called after a step in this order; each sees what those before it did.
      stopping: asked once a step; True makes that step the last.

    Returns:
      The state after the last step.
    """
    start = AfterStep(int(state.step), last=False)
    for hook in hooks if start.step == 0 else ():
        if hook.due(start):
            hook(start, state, {})
    for step in range(start.step + 1, steps + 1):
        state, metrics = update(state, stream.next(state.params))
        at = AfterStep(step, last=stopping() or step == steps)
        for hook in hooks:
            if hook.due(at):
                hook(at, state, metrics)
        if at.last:
            break
    return state
