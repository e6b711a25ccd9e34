"""The base class of objectives, and the predictions that an objective compares.

Axes in the annotations of this package: `b` examples, `p` images of an example, `h w c` a latent.
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Num

from dspo_jax.errors import UserError
from dspo_jax.objectives import hyperparameters
from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, choice, number
from dspo_jax.schedules.process import Process

LossAndMetrics = tuple[Float32[Array, " b"], dict[str, Float32[Array, " b"]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Denoiser outputs for a batch of noised images, and what they are compared with.

    Attributes:
      policy: [B, P, h, w, C], the trained network's output. P = 1, or 2: the winner, the loser; or a list of
        more, best first or with scores.
      reference: the frozen network's output for the same inputs, or None for an objective that needs none.
      target: [B, P, h, w, C], the output of a perfect network (`Process.target`).
      levels: noise levels of the process (integer timesteps, or float32 sigma of rectified flow), [B], or
        [B, P] where the images of a pair are noised to different ones.
      preference: [B], the probability in [0.5, 1] that the winner is the better image; None means 1. Where
        P = 1 it is the probability in [0, 1] that the image is liked, which `kto`, `nft` and `awm` read.
      scores: [B, P], what each image is worth, of which more is better; None means the order of the images.
      weight: [B, P], of each image by its reward, or None for an objective that needs none.
      beta: [B], in the place of the objective's own, where that follows the margins; None means its own.
      captions: [B, D], embeddings of the captions, or None for an objective that needs none.
      reference_error: [B, P], the reference's mean squared error, stored before, in the place of its output
        for an objective that `compares_errors`.
    """

    policy: Float[Array, "..."]
    reference: Float[Array, "..."] | None
    target: Float[Array, "..."]
    levels: Num[Array, "..."]
    preference: Float[Array, "..."] | None = None
    scores: Float[Array, "..."] | None = None
    weight: Float[Array, "..."] | None = None
    beta: Float[Array, "..."] | None = None
    captions: Float[Array, "..."] | None = None
    reference_error: Float[Array, "..."] | None = None


