"""Pairs of an encoded image and of one that the frozen reference draws for the same caption."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float32

from dspo_jax.data.datasets import Dataset
from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import batch_sharding
from dspo_jax.pipelines.conditioning_inputs import prompt_batch
from dspo_jax.training.rollouts import Rollout, make_rollout_key
from dspo_jax.training.rounds import check_chunk
from dspo_jax.training.settings import Settings
from dspo_jax.training.shard_stream import ShardStream
from dspo_jax.training.step import split_batch
from dspo_jax.training.task import Batch, Task, of_components


class SelfPlayStream(ShardStream):
    """Batches of shards, whose losers the reference draws (SPIN-Diffusion, Yuan et al. 2024); a `Stream`.

    The winner is the image of the data, the first of a pair. What is drawn is a function of the reference,
    the seed and the place of the example in the data's order, so that a run can go on from any step. With
    `config.reference.every` the reference is the policy of the iteration before. Where a drawn image is not
    finite the winner stands in its place, which teaches nothing.
    """

    def __init__(
        self, datasets: Sequence[Dataset], settings: Settings, task: Task, reference: Params, mesh: Mesh
    ):
        """Opens the training split; programs are compiled for each image size when it comes.

        Args:
          datasets: from `read_datasets`, of pairs or of single images.
          settings: of the run.
          task: with a `PreferenceLoss`.
          reference: the frozen parameters, on the devices; read at every batch, as they may move.
          mesh: the devices.

        Raises:
          UserError: numbers of images that do not go together, by key.
        """
        super().__init__(datasets, settings, mesh, task.loss.inputs(task.pipe))
        parts = settings.batch_size // check_chunk(settings, mesh, settings.batch_size)
        self._task, self._drawing, self._reference = task, settings.stream.drawing, reference
        self._key = make_rollout_key(settings.seed, mesh)
        self._rollouts: dict[tuple[int, int], Rollout] = {}

        def cut(batch: Batch) -> list[Batch]:
            split = split_batch({name: batch[name] for name in ("tokens", "index")}, parts)
            return [{name: array[i] for name, array in split.items()} for i in range(parts)]

        sharding = batch_sharding(mesh)
        self._cut = jax.jit(cut, out_shardings=sharding)
        self._pair = jax.jit(self._make_pairs, out_shardings=sharding)

    def next(self, params: Params) -> Batch:
        """Returns the next batch, for which the reference draws as many images; `params` are not read."""
        batch = super().next(params)
        height, width = size = batch["moments"].shape[2:4]
        if size not in self._rollouts:
            self._rollouts[size] = Rollout(
                self._task, self._drawing, (height, width), self._mesh, keeps_path=False
            )
        rollout = self._rollouts[size]
        frozen = of_components(self._task, self._reference)
        drawn = [
            rollout({}, frozen, part["tokens"], part["index"], self._key)[-1] for part in self._cut(batch)
        ]
        pairs: Batch = self._pair(batch, drawn)
        return pairs

    def _make_pairs(self, batch: Batch, drawn: list[Float32[jax.Array, "b h w C"]]) -> Batch:
        """Returns the batch with the drawn latents as losers, in the order of its examples."""
        pipe, moments = self._task.pipe, batch["moments"]
        latents = jnp.stack(drawn, axis=1).reshape(len(moments), 1, *drawn[0].shape[1:])  # undoes `cut`
        latents = latents.astype(moments.dtype)
        finite = jnp.isfinite(latents).all((1, 2, 3, 4), keepdims=True)
        mean = jnp.split(moments[:, :1], 2, axis=-1)[0]
        latents = jnp.where(finite, latents, mean)  # one NaN would void the whole batch
        losers = {"moments": jnp.concatenate([latents, jnp.zeros_like(latents)], axis=-1)}
        height, width = (side * pipe.vae_scale_factor for side in moments.shape[2:4])
        prompts = prompt_batch(pipe, batch["tokens"], (height, width))
        losers |= {name: prompts[name] for name in pipe.image_inputs}
        both = {name: jnp.concatenate([batch[name][:, :1], of_loser], 1) for name, of_loser in losers.items()}
        certain = {
            "preference": jnp.ones_like(batch["preference"]),
            "loser_won": jnp.zeros_like(batch["loser_won"]),
        }
        return {**batch, **both, **certain}
