"""Log-probabilities of denoising steps, and the base class of the losses that are functions of them.

Notation: step i goes from x_i to x_{i+1} ~ N(mean, s^2), D = h w C numbers; A is the advantage of the image
that the step belongs to. With `reduction` "mean", which every released code takes, a log-probability and a
divergence are the mean over the D numbers; with "sum", which every paper prints, their sum. Both are given as
sums, so that the mean is the sum / D; the loss of a row is not summed over steps but averaged by the caller
over rows, as every release does. Where rho = 1 the gradient of the mean over T steps with "mean" is exactly
1 / (D T) of that of the printed sum over steps with "sum", for the same A and beta.

Axes in the annotations: `b` rows, each a denoising step of an image or of a pair; `p` images of a row.
"""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dspo_jax.errors import UserError
from dspo_jax.objectives import hyperparameters
from dspo_jax.objectives.hyperparameters import choice

LossAndMetrics = tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]

_FLOAT32_ROUNDING = 6e-8
"""Relative rounding error of a float32 number near 1, such as a ratio of probabilities."""

_LARGEST_LOG_RATIO = 80.0
"""exp(88.8) overflows float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Steps:
    """Log-probabilities of a batch of denoising steps and the advantages of their images.

    Half precision is refused: the sum over D numbers is of the order of D, and the log-ratios are not.

    Attributes:
      log_probability: [B, P], of x_{i+1} under the policy, the sum over a latent's D numbers in nats
        (`samplers.log_probability`). x_{i+1} is data: no gradient flows into it. P = `images` of the method.
      old_log_probability: [B, P], under the parameters that drew x_{i+1}.
      reference_log_probability: [B, P], under the frozen reference; None where no method asks for it.
      kl: [B, P], KL(policy || reference) of the step at x_i, the sum over D (`divergence`).
      prediction_error: [B, P], mean over D of (e - r)^2, of the policy's prediction and the reference's.
      advantage: [B]. For `d3po` the label: 1 where the row's first image is the better one, -1 where the
        second is, 0 for a tie, which gives no gradient.
      size: D.
    """

    log_probability: Float[Array, "..."]
    old_log_probability: Float[Array, "..."]
    reference_log_probability: Float[Array, "..."] | None = None
    kl: Float[Array, "..."] | None = None
    prediction_error: Float[Array, "..."] | None = None
    advantage: Float[Array, "..."]
    size: int = dataclasses.field(metadata={"static": True})


def divergence(
    mean: Float[Array, "*rows h w c"],
    reference_mean: Float[Array, "*rows h w c"],
    deviation: Float[Array, "*rows"],
) -> Float[Array, "*rows"]:
    """Computes KL(policy || reference) of a step, |mean - reference_mean|^2 / (2 deviation^2), in nats.

    It is exact, as both are Gaussians of the same deviation. For a DDIM step it is c^2 / (2 s^2) |e - r|^2,
    c the coefficient of the prediction.

    Args:
      mean, reference_mean: of `Sampler.transition` from the same x_i.
      deviation: of the step. A step whose deviation is 0 has no density: leave it out.
    """
    return jnp.square(mean - reference_mean).sum((-3, -2, -1)) / (2 * jnp.square(deviation))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient(abc.ABC):
    """A loss with its hyperparameters: `Steps -> (loss [B], metrics {name: [B]})`.

    A method is a frozen dataclass that derives from this one. Its fields are the keys `policy_gradient.FIELD`
    of a config.

    Attributes:
      name: `policy_gradient.name` of a config.
      images: P, images of a row: 1, or 2 of one prompt that are compared.
      single_update: whether the loss holds only for the first update after the images were drawn.
      normalises: whether advantages are rewards in units of a deviation, or rewards less a mean.
      reduction: "mean" (released code) or "sum" (papers) over the D numbers of a latent.
    """

    name: ClassVar[str]
    images: ClassVar[int] = 1
    single_update: ClassVar[bool] = False
    normalises: ClassVar[bool] = True

    reduction: str = choice("mean", "sum")

    def __post_init__(self) -> None:
        """Refuses a value outside its field's limit, by the key of the config."""
        hyperparameters.check(dataclasses.fields(self), self.name, self.hyperparameters, "policy_gradient")

    def __call__(self, steps: Steps) -> LossAndMetrics:
        """Evaluates the loss per row; a gradient flows only into the policy's quantities.

        Returns:
          The loss [B], not reduced over rows, and the metrics, each [B] and a mean over the row's images:
          `ratio`, rho = policy / old; `approximate_kl`, (rho - 1) - log rho, of the policy from the old one;
          `kl` to the reference, where `Steps.kl` is given; and those of the method. Log-ratios and
          divergences are reduced by `reduction`.

        Raises:
          UserError: a quantity of the reference that the method needs is missing.
          ValueError: shapes or dtypes do not match.
        """
        self._check(steps)
        fixed = jax.lax.stop_gradient(
            (steps.old_log_probability, steps.reference_log_probability, steps.advantage)
        )
        old, reference, advantage = fixed
        steps = dataclasses.replace(
            steps, old_log_probability=old, reference_log_probability=reference, advantage=advantage
        )
        loss, metrics = self.loss_and_metrics(steps)
        log_ratio = self._log_ratio(steps)
        metrics |= {
            "ratio": jnp.exp(log_ratio).mean(1),
            "approximate_kl": (jnp.expm1(log_ratio) - log_ratio).mean(1),
        }
        if steps.kl is not None:
            metrics["kl"] = self._reduce(steps.kl, steps.size).mean(1)
        return loss, jax.lax.stop_gradient(metrics)

    @abc.abstractmethod
    def loss_and_metrics(self, steps: Steps) -> LossAndMetrics:
        """Returns the loss [B] and the metrics of the method, each [B], for steps that are checked."""

    def notes(self, values_per_image: int) -> list[str]:
        """Lists advice and warnings for a run with these hyperparameters, a line each.

        Args:
          values_per_image: D. Converts between mean and sum.
        """
        del values_per_image
        return []

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads a quantity of the reference network."""
        return False

    @property
    def penalises_reward(self) -> bool:
        """Whether `reward_penalty` is to be subtracted from the rewards."""
        return False

    def reward_penalty(
        self, log_probability: Float[Array, "b t"], reference_log_probability: Float[Array, "b t"]
    ) -> Float[Array, " b"]:
        """Returns what is to be subtracted from the rewards of images; 0 unless `penalises_reward`.

        Args:
          log_probability: [B, T], of all steps of an image under the policy that drew it, sums over D.
          reference_log_probability: [B, T], under the reference.
        """
        del reference_log_probability
        return jnp.zeros_like(log_probability[:, 0])

    @property
    def hyperparameters(self) -> dict[str, object]:
        """Every field with its value, defaults included."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def _needed(self) -> tuple[str, ...]:
        """Names of the optional fields of `Steps` that the loss reads."""
        return ()

    def _check(self, steps: Steps) -> None:
        shape = steps.log_probability.shape
        if len(shape) != 2 or shape[1] != self.images:
            raise ValueError(
                f"Steps.log_probability has shape {shape}; {self.name!r} takes [B, P] with P = {self.images}"
            )
        for field in dataclasses.fields(steps):
            value = getattr(steps, field.name)
            if field.name == "size":
                continue
            if value is None:
                if field.name in self._needed:
                    raise UserError(
                        f"policy gradient {self.name!r} compares the policy with the reference model: "
                        f"Steps.{field.name} is None, compute it from the frozen model"
                    )
                continue
            expected = shape[:1] if field.name == "advantage" else shape
            if value.shape != expected:
                raise ValueError(f"Steps.{field.name} has shape {value.shape}; it must be {expected}")
            if value.dtype.itemsize < 4:
                raise ValueError(f"Steps.{field.name} has dtype {value.dtype}; it must be float32")

    def _reduce(self, total: Float[Array, "b p"], size: int) -> Float[Array, "b p"]:
        """Turns a sum over D numbers into what `reduction` says."""
        return total / size if self.reduction == "mean" else total

    def _log_ratio(self, steps: Steps) -> Float[Array, "b p"]:
        """Returns log rho, of the policy to the policy that drew the images, at most 80.

        An infinite rho would give NaN where a clip or an advantage of 0 says that the gradient is zero.
        """
        log_ratio = self._reduce(steps.log_probability - steps.old_log_probability, steps.size)
        return jnp.minimum(log_ratio, _LARGEST_LOG_RATIO)


