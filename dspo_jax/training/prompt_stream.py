"""Batches of prompts for losses that draw the images themselves."""

import json
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import batch_share, shard_batch
from dspo_jax.training.task import Batch

Tokenize = Callable[[Sequence[str]], PyTree]


class EndlessOrder:
    """An endless shuffled order of N examples, each once an epoch; the same in every process."""

    def __init__(self, count: int, seed: int):
        """Takes N and the seed."""
        self._count, self._seed = count, seed

    def at(self, positions: np.ndarray) -> list[int]:
        """Returns the numbers of the examples at positions of the order."""
        epochs = {epoch: self._permute(epoch) for epoch in np.unique(positions // self._count).tolist()}
        return [int(epochs[place // self._count][place % self._count]) for place in positions.tolist()]

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._count)


class PromptStream:
    """Endless shuffled batches of prompts, on the devices; a `Stream`.

    Several processes must hold the same prompts.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        tokenize: Tokenize,
        reward_tokenize: Tokenize,
        mesh: Mesh,
        *,
        batch_size: int,
        seed: int = 0,
    ):
        """Starts at the first batch.

        Args:
          prompts: N texts.
          tokenize: of the model: B prompts -> ids [B, E, S].
          reward_tokenize: of the reward: B prompts -> what it takes as tokens, arrays with a leading axis B.
          mesh: the devices.
          batch_size: prompts in a batch, over all processes; it may be larger than N.
          seed: of the order.
        """
        self._prompts, self._order = prompts, EndlessOrder(len(prompts), seed)
        self._tokenize, self._reward_tokenize = tokenize, reward_tokenize
        self._mesh, self._batch_size, self._next = mesh, batch_size, 0

    def next(self, params: Params) -> Batch:
        """Returns the next batch, see `RewardGradientLoss`; ignores `params`."""
        del params
        share, shares = batch_share(self._mesh)
        size = self._batch_size // shares
        positions = self._next * self._batch_size + share * size + np.arange(size)
        prompts = [self._prompts[number] for number in self._order.at(positions)]
        batch = {
            "tokens": self._tokenize(prompts),
            "reward_tokens": self._reward_tokenize(prompts),
            "index": positions.astype(np.uint32),
            "update": np.full(size, self._next, np.uint32),
        }
        self._next += 1
        return shard_batch(batch, self._mesh)

    def get_state(self) -> str:
        """Returns the position behind the last batch, as a JSON string."""
        return json.dumps({"next_batch": self._next})

    def set_state(self, state: str) -> None:
        """Continues behind the batch after which `get_state` was called."""
        self._next = json.loads(state)["next_batch"]

    def close(self) -> None:
        """Holds nothing that would have to be released."""