def level_weight(name: str, levels: Num[Array, "*t"], process: Process) -> Float32[Array, "*t"] | float:
    """Returns the weight of a squared error inside the reward by the name of `Objective.time_weight`."""
    if name == "none":
        return 1.0
    return process.epsilon_weight(levels) if name == "epsilon" else process.reward_weight(levels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """A loss with its hyperparameters: `(Predictions, Process) -> (loss [B], metrics {name: [B]})`.

    An objective is a frozen dataclass that derives from this one. Its fields are the keys `objective.FIELD`
    of a config; `loss_and_metrics` holds the mathematics; the class says what it must be given.

    Attributes:
      name: `objective.name` of a config.
      needs_reference: whether `Predictions.reference` must be given.
      needs_loser: whether P must be 2, or more where lists are taken.
      needs_labels: whether single images must come with labels.
      takes_lists: whether P may be more than 2.
      images: images of a pair that are trained on, and so that the step runs: "all", the "winner" alone, or
        "one" image that the step draws. Given more, it computes metrics from them.
      needs_weight: whether `Predictions.weight` must be given, which is `weigh` of a round's rewards.
      needs_captions: whether `Predictions.captions` must be given.
      score_rises: whether held-out accuracy or reward rises as it learns, so that the best checkpoint can be
        chosen by it.
      reduction: "mean" (released code) or "sum" (papers) over an image.
      time_weight: "none" (released code), "paper" for the weights that the papers derive, or "epsilon", which
        makes all errors those of the noise: 1 where that is predicted, abar of v, (1 - sigma)^2 of a flow.
    """

    name: ClassVar[str]
    needs_reference: ClassVar[bool]
    needs_loser: ClassVar[bool]
    needs_labels: ClassVar[bool] = False
    takes_lists: ClassVar[bool] = False
    images: ClassVar[str] = "all"
    needs_weight: ClassVar[bool] = False
    needs_captions: ClassVar[bool] = False
    score_rises: ClassVar[bool] = True

    reduction: str = choice("mean", "sum")
    time_weight: str = choice("none", "epsilon", "paper")

    def __post_init__(self) -> None:
        """Refuses a value outside its field's limit, by the key of the config."""
        hyperparameters.check(dataclasses.fields(self), self.name, self.hyperparameters)

    def __call__(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        """Evaluates the objective, in float32 whatever the dtype of the inputs, per example.

        No gradient flows into the reference or the target.

        Returns:
          The loss [B], not reduced over the batch, and the metrics, each [B].

        Raises:
          UserError: The reference, the loser or the weights are missing, or there are more images than it
            takes.
          ValueError: Shapes do not match.
        """
        return self.loss_and_metrics(self._prepare(predictions), schedule)

    @abc.abstractmethod
    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        """Returns the loss [B] and the metrics, each [B].

        Args:
          predictions: checked, float32, with levels [B, P].
          schedule: the model's process; most objectives read it only where there is a `time_weight`.
        """

    def check_process(self, process: Process) -> None:
        """Refuses a process under which the objective is not what its name says; here none.

        Raises:
          UserError: by the key of the config.
        """
        del process

    def weigh(self, rewards: Float[np.ndarray, " n"], images: int) -> Float64[np.ndarray, " n"]:
        """Weighs images by their rewards, on the host: here all alike; 1 on average.

        Args:
          rewards: [N], of a round; NaN for an image that has none.
          images: of each prompt; they lie side by side.
        """
        del images
        return np.ones(len(rewards))

    def notes(self, values_per_image: int) -> list[str]:
        """Lists advice and warnings for a run with these hyperparameters, a line each.

        Args:
          values_per_image: h * w * C of a latent. Converts a scale between mean and sum.
        """
        del values_per_image
        return []

    @property
    def detaches_loser(self) -> bool:
        """Whether the loser is read but not trained on, so that the step runs it forward only."""
        return False

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a batch in parts gives another loss than at once, of which `train` warns."""
        return False

    @property
    def needs_scores(self) -> bool:
        """Whether `Predictions.scores` must be given."""
        return False

    @property
    def compares_errors(self) -> bool:
        """Whether nothing of the reference is read but its squared error, so that this can be stored."""
        return False

    @property
    def hyperparameters(self) -> dict[str, object]:
        """Every field with its value, defaults included."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _reward_weight(self, levels: Num[Array, "*t"], schedule: Process) -> Float32[Array, "*t"] | float:
        """Returns the time weight of an error inside the reward."""
        return level_weight(self.time_weight, levels, schedule)

    def _denoising_weight(self, levels: Num[Array, "*t"], schedule: Process) -> Float32[Array, "*t"] | float:
        """Returns the time weight of a denoising error that is itself the loss."""
        if self.time_weight == "paper":
            return schedule.denoising_weight(levels)
        return level_weight(self.time_weight, levels, schedule)

    def _prepare(self, predictions: Predictions) -> Predictions:
        """Checks the inputs; gives float32 arrays and levels [B, P]."""
        policy = predictions.policy
        if policy.ndim != 5 or policy.shape[1] == 0:
            raise ValueError(
                f"Predictions.policy has shape {policy.shape}; it must be [B, P, h, w, C] with P of 1 or more"
            )
        batch, images = policy.shape[:2]
        if images > 2 and not self.takes_lists:
            pair = "a pair" if self.needs_loser else "a single image or a pair"
            raise UserError(
                f"objective {self.name!r} takes {pair} per example, but the batch has {images} images: use "
                "one for lists (lpo_list, dgpo, crd, nft, awm)"
            )
        stored = predictions.reference_error is not None and self.compares_errors
        if self.needs_reference and predictions.reference is None and not stored:
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
                raise ValueError(
                    f"Predictions.{name} has shape {array.shape}, Predictions.policy {policy.shape}"
                )
        levels = jnp.asarray(predictions.levels)
        if levels.shape not in ((batch,), (batch, images)):
            raise ValueError(
                f"Predictions.levels has shape {levels.shape}; it must be {(batch,)} or {(batch, images)}"
            )
        preference = predictions.preference
        if preference is not None and preference.shape != (batch,):
            raise ValueError(f"Predictions.preference has shape {preference.shape}; it must be {(batch,)}")
        scores = predictions.scores
        if self.needs_scores and scores is None:
            raise UserError(
                f"objective {self.name!r} weighs pairs by the scores of their images: "
                "Predictions.scores is None"
            )
        if scores is not None and scores.shape != (batch, images):
            raise ValueError(f"Predictions.scores has shape {scores.shape}; it must be {(batch, images)}")
        weight = predictions.weight
        if self.needs_weight and weight is None:
            raise UserError(
                f"objective {self.name!r} weighs images by their rewards: Predictions.weight is None, pass "
                "the weight of each image [B, P]"
            )
        if weight is not None and weight.shape != (batch, images):
            raise ValueError(f"Predictions.weight has shape {weight.shape}; it must be {(batch, images)}")
        captions = predictions.captions
        if self.needs_captions and captions is None:
            raise UserError(
                f"objective {self.name!r} weighs pairs by the similarity of their captions: "
                "Predictions.captions is None, pass an embedding of each caption [B, D]"
            )
        if captions is not None and (captions.ndim != 2 or len(captions) != batch):
            raise ValueError(f"Predictions.captions has shape {captions.shape}; it must be ({batch}, D)")
        given = (policy, predictions.reference, predictions.target, preference, scores, weight, captions)
        given = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), given)
        policy, reference, target, preference, scores, weight, captions = given
        reference, target, captions = jax.lax.stop_gradient((reference, target, captions))
        levels = jnp.broadcast_to(levels.reshape(batch, -1), (batch, images))
        return dataclasses.replace(
            predictions,
            **{"policy": policy, "reference": reference, "target": target, "levels": levels},
            **{"preference": preference, "scores": scores, "weight": weight, "captions": captions},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinSNRWeighted(Objective):
    """An objective whose squared errors may have the Min-SNR weight in the place of the papers'.

    Attributes:
      min_snr_gamma: the gamma of `Process.min_snr_weight` on the errors; None is no such weight. Not with
        "paper".
    """

    min_snr_gamma: float | None = number(None, ABOVE_ZERO)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_snr_gamma is not None and self.time_weight != "none":
            raise UserError(
                f"config.objective.min_snr_gamma = {self.min_snr_gamma!r}: is a time weight of its own; "
                f"leave it out, or config.objective.time_weight = {self.time_weight!r}"
            )

    def _reward_weight(self, levels: Num[Array, "*t"], schedule: Process) -> Float32[Array, "*t"] | float:
        if self.min_snr_gamma is not None:
            return schedule.min_snr_weight(levels, self.min_snr_gamma)
        return super()._reward_weight(levels, schedule)

    def _denoising_weight(self, levels: Num[Array, "*t"], schedule: Process) -> Float32[Array, "*t"] | float:
        if self.min_snr_gamma is not None:
            return schedule.min_snr_weight(levels, self.min_snr_gamma)
        return super()._denoising_weight(levels, schedule)
