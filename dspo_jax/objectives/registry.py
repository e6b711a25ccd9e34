"""What an objective is, what it is given, and how it is found by name."""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.schedules.variance_preserving import Schedule

CHOICES = {"reduction": ("mean", "sum"), "time_weight": ("none", "paper")}
# What a number must be besides finite, where "zero or above" will not do.
_LIMITS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "alpha": ("above 0 and below 1", lambda value: 0 < value < 1),
    "beta": ("above zero", lambda value: value > 0),
    "kappa": ("above zero", lambda value: value > 0),
    "min_snr_gamma": ("above zero", lambda value: value > 0),
    "mu": ("between 0 and 1", lambda value: 0 <= value <= 1),
}

LossAndMetrics = tuple[jax.Array, dict[str, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """What the networks said about a batch of noised images.

    Attributes:
      policy: [B, P, h, w, C], the trained network's output. P = 1, or 2: the winner, the loser.
      reference: the frozen network's output for the same inputs, or None for an objective that needs none.
      target: [B, P, h, w, C], what a perfect network would say (`Schedule.target`).
      timesteps: [B] or [B, P] int, when the images of a pair are noised to different levels.
      preference: [B], the probability in [0.5, 1] that the winner is the better image; None means 1. Where
        P = 1 it is the probability in [0, 1] that the image is liked, which only `kto` reads.
    """

    policy: jax.Array
    reference: jax.Array | None
    target: jax.Array
    timesteps: jax.Array
    preference: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """A named loss with its hyperparameters: `(Predictions, Schedule) -> (loss [B], metrics {name: [B]})`.

    Attributes:
      name: its name in the registry.
      hyperparameters: every argument with its value, defaults included.
      needs_reference: whether `Predictions.reference` must be given.
      needs_loser: whether P must be 2.
      images: what it is trained on of a pair, and so what the step runs: "all", the "winner" alone, or "one"
        image that the step draws. Given more, it computes metrics from them.
    """

    name: str
    hyperparameters: dict[str, Any] = dataclasses.field(hash=False)
    needs_reference: bool
    needs_loser: bool
    images: str
    _loss: Callable[..., LossAndMetrics] = dataclasses.field(repr=False)
    _notes: Callable[..., list[str]] | None = dataclasses.field(repr=False)

    def __call__(self, predictions: Predictions, schedule: Schedule) -> LossAndMetrics:
        """Evaluates the objective, in float32 whatever the dtype of the inputs, per example.

        No gradient flows into the reference or the target.

        Returns:
          The loss [B], not reduced over the batch, and the metrics, each [B].

        Raises:
          ValueError: The reference or the loser is missing, or shapes do not match.
        """
        return self._loss(self._prepare(predictions), schedule, **self.hyperparameters)

    @property
    def detaches_loser(self) -> bool:
        """Whether the loser is read but not trained on: it enters DSPO through G, which may be detached."""
        return self.needs_loser and self.hyperparameters.get("detach", False)

    def notes(self, values_per_image: int) -> list[str]:
        """What a user should be told before a run with these hyperparameters, a line each.

        Args:
          values_per_image: h * w * C of a latent. Converts beta between mean and sum.
        """
        return self._notes(values_per_image, **self.hyperparameters) if self._notes else []

    def _prepare(self, predictions: Predictions) -> Predictions:
        """Checks the inputs; gives float32 arrays and timesteps [B, P]."""
        policy = predictions.policy
        if policy.ndim != 5 or policy.shape[1] not in (1, 2):
            raise UserError(
                f"Predictions.policy has shape {policy.shape}; it must be [B, P, h, w, C] with P = 1 or 2"
            )
        batch, images = policy.shape[:2]
        if self.needs_reference and predictions.reference is None:
            raise UserError(
                f"objective {self.name!r} compares the policy with the reference model: "
                "Predictions.reference is None, pass the frozen model's predictions"
            )
        if self.needs_loser and images == 1:
            raise UserError(
                f"objective {self.name!r} compares a winner with a loser, but the batch has one image "
                "per example (P = 1): train on pairs, or use one for single images (ddpm, sft, dspo_e)"
            )
        for name in ("reference", "target"):
            array = getattr(predictions, name)
            if array is not None and array.shape != policy.shape:
                raise UserError(
                    f"Predictions.{name} has shape {array.shape}, Predictions.policy {policy.shape}"
                )
        timesteps = jnp.asarray(predictions.timesteps)
        if timesteps.shape not in ((batch,), (batch, images)):
            raise UserError(
                f"Predictions.timesteps has shape {timesteps.shape}; "
                f"it must be {(batch,)} or {(batch, images)}"
            )
        preference = predictions.preference
        if preference is not None and preference.shape != (batch,):
            raise UserError(f"Predictions.preference has shape {preference.shape}; it must be {(batch,)}")
        policy, reference, target, preference = jax.tree.map(
            lambda array: jnp.asarray(array, jnp.float32),
            (policy, predictions.reference, predictions.target, preference),
        )
        reference, target = jax.lax.stop_gradient((reference, target))
        timesteps = jnp.broadcast_to(timesteps.reshape(batch, -1), (batch, images))
        return Predictions(policy, reference, target, timesteps, preference)


_REGISTRY: dict[str, Callable[..., Objective]] = {}


def register(
    *,
    needs_reference: bool,
    needs_loser: bool,
    images: str = "all",
    notes: Callable[..., list[str]] | None = None,
) -> Callable[[Callable[..., LossAndMetrics]], Callable[..., LossAndMetrics]]:
    """Enters a loss function in the registry under its own name.

    The function takes `(predictions, schedule)`, checked and cast by `Objective`, and its hyperparameters as
    keyword-only arguments with defaults: their names and defaults are read from its signature.

    Args:
      needs_reference: see `Objective`.
      needs_loser: see `Objective`.
      images: see `Objective`.
      notes: `(values_per_image, **hyperparameters) -> lines` for `Objective.notes`; it names the
        hyperparameters that it reads.
    """

    def enter(loss: Callable[..., LossAndMetrics]) -> Callable[..., LossAndMetrics]:
        name = loss.__name__
        defaults = {
            parameter.name: parameter.default
            for parameter in inspect.signature(loss).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

        def build(**hyperparameters: Any) -> Objective:
            for argument, value in hyperparameters.items():
                if argument not in defaults:
                    raise UserError(spelling.unknown(f"argument of objective {name!r}", argument, defaults))
                _check_value(f"config.objective.{argument}", value, defaults[argument])
            values = {**defaults, **hyperparameters}
            if values.get("min_snr_gamma") is not None and values["time_weight"] != "none":
                raise UserError(
                    f"config.objective.min_snr_gamma = {values['min_snr_gamma']!r}: is a time weight of its "
                    f"own; leave it out, or config.objective.time_weight = {values['time_weight']!r}"
                )
            return Objective(name, values, needs_reference, needs_loser, images, loss, notes)

        _REGISTRY[name] = build
        return loss

    return enter


def get_objective(name: str, **hyperparameters: Any) -> Objective:
    """The objective called `name`, with the given hyperparameters and its own defaults for the others.

    Raises:
      ValueError: Unknown name or argument, or a value out of range; the message gives the nearest valid name.
    """
    if name not in _REGISTRY:
        raise UserError(spelling.unknown("config.objective.name", str(name), _REGISTRY))
    return _REGISTRY[name](**hyperparameters)


def _check_value(key: str, value: Any, default: Any) -> None:
    choices = CHOICES.get(key.rpartition(".")[2])
    if choices is not None:
        if value not in choices:
            raise UserError(spelling.unknown(key, str(value), choices))
        return
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{key} = {value!r}: must be True or False")
        return
    if value is None and default is None:
        return
    limit, within = _LIMITS.get(key.rpartition(".")[2], ("zero or above", lambda value: value >= 0))
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not within(float(value)):
        raise UserError(f"{key} = {value!r}: must be a finite number, {limit}")
