"""Denoising without a preference: of every image, of the winners, or of images weighed by their rewards."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64

from dspo_jax.objectives.advantages import softmax_weights
from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, choice, number
from dspo_jax.objectives.implicit_reward import collect_metrics, reduce_image, squared_error
from dspo_jax.objectives.objective import LossAndMetrics, MinSNRWeighted, Predictions
from dspo_jax.schedules.process import Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Denoising(MinSNRWeighted):
    """Hyperparameters of `ddpm`, `sft` and `rwr`.

    Attributes:
      min_snr_gamma: see `MinSNRWeighted`.
      reduction: "mean" or "sum" over an image.
      time_weight: "none", "epsilon", or "paper" for lambda(t) = A(t) B(t)^2, DSPO's own weight at gamma = 0.
    """

    needs_reference = False
    needs_loser = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(_Denoising):
    """SE(e), averaged over the images of an example (DDPM Eq. 14; DSPO Eq. 3 with lambda(t) = 1).

    P = 1 or 2; the reference is read for metrics only.
    """

    name = "ddpm"

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        losses = squared_error(predictions, self.reduction)
        losses *= self._denoising_weight(predictions.levels, schedule)
        return losses.mean(1), collect_metrics(predictions, reduction=self.reduction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(_Denoising):
    """SE(e_w): supervised fine-tuning on the winners, the papers' baseline.

    A loser, which the training step does not run, is read for metrics only.
    """

    name = "sft"
    images = "winner"

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        # Reduced over the shape that `dspo` reduces over, so that the two agree to the last bit where e = r.
        residual = predictions.policy[:, 0] - predictions.target[:, 0]
        loss = reduce_image(jnp.square(residual), self.reduction)
        loss *= self._denoising_weight(predictions.levels[:, 0], schedule)
        return loss, collect_metrics(predictions, reduction=self.reduction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWR(_Denoising):
    """w SE(e), averaged over the images of an example: reward-weighted regression (Black et al. 2023).

    w = softmax(beta r) x N over N of the model's own images, see `advantages.softmax_weights`; 1 on average.
    The released code also guides the prediction that is trained, which is not done here. A row holds two
    images of a prompt, the one with the higher reward first; the reference is read for metrics only.

    Attributes:
      beta: inverse temperature, in 1 / the units of the reward. The released 0.2 is for kilobytes of JPEG and
        for aesthetic scores. With PickScore, whose images of a prompt differ by about 1,
        begin with 1; with HPSv2, whose differ by hundredths, with 100.
      softmax_over: "round", all images that are drawn together, or "prompt", those of each prompt, so that
        prompts of high reward do not weigh more. The released code does either.
    """

    name = "rwr"
    needs_weight = True

    beta: float = number(0.2, ABOVE_ZERO)
    softmax_over: str = choice("round", "prompt")

    def weigh(self, rewards: Float[np.ndarray, " n"], images: int) -> Float64[np.ndarray, " n"]:
        return softmax_weights(rewards, images if self.softmax_over == "prompt" else len(rewards), self.beta)

    def loss_and_metrics(self, predictions: Predictions, schedule: Process) -> LossAndMetrics:
        assert predictions.weight is not None
        losses = squared_error(predictions, self.reduction)
        losses *= predictions.weight * self._denoising_weight(predictions.levels, schedule)
        return losses.mean(1), collect_metrics(predictions, reduction=self.reduction)
