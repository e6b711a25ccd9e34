"""Losses of online reinforcement learning, found by name.

`get_policy_gradient("ddpo", clip=1e-4)(Steps(...))` gives `(loss [B], metrics {name: [B]})`. They hold no
network and no loop: a caller draws images with a sampler that adds noise, scores them, and evaluates the
policy again at the states that were visited. `steps.py` has the notation. To add a loss, write a frozen
dataclass that derives from `PolicyGradient`, and name it in `POLICY_GRADIENTS`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.objectives import hyperparameters
from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, INSIDE_0_AND_1, choice, number
from dspo_jax.objectives.steps import LossAndMetrics, PolicyGradient, Steps, describe_clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Normalised(PolicyGradient):
    """A method whose advantages are normalised rewards, cut off at a few deviations.

    Attributes:
      advantage_clip: A is cut off at +- this. 5 in ddpo-pytorch, TRL and Flow-GRPO, 10 in the JAX original.
    """

    advantage_clip: float = number(5.0, ABOVE_ZERO)

    def _advantage(self, steps: Steps) -> Float[Array, " b"]:
        return jnp.clip(steps.advantage, -self.advantage_clip, self.advantage_clip)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPO(_Normalised):
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)).

    DDPO with importance sampling (Black et al. 2023, DDPO_IS) and PPO's clip, as in ddpo-pytorch. The
    gradient is zero where A > 0 and rho > 1 + clip, and where A < 0 and rho < 1 - clip.

    Adds the metrics `advantage`: |A|; and `clipped`: whether |rho - 1| > clip.

    Attributes:
      clip: of rho; 1e-4 is the released value, for reduction "mean".
    """

    name = "ddpo"

    clip: float = number(1e-4, INSIDE_0_AND_1)

    def loss_and_metrics(self, steps: Steps) -> LossAndMetrics:
        advantage = self._advantage(steps)
        ratio = jnp.exp(self._log_ratio(steps)[:, 0])
        clipped = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        return jnp.maximum(-advantage * ratio, -advantage * clipped), {
            "advantage": jnp.abs(advantage),
            "clipped": (jnp.abs(ratio - 1) > self.clip).astype(ratio.dtype),
        }

    def notes(self, values_per_image: int) -> list[str]:
        return describe_clip(self.name, self.clip, self.reduction, values_per_image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPOScoreFunction(_Normalised):
    """-A rho with rho = exp(log p - log p held fixed), whose gradient is that of -A log p.

    REINFORCE (Black et al. 2023, DDPO_SF). The value is always -A. It knows nothing of the policy that drew
    the images, so that only one update may be taken with them.

    Adds the metric `advantage`: |A|.
    """

    name = "ddpo_sf"
    single_update = True

    def loss_and_metrics(self, steps: Steps) -> LossAndMetrics:
        advantage = self._advantage(steps)
        log_probability = self._reduce(steps.log_probability, steps.size)[:, 0]
        ratio = jnp.exp(log_probability - jax.lax.stop_gradient(log_probability))
        return -advantage * ratio, {"advantage": jnp.abs(advantage)}

    def notes(self, values_per_image: int) -> list[str]:
        del values_per_image
        return ["ddpo_sf: takes one update with the images of a round; for more take ddpo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WithReference(PolicyGradient):
    """A method that is held near the reference by beta times a divergence.

    Attributes:
      beta: weight of the divergence.
      kl: what is penalised. "kl_loss": the exact KL of the step, as Flow-GRPO; on states that are taken as
        given, so that the divergence that the policy causes by visiting other states has no gradient.
        "prediction": mean (or sum) of (e - r)^2, which DPOK's code calls KL; it lacks KL's c^2 / (2 s^2).
        "kl_in_reward": nothing in the loss; the caller subtracts `reward_penalty` from the rewards, which is
        an unbiased gradient of E r - beta KL(paths).
    """

    beta: float = number(0.01)
    kl: str = choice("kl_loss", "prediction", "kl_in_reward")

    @property
    def needs_reference(self) -> bool:
        return bool(self._needed)

    @property
    def penalises_reward(self) -> bool:
        return self.beta > 0 and self.kl == "kl_in_reward"

    def reward_penalty(
        self, log_probability: Float[Array, "b t"], reference_log_probability: Float[Array, "b t"]
    ) -> Float[Array, " b"]:
        """Returns beta times the log-ratio of a path to the reference, to be subtracted from its reward.

        Args:
          log_probability: [B, T], of all steps of an image under the policy that drew it, sums over D.
          reference_log_probability: [B, T], under the reference.

        Returns:
          [B], beta sum_i (log p_i - log p_ref,i): a sum over D with either `reduction`, as a mean would make
          beta D times weaker than in "kl_loss". Subtract it before the rewards are normalised.
        """
        return self.beta * (log_probability - reference_log_probability).sum(1)

    @property
    def _needed(self) -> tuple[str, ...]:
        if self.beta == 0 or self.kl == "kl_in_reward":
            return ()
        return ("kl",) if self.kl == "kl_loss" else ("prediction_error",)

    def _penalty(self, steps: Steps) -> Float[Array, " b"]:
        """Returns beta times the divergence of each row, reduced."""
        if not self._needed:
            return jnp.zeros_like(steps.advantage)
        if self.kl == "kl_loss":
            assert steps.kl is not None
            return self.beta * self._reduce(steps.kl, steps.size)[:, 0]
        assert steps.prediction_error is not None
        scale = self.beta if self.reduction == "mean" else self.beta * steps.size
        return scale * steps.prediction_error[:, 0]

    def _describe_penalty(self, unit: str) -> list[str]:
        if self.beta == 0:
            return [f"warning: {self.name}: beta = 0: nothing holds the policy near the reference"]
        if self.kl == "prediction":
            return [
                f"{self.name}: kl = 'prediction' is DPOK's (e - r)^2 without KL's factor c^2 / (2 s^2), "
                "which spans 77-fold over 50 steps; its beta does not compare with that of kl_loss"
            ]
        if self.kl == "kl_in_reward":
            return [
                f"{self.name}: beta = {self.beta:g} times the log-ratio of a path, a sum over steps and "
                "values, is subtracted from the raw rewards, before they are normalised"
            ]
        return [f"{self.name}: beta = {self.beta:g} weighs KL against {unit}"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(_WithReference, DDPO):
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) + beta KL.

    Flow-GRPO (Liu et al. 2025) and, with beta = 0, DanceGRPO (Xue et al. 2025): `ddpo` with A normalised
    within the images of one prompt (`advantages.group_advantages`), and a divergence to the reference.

    Adds the metrics of `ddpo`, and `penalty`: beta times the divergence.

    Attributes:
      beta: 0.01 is Flow-GRPO's value for PickScore; 0.04 for its other rewards. In units of A.
    """

    name = "grpo"

    def loss_and_metrics(self, steps: Steps) -> LossAndMetrics:
        loss, metrics = super().loss_and_metrics(steps)
        penalty = self._penalty(steps)
        return loss + penalty, metrics | {"penalty": penalty}

    def notes(self, values_per_image: int) -> list[str]:
        return [*super().notes(values_per_image), *self._describe_penalty("the normalised advantage")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOK(_WithReference):
    """-alpha A clip(rho, 1 - clip, 1 + clip) + beta KL.

    DPOK (Fan et al. 2023). The released code clips rho without PPO's maximum, so that the gradient of the
    first term is zero outside on both sides, whatever the sign of A. A is a reward less a baseline, neither
    normalised nor cut off; the released baseline is a value network, which is left out here.

    Adds the metrics `advantage`: |A|; `clipped`: whether |rho - 1| > clip; and `penalty`: beta times the
    divergence.

    Attributes:
      alpha: weight of the reward. 10 for one prompt, 1000 for many, in the released commands.
      beta: 0.01 for one prompt, 0.1 for many, with the released "prediction".
      clip: of rho; 1e-4 is the released value, for reduction "mean".
    """

    name = "dpok"
    normalises = False

    alpha: float = number(10.0, ABOVE_ZERO)
    clip: float = number(1e-4, INSIDE_0_AND_1)

    def loss_and_metrics(self, steps: Steps) -> LossAndMetrics:
        ratio = jnp.exp(self._log_ratio(steps)[:, 0])
        clipped = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        loss = -self.alpha * steps.advantage * clipped
        penalty = self._penalty(steps)
        return loss + penalty, {
            "advantage": jnp.abs(steps.advantage),
            "clipped": (jnp.abs(ratio - 1) > self.clip).astype(ratio.dtype),
            "penalty": penalty,
        }

    def notes(self, values_per_image: int) -> list[str]:
        return [
            *describe_clip(self.name, self.clip, self.reduction, values_per_image),
            *self._describe_penalty(f"alpha = {self.alpha:g} times the reward, which is not normalised"),
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class D3PO(PolicyGradient):
    """-log sigmoid(beta [log clip(rho_w) - log clip(rho_l)]), rho = policy / reference of a step.

    D3PO (Yang et al. 2023): DPO on each denoising step of two images of one prompt, of which one is better as
    a whole. The released code cuts the ratios off at 1 +- 0.1. A label -1 (`Steps.advantage`) exchanges the
    images, and 0 gives ln 2 without a gradient.

    Adds the metrics `margin`: the argument of the sigmoid; `implicit_accuracy`: 1, 0, or 1/2 where it is 0;
    and `clipped`: the share of the two ratios that is cut off.

    Attributes:
      beta: 0.1 is the released value.
      clip: of the ratio to the reference; 0.1 is the released value, for reduction "mean".
    """

    name = "d3po"
    images = 2

    beta: float = number(0.1, ABOVE_ZERO)
    clip: float = number(0.1, INSIDE_0_AND_1)

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def _needed(self) -> tuple[str, ...]:
        return ("reference_log_probability",)

    def loss_and_metrics(self, steps: Steps) -> LossAndMetrics:
        assert steps.reference_log_probability is not None
        log_ratio = self._reduce(steps.log_probability - steps.reference_log_probability, steps.size)
        # The logarithm of the clipped ratio, without an exponential that could overflow.
        lower, upper = math.log1p(-self.clip), math.log1p(self.clip)
        clipped = jnp.clip(log_ratio, lower, upper)
        margin = self.beta * steps.advantage * (clipped[:, 0] - clipped[:, 1])
        outside = (log_ratio < lower) | (log_ratio > upper)
        return jax.nn.softplus(-margin), {
            "margin": margin,
            "implicit_accuracy": 0.5 * (1 + jnp.sign(margin)),
            "clipped": outside.astype(margin.dtype).mean(1),
        }

    def notes(self, values_per_image: int) -> list[str]:
        bound = self.beta * (math.log1p(self.clip) - math.log1p(-self.clip))
        return [
            *describe_clip(self.name, self.clip, self.reduction, values_per_image),
            f"d3po: the argument of the sigmoid stays within +-{bound:.3g}, the loss between "
            f"{math.log1p(math.exp(-bound)):.4f} and {math.log1p(math.exp(bound)):.4f}: that it stays near "
            "0.693 is expected; look at implicit_accuracy",
        ]


POLICY_GRADIENTS: dict[str, type[PolicyGradient]] = {
    cls.name: cls for cls in (DDPO, DDPOScoreFunction, GRPO, DPOK, D3PO)
}


def get_policy_gradient(name: str, **arguments: object) -> PolicyGradient:
    """Makes the method of a name, with the given hyperparameters and defaults for the others.

    Raises:
      UserError: unknown name or argument, or a value out of range; the message gives the nearest valid name.
    """
    if name not in POLICY_GRADIENTS:
        raise UserError(spelling.unknown("config.policy_gradient.name", str(name), POLICY_GRADIENTS))
    cls = POLICY_GRADIENTS[name]
    return cls(**hyperparameters.check(dataclasses.fields(cls), name, arguments, "policy_gradient"))
