"""The stream of a run by its config, and the same with the time that the host waits for it."""

from contextlib import nullcontext

from dspo_jax.models.model import Params
from dspo_jax.monitoring.clock import Clock
from dspo_jax.monitoring.progress import Progress
from dspo_jax.training.loop import Stream
from dspo_jax.training.pair_stream import PairStream
from dspo_jax.training.prompt_stream import PromptStream
from dspo_jax.training.round_stream import RoundStream
from dspo_jax.training.self_play_stream import SelfPlayStream
from dspo_jax.training.shard_stream import ShardStream
from dspo_jax.training.start import Experiment
from dspo_jax.training.task import Batch
from dspo_jax.training.trajectory_stream import TrajectoryStream


def open_stream(experiment: Experiment, reference: Params) -> Stream:
    """Opens the batches of `config.data` or `config.stream` at their beginning.

    Args:
      experiment: from `prepare`.
      reference: the frozen parameters, on the mesh.
    """
    settings, task, mesh = experiment.settings, experiment.task, experiment.mesh
    own = experiment.own_images
    if own is None and settings.stream.kind == "self_play":
        return SelfPlayStream(experiment.datasets, settings, task, reference, mesh)
    if own is None:
        scores = ("scores",) if experiment.images_per_example > 2 else ()
        inputs = (*task.loss.inputs(task.pipe), *scores)
        return ShardStream(experiment.datasets, settings, mesh, inputs, experiment.reference_errors)
    if own.trained is not None:
        return PromptStream(
            own.prompts,
            task.pipe.tokenize,
            own.trained.tokenize,
            mesh,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
    kinds = {"trajectories": TrajectoryStream, "own_pairs": PairStream}
    make = kinds[settings.stream.kind]
    return make(settings, task, reference, own.prompts, own.score, mesh)


class TimedStream:
    """Stream whose batches the clock of a run sees the host wait for."""

    def __init__(self, stream: Stream, clock: Clock):
        """Takes the stream, of any kind, and the clock."""
        self._stream, self._clock = stream, clock
        self.progress: Progress | None = None
        self.get_state, self.set_state, self.close = stream.get_state, stream.set_state, stream.close

    @property
    def at_round_end(self) -> bool:
        """Whether a run can be saved here, and go on; False inside a round of the model's own images."""
        return getattr(self._stream, "at_round_end", True)

    def get_state_past(self) -> str:
        """Returns the position behind the last batch, or behind the round of images that it is of."""
        if isinstance(self._stream, RoundStream):
            return self._stream.get_state_past()
        return self._stream.get_state()

    def metrics(self) -> dict[str, float]:
        """Returns metrics of the images that the last batch was made of, if it was made of images."""
        return self._stream.metrics() if isinstance(self._stream, RoundStream) else {}

    def next(self, params: Params) -> Batch:
        """Returns the next batch; the progress bar tells where a round of images is drawn for it."""
        begins = isinstance(self._stream, RoundStream) and self.at_round_end
        busy = self.progress.busy("drawing images") if begins and self.progress else nullcontext()
        with busy, self._clock.waiting():
            return self._stream.next(params)