def describe_clip(name: str, clip: float, reduction: str, values_per_image: int) -> list[str]:
    """Returns what a clip of a ratio of probabilities means in terms of mean and of sum, as lines."""
    if reduction == "mean":
        lower, upper = (math.log1p(sign * clip) * values_per_image for sign in (-1, 1))
        return [
            f"{name}: clip = {clip:g} of the mean over {values_per_image} values is {upper:.3g} nats of the "
            f"sum: a step counts until it is {_exponential(lower)} or {_exponential(upper)} times as probable"
        ]
    mean = math.log1p(clip) / values_per_image
    lines = [f"{name}: clip = {clip:g} of the sum over {values_per_image} values is {mean:.3g} of the mean"]
    if mean < 10 * _FLOAT32_ROUNDING:
        lines.append(
            f"warning: {name}: that is within 10 times the rounding of float32 ({_FLOAT32_ROUNDING:g} of the "
            "mean): steps would be cut off by rounding; the released clip of 1e-4 of the mean is "
            f"{1e-4 * values_per_image:.3g} nats of the sum"
        )
    return lines


def _exponential(nats: float) -> str:
    """Returns exp(nats) as text, by its exponent where the number would be too large or small to read."""
    return f"{math.exp(nats):.3g}" if abs(nats) < 20 else f"exp({nats:.4g})"
