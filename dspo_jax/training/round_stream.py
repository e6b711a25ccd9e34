"""The base class of streams whose batches are made of rounds of the model's own images."""

import abc
import dataclasses
import json
from typing import Any

from absl import logging

from dspo_jax.models.model import Params
from dspo_jax.parallel import processes
from dspo_jax.training.rounds import Position, Round, Rounds
from dspo_jax.training.task import Batch


class RoundStream(abc.ABC):
    """A `Stream` that draws a round of images, takes some updates with them, and draws the next.

    Its position can be saved between rounds alone: a run that is resumed inside a round draws the round
    again, with the parameters of its start, which gives the same images and batches.
    """

    def __init__(self, rounds: Rounds, updates: int):
        """Starts before the first round.

        Args:
          rounds: draws and scores images.
          updates: with the images of a round.
        """
        self._rounds, self._updates, self._update = rounds, updates, 0
        self._position = Position()
        self._round: Round | None = None
        self._metrics: dict[str, float] = {}
        self._saved = self._describe_position()
        self._has_warned = False

    def next(self, params: Params) -> Batch:
        """Returns the next batch, on the devices; draws and scores the images where a round begins.

        Raises:
          UserError: more than half of the images of the round have no reward.
        """
        if self._round is None:
            self._round = self._rounds.draw(params, self._position)
            self._metrics = self._round.metrics | self._begin(params, self._round)
        batch = self._make_batch(self._round, self._update)
        self._update += 1
        if self._update == self._updates:
            self._position = self._round.next_position(self._rounds.images)
            self._update, self._round = 0, None
            self._saved = self._describe_position()
        return batch

    @abc.abstractmethod
    def _begin(self, params: Params, drawn: Round) -> dict[str, float]:
        """Prepares the batches of a round with the parameters that drew it; returns further metrics."""

    @abc.abstractmethod
    def _make_batch(self, drawn: Round, update: int) -> Batch:
        """Returns the batch of an update, from 0, of the round that `_begin` has seen last."""

    def _warn_of_ties(self, drawn: Round) -> None:
        """Says, once, that a round has no image that is better than another, so that nothing is learned."""
        if not self._has_warned and processes.is_first():
            logging.warning(
                "round %d: no image has a higher reward than those it is compared with, so that config."
                "rewards.train teaches nothing; look at what it gives for the images of this model (further "
                "rounds like this are not told)",
                drawn.position.round,
            )
        self._has_warned = True

    def _get_statistics(self) -> dict[str, Any]:
        """Returns what the stream remembers of earlier rounds, in types of JSON."""
        return {}

    def _set_statistics(self, statistics: dict[str, Any]) -> None:
        """Goes on from what `_get_statistics` returned."""
        del statistics

    @property
    def at_round_end(self) -> bool:
        """Whether the next batch begins a round: where a checkpoint must be made, if any."""
        return self._round is None

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the last round, see `Round`; nothing before the first."""
        return dict(self._metrics)

    def get_state(self) -> str:
        """Returns the position behind the last finished round as JSON; the same in every process."""
        return self._saved

    def get_state_past(self) -> str:
        """Returns the position behind the round of the last batch, without its rewards, as JSON."""
        if self._round is None:
            return self._saved
        position = self._round.next_position(self._rounds.images)
        return json.dumps(json.loads(self._saved) | dataclasses.asdict(position))

    def set_state(self, state: str) -> None:
        """Continues behind the round after which `get_state` was called."""
        position = json.loads(state)
        self._set_statistics(position.pop("statistics"))
        self._position, self._update, self._round = Position(**position), 0, None
        self._saved = state

    def close(self) -> None:
        """Releases the images of the round."""
        self._round = None

    def _describe_position(self) -> str:
        return json.dumps(dataclasses.asdict(self._position) | {"statistics": self._get_statistics()})
