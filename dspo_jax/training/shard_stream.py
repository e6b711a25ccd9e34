"""Batches of encoded shards for the training loop."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Integer

from dspo_jax.data import loader
from dspo_jax.data.datasets import Dataset
from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import batch_share, shard_batch
from dspo_jax.training.settings import Settings
from dspo_jax.training.task import Batch


def draw_index(
    row: Integer[np.ndarray, " B"], draw: Integer[np.ndarray, " B"] | int, examples: int
) -> Integer[np.ndarray, " B"]:
    """Returns what seeds the noise of a draw of an example that has several fixed ones, [B]."""
    return row + examples * draw


class ShardStream:
    """Batches of encoded shards on the devices; a `Stream`.

    With several processes each reads its share of a batch.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        settings: Settings,
        mesh: Mesh,
        inputs: Sequence[str],
        reference_errors: np.ndarray | None = None,
    ):
        """Opens the training split.

        Args:
          datasets: from `read_datasets`.
          settings: batch size, seed and what `config.data` says are read.
          mesh: the devices.
          inputs: the arrays that the loss reads; captions and keys stay on the host.
          reference_errors: [K, N, P] float32, of K draws of all N examples, which the batches then have.
        """
        share, shares = batch_share(mesh)
        groups = settings.data.curriculum_groups
        self._batches = loader.train_batches(
            datasets,
            batch_size=settings.batch_size,
            seed=settings.seed,
            weights=settings.data.weights,
            curriculum=None if groups == 1 else loader.Curriculum(groups, settings.data.curriculum_every),
            split=settings.data.split,
            process_index=share,
            process_count=shares,
        )
        self._mesh, self._inputs, self._errors = mesh, inputs, reference_errors

    def next(self, params: Params) -> Batch:
        """Returns the next batch; `params` are not read."""
        del params
        batch = next(self._batches)
        if self._errors is not None:
            draws, examples, _ = self._errors.shape
            draw, row = batch["index"] // examples % draws, batch["row"]  # by the epoch
            batch |= {"index": draw_index(row, draw, examples), "reference_error": self._errors[draw, row]}
        arrays = {name: batch[name] for name in self._inputs}
        arrays["index"] = arrays["index"].astype(np.uint32)
        return shard_batch(arrays, self._mesh)

    def get_state(self) -> str:
        """Returns the position behind the last batch."""
        return self._batches.get_state()

    def set_state(self, state: str) -> None:
        """Continues behind the batch after which `get_state` was called."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._batches.close()
