"""The network of a reward with its weights, which scoring files and training by gradients share."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, PyTree
from PIL import Image

from dspo_jax.models.model import Params
from dspo_jax.rewards.reward import Reward
from dspo_jax.rewards.scorer import Scorer


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Preprocessing of images for a network, in two forms that differ by rounding.

    Attributes:
      on_host: as the released code does it: (an RGB or RGBA picture, S) -> pixels [S, S, 3] float32.
      on_device: differentiable: (pixels [B, H, W, 3] float32 in [0, 1], S) -> pixels [B, S, S, 3] float32.
    """

    on_host: Callable[[Image.Image, int], np.ndarray]
    on_device: Callable[[Float32[Array, "B H W 3"], int], Float32[Array, "B S S 3"]]


@dataclasses.dataclass(frozen=True, eq=False)
class RewardNetwork:
    """A reward model's network, weights and inputs.

    Attributes:
      name: what tables call the reward.
      version: which weights these are, as tables print it.
      params: float32 weights.
      apply: pure: (params, pixels [B, S, S, 3] float32 as `preprocess` returns them, tokens) -> scores [B].
      preprocess: an image to pixels.
      size: S, the edge of the images that the network takes.
      tokenize: N prompts -> tokens: arrays with a leading axis N.
    """

    name: str
    version: str
    params: Params
    apply: Callable[[Params, jax.Array, PyTree], Float[Array, " B"]]
    preprocess: Preprocess
    size: int
    tokenize: Callable[[Sequence[str]], PyTree]

    def make_reward(self, batch_size: int) -> Reward:
        """Makes the reward that scores image files, `batch_size` images in one call of the network.

        Weights that are on the devices already are used there, see `Scorer`.
        """
        transform, size = self.preprocess.on_host, self.size  # `prepare` must not keep the weights

        def prepare(image: Image.Image) -> np.ndarray:
            return transform(image, size)

        scorer = Scorer(self.apply, self.params, prepare, self.tokenize, batch_size=batch_size)
        return Reward(self.name, self.version, scorer, reads_alpha=True)


def ignore_prompts(prompts: Sequence[str]) -> np.ndarray:
    """Returns the tokens [N] int32, all zero, of a reward that reads no prompt."""
    return np.zeros(len(prompts), np.int32)
