"""Methods that train by the gradient of a reward through the sampler, found by name.

A method says which of the sampler's steps pass a gradient to the network and what is added to the loss
-reward; it holds no network and no loop (`training/losses/reward_gradient.py`). Step i of n is the network's
call i, from noise to image.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.limits import Limit
from dspo_jax.objectives import hyperparameters
from dspo_jax.objectives.hyperparameters import ABOVE_ZERO, choice, number

_COUNT = Limit("a whole number of at least 1", lambda value: value >= 1 and value == int(value))
_SHARE = Limit("at least 0 and below 1", lambda value: 0 <= value < 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardGradient:
    """All steps: DRaFT (Clark et al. 2024); and the base class of the other methods.

    Attributes:
      name: `reward_gradient.name` of a config.
      renoised: further images that are made of each result by noising it for one step (DRaFT-LV).
      beta: weight of the squared difference between the policy's and the reference's predictions, the mean
        over a latent's numbers and over the steps that pass a gradient.
    """

    name: ClassVar[str] = "draft"
    renoised: ClassVar[int] = 0

    beta: float = number(0.0)

    def __post_init__(self) -> None:
        """Refuses a value outside its field's limit, by the key of the config."""
        hyperparameters.check(dataclasses.fields(self), self.name, self.hyperparameters, "reward_gradient")

    @property
    def hyperparameters(self) -> dict[str, object]:
        """Every field with its value, defaults included."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen denoiser is run."""
        return self.beta > 0

    def attached(self, calls: int, key: Key[Array, ""]) -> Bool[Array, " n"]:
        """Chooses the steps that pass a gradient to the network.

        Args:
          calls: n, steps of the sampler.
          key: of the update, for methods that draw.
        """
        del key
        return jnp.ones(calls, bool)

    def loss(self, rewards: Float[Array, " b"]) -> Float[Array, " b"]:
        """Returns the loss of images by their rewards, in units of the reward's divisor."""
        return -rewards

    def mean_attached(self, calls: int) -> float:
        """Returns how many steps pass a gradient on average, for estimates of cost."""
        return float(calls)

    def mean_open_trips(self, calls: int) -> float:
        """Returns how often, on average, the loop runs whose length is an argument: the backward pass."""
        return self.mean_attached(calls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DRaFTK(RewardGradient):
    """The last K steps: DRaFT-K (Clark et al. 2024).

    The paper finds K = 1 best for the compute, and that the gradient's norm explodes with K.

    Attributes:
      k: K, at most the sampler's steps.
    """

    name = "draft_k"

    k: float = number(1, _COUNT)

    def attached(self, calls: int, key: Key[Array, ""]) -> Bool[Array, " n"]:
        """See `RewardGradient.attached`."""
        del key
        return jnp.arange(calls) >= calls - int(self.k)

    def mean_attached(self, calls: int) -> float:
        """See `RewardGradient.mean_attached`."""
        return min(float(calls), self.k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DRaFTLV(DRaFTK):
    """DRaFT-LV: the last step, and once more from the result noised for that step; gradients are summed.

    It has less variance than DRaFT-1 for little compute (Clark et al. 2024, who take two images in all). It
    is no unbiased estimate of DRaFT-1: a noised result is not the chain's state.
    """

    name = "draft_lv"
    renoised = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DRaFTPlus(DRaFTK):
    """DRaFT-K held near the reference: DRaFT+ (NeMo-Aligner), whose released code takes beta 1 and K 1.

    Its divergence is of the predictions, without the weight c^2 / (2 s^2) that a KL of the steps has.
    """

    name = "draft_plus"

    beta: float = number(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignProp(RewardGradient):
    """Truncation at random (Prabhudesai et al. 2023).

    Attributes:
      draw: "once": the last K steps, K uniform in 1 .. n, drawn once an update, as the paper prints; the
        release of October 2024 draws from 1 .. n - 1, and never trains all steps. Or "each_step": step i
        passes a gradient with probability (i + 1) / (n + 1), drawn by itself, with gaps, as the release
        before it and TRL's copy do.
    """

    name = "alignprop"

    draw: str = choice("once", "each_step")

    def attached(self, calls: int, key: Key[Array, ""]) -> Bool[Array, " n"]:
        """See `RewardGradient.attached`."""
        steps = jnp.arange(calls)
        if self.draw == "once":
            return steps >= jax.random.randint(key, (), 0, calls)
        return steps >= jax.random.randint(key, (calls,), 0, calls + 1)

    def mean_attached(self, calls: int) -> float:
        """See `RewardGradient.mean_attached`."""
        return (calls + 1) / 2 if self.draw == "once" else calls / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReFL(RewardGradient):
    """The image expected from one late state, which a random step gives: ReFL (Xu et al. 2023, ImageReward).

    The loss is weight * max(0, threshold - reward), without the pretraining loss that the paper prints and
    the release lacks.

    Attributes:
      first: share of the steps before which none is drawn; the release draws from the last 10 of 40.
      threshold: reward, over its divisor, from which nothing is gained; 2 in the release.
      weight: of the loss; 1e-3 in the release. It matters beside a weight decay and Adam's epsilon alone.
    """

    name = "refl"

    first: float = number(0.75, _SHARE)
    threshold: float = number(2.0)
    weight: float = number(1e-3, ABOVE_ZERO)

    def attached(self, calls: int, key: Key[Array, ""]) -> Bool[Array, " n"]:
        """Chooses the one step whose prediction gives the image."""
        return jnp.arange(calls) == jax.random.randint(key, (), int(self.first * calls), calls)

    def loss(self, rewards: Float[Array, " b"]) -> Float[Array, " b"]:
        """See `RewardGradient.loss`."""
        return self.weight * jnp.maximum(0.0, self.threshold - rewards)

    def mean_attached(self, calls: int) -> float:
        """See `RewardGradient.mean_attached`."""
        del calls
        return 1.0

    def mean_open_trips(self, calls: int) -> float:
        """See `RewardGradient.mean_open_trips`; here it is the way to the attached step."""
        return (int(self.first * calls) + calls - 1) / 2


REWARD_GRADIENTS: dict[str, type[RewardGradient]] = {
    cls.name: cls for cls in (RewardGradient, DRaFTK, DRaFTLV, DRaFTPlus, AlignProp, ReFL)
}


def get_reward_gradient(name: str, **arguments: object) -> RewardGradient:
    """Makes the method of a name, with the given hyperparameters and defaults for the others.

    Raises:
      UserError: an unknown name or argument, or a value out of range; names the nearest valid one.
    """
    if name not in REWARD_GRADIENTS:
        raise UserError(spelling.unknown("config.reward_gradient.name", str(name), REWARD_GRADIENTS))
    cls = REWARD_GRADIENTS[name]
    return cls(**hyperparameters.check(dataclasses.fields(cls), name, arguments, "reward_gradient"))
