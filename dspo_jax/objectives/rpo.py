"""Relative preference optimization: winners are compared with the losers of similar prompts too."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dspo_jax.objectives.comparison import OfMargin
from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, number
from dspo_jax.objectives.implicit_reward import collect_metrics, error_drift, label_doubt
from dspo_jax.objectives.objective import LossAndMetrics, Predictions
from dspo_jax.schedules.process import Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionRPO(OfMargin):
    """mean_j of -log sigmoid(omega_ij (R_wi - R_lj)), R = -(beta / 2) [SE(e) - SE(r)]: i wins, j loses.

    omega_i: = softmax_j(-(1 - cos(c_i, c_j)) / temperature), c the embeddings of the prompts: how near the
    prompt of the loser is. So a winner is preferred to the losers of all pairs of the batch. With e = r the
    loss is exactly ln 2; for a batch of one pair it is `diffusion_dpo`.

    Diffusion-RPO (arXiv 2406.06382) is known from its abstract and summaries; its repository holds no code.
    The formula is the released one of RPO for language models (arXiv 2402.10958, rpo-paired), with the
    implicit reward of diffusion models. Not verified: the temperature, for which 0.5 is the value of that
    code, with embeddings of sentences; and how the paper joins the embeddings of image and prompt, both of
    CLIP. Here they are of the prompts alone, by the frozen text encoders that the denoiser reads
    (`Pipeline.embed_captions`), before captions are dropped. Timesteps and noise are each pair's own.

    Of labels that are right with probability p < 1 it is the expected loss, where the labels of two pairs
    are right or wrong independently.

    Adds the metric `own_weight`: omega_ii, between 1 / B, all prompts alike, and 1, which is `diffusion_dpo`
    with a gradient of 1 / B.

    Attributes:
      beta: as in `diffusion_dpo`; within the sigmoid it is multiplied by omega, of which the mean is 1 / B.
      temperature: of the weights.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for w(t) inside the reward.
    """

    name = "diffusion_rpo"
    needs_captions = True

    temperature: float = number(0.5, ABOVE_ZERO)

    @property
    def needs_whole_batch(self) -> bool:
        return True

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        assert predictions.captions is not None
        rewards = -0.5 * self.beta * error_drift(predictions, self.reduction)
        rewards *= self._reward_weight(predictions.levels, schedule)
        weights = self._weights(predictions.captions)
        # [i, j, a, b]: image a of pair i against image b of pair j, which are not the winner and the loser
        # where a label is wrong. Of one pair they are two images.
        difference = rewards[:, None, :, None] - rewards[None, :, None, :]
        losses = jax.nn.softplus(-weights[:, :, None, None] * difference)
        doubt = label_doubt(predictions)
        wins = jnp.stack([1 - doubt, doubt], 1)[:, None, :, None]
        loses = jnp.stack([doubt, 1 - doubt], 1)[None, :, None, :]
        same = jnp.eye(len(rewards), dtype=bool)[:, :, None, None]
        chance = wins * jnp.where(same, jnp.fliplr(jnp.eye(2))[None, None], loses)
        margin = rewards[:, 0] - rewards[:, 1]
        metrics = collect_metrics(predictions, reduction=self.reduction, margin=margin)
        return (chance * losses).sum((2, 3)).mean(1), metrics | {"own_weight": jnp.diagonal(weights)}

    def _weights(self, captions: Float[Array, "b d"]) -> Float32[Array, "b b"]:
        """Returns omega, [B, B]: the weights of all losers for each winner, which add up to 1."""
        length = jnp.linalg.norm(captions, axis=1, keepdims=True)
        directions = captions / jnp.maximum(length, 1e-12)
        cosines = jnp.einsum("id,jd->ij", directions, directions, precision="highest")
        return jax.nn.softmax(cosines / self.temperature, axis=1)

    def notes(self, values_per_image: int) -> list[str]:
        return [
            *super().notes(values_per_image),
            f"diffusion_rpo: temperature = {self.temperature:g}: the paper's value was not verified, as its "
            "code is not released; watch own_weight, the weight of a winner's own loser: at 1 / batch_size "
            "all prompts count alike, and beta so much less",
        ]
