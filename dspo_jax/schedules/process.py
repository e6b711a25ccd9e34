"""What a forward process is, and the time weights of objectives, which follow from it.

A process noises an image x_0 to a level t, from which a network predicts. All weights follow from two
functions of the level: the signal-to-noise ratio SNR(t), and kappa(t), by how much an error of the prediction
is one of the image, |d x_0 / d prediction|. For the posterior step t -> s towards the image,

    w = kappa(t)^2 (SNR(s) - SNR(t)),    B = sqrt(SNR(t) / SNR(s)),

and the step's log-probability under a network, taken at the mean of q(x_s | x_t, x_0), is
-w/2 ||prediction - target||^2 + const. No weight depends on how signal and noise are scaled.

Axes in the annotations: `t`, those of levels; `image`, those of images, of which the axes of `t` are the
first.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Key, Num

from dspo_jax.errors import UserError

Array = jax.Array | np.ndarray

SchedulerConfig = Mapping[str, Any]
"""A scheduler_config.json by key."""


@runtime_checkable
class LevelDraw(Protocol):
    """A distribution of noise levels that a run trains at."""

    def __call__(self, key: Key[jax.Array, ""], shape: tuple[int, ...]) -> Num[jax.Array, "..."]:
        """Draws levels of a shape, of the dtype that the process takes."""

    def notes(self) -> list[str]:
        """Returns lines for the user before a run."""


class Process(abc.ABC):
    """A forward process, and what the network predicts under it; a pytree.

    Levels have axes that are the leading ones of the images (`[]`, `[B]` or `[B, P]`), and are broadcast over
    the others. Every method refuses levels of another dtype than the process has (UserError).

    Attributes:
      prediction_type: name of what the network predicts.
      level_dtype: of levels: int32 for timesteps, or float32.
    """

    prediction_type: str
    level_dtype: ClassVar[DTypeLike]

    @property
    def weight_unit(self) -> float:
        """A factor of `reward_weight` at all levels, which belongs to the scale of an objective."""
        return 1.0

    @property
    @abc.abstractmethod
    def num_train_timesteps(self) -> int:
        """T: levels that the network tells apart in `network_time`, and at most the steps of a sampler."""

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: SchedulerConfig) -> "Process":
        """Builds the process that a diffusers `scheduler_config.json` describes.

        Raises:
          UserError: a value is not supported; the message names the key and value.
        """

    @abc.abstractmethod
    def check_levels(self, t: ArrayLike) -> jax.Array:
        """Returns levels as an array.

        Raises:
          UserError: they are of another kind of process.
        """

    @abc.abstractmethod
    def scales(self, t: Num[ArrayLike, "*t"]) -> tuple[Float[jax.Array, "*t"], Float[jax.Array, "*t"]]:
        """Returns a, b of x_t = a x_0 + b noise, each of the shape of `t`."""

    @abc.abstractmethod
    def target(
        self, x0: Float[Array, "*image"], noise: Float[Array, "*image"], t: Num[ArrayLike, "..."]
    ) -> Float[jax.Array, "*image"]:
        """Returns the output of a perfect network at `t`, of the shape of `x0`."""

    @abc.abstractmethod
    def to_x0(
        self, prediction: Float[Array, "*image"], x_t: Float[Array, "*image"], t: Num[ArrayLike, "..."]
    ) -> Float[jax.Array, "*image"]:
        """Returns the clean image that `prediction` implies for `x_t`."""

    @abc.abstractmethod
    def to_epsilon(
        self, prediction: Float[Array, "*image"], x_t: Float[Array, "*image"], t: Num[ArrayLike, "..."]
    ) -> Float[jax.Array, "*image"]:
        """Returns the noise that `prediction` implies for `x_t`."""

    @abc.abstractmethod
    def snr(self, t: Num[ArrayLike, "*t"]) -> Float[jax.Array, "*t"]:
        """Returns the signal-to-noise ratio, of the shape of `t`."""

    @abc.abstractmethod
    def kappa(self, t: Num[ArrayLike, "*t"]) -> Float[jax.Array, "*t"]:
        """Returns |d x_0 / d prediction| at fixed x_t, of the shape of `t`."""

    @abc.abstractmethod
    def reverse_step(self, t: Num[ArrayLike, "*t"]) -> tuple[Num[jax.Array, "*t"], Num[jax.Array, "*t"]]:
        """Returns where the reverse step that leaves `t` begins and ends, each of the shape of `t`.

        It begins at `t`. But the step into x_0 has no variance and its weight diverges: it takes the place of
        the one before it, as in improved DDPM's released code for the log-variance.
        """

    @abc.abstractmethod
    def snr_ratio(
        self, begin: Num[ArrayLike, "*t"], end: Num[ArrayLike, "*t"]
    ) -> tuple[Float[jax.Array, "*t"], Float[jax.Array, "*t"]]:
        """Returns SNR(begin) / SNR(end) of a `reverse_step`, and 1 less that.

        Each process has its own form, in which nearly equal ratios do not cancel in float32.
        """

    @abc.abstractmethod
    def network_time(self, t: Num[ArrayLike, "*t"]) -> Num[jax.Array, "*t"]:
        """Returns what the network is told of a level, which is what samplers step over."""

    @abc.abstractmethod
    def level_at(self, time: Num[ArrayLike, "*t"]) -> Num[jax.Array, "*t"]:
        """Returns the level of a `network_time`."""

    @abc.abstractmethod
    def level_between(self, part: ArrayLike, whole: float) -> np.ndarray:
        """Returns the level at part / whole of the way from the image to the noise, `part` below `whole`."""

    @abc.abstractmethod
    def make_draw(self, first: int, last: int | None, keys: Mapping[str, Any]) -> LevelDraw:
        """Returns the distribution of levels that a config asks for.

        Args:
          first, last: `config.timesteps`.
          keys: `config.levels`, None where nothing was set.

        Raises:
          UserError: a key that is of another kind of process, or its value.
        """

    @abc.abstractmethod
    def is_same(self, other: "Process") -> bool:
        """Whether images are noised alike, whatever is predicted; of concrete values."""

    def add_noise(
        self, x0: Float[Array, "*image"], noise: Float[Array, "*image"], t: Num[ArrayLike, "..."]
    ) -> Float[jax.Array, "*image"]:
        """Returns x_t, of the shape of `x0`."""
        signal, sigma = self.scales_like(t, x0)
        return signal * x0 + sigma * noise

    def scales_like(self, t: ArrayLike, like: Array) -> tuple[jax.Array, jax.Array]:
        """Returns `scales`, shaped to broadcast against `like`.

        Raises:
          UserError: the axes of `t` are not the leading ones of `like`.
        """
        t = self.check_levels(t)
        if t.shape != like.shape[: t.ndim]:
            raise UserError(
                f"timesteps of shape {t.shape} do not match the leading axes of images {like.shape}"
            )
        signal, sigma = (each.reshape(t.shape + (1,) * (like.ndim - t.ndim)) for each in self.scales(t))
        return signal, sigma

    def reward_weight(self, t: Num[ArrayLike, "*t"]) -> Float[jax.Array, "*t"]:
        """Returns the papers' time weight w(t) of the implicit reward, of the shape of `t`.

        Under the posterior variance, log p(x_s | x_t) of the reverse step that leaves t is -w(t)/2 times the
        squared error of the prediction, see the head of this file. Of DDPM's steps and the noise as
        prediction that is

            w(t) = beta_t / ((1 - abar_{t-1}) alpha_t)

        (DSPO Eq. 22-23, where the step is called t + 1 -> t. Eq. 11 prints another factor alpha_t: it comes
        from a mean coefficient sqrt(alpha_t / alpha_{t+1}) in Eq. 2 where DDPM has 1 / sqrt(alpha_{t+1}).)
        For v prediction it is abar_t w(t), finite where abar_t is 0. Of rectified flow it is
        (t - s)(t + s - 2 t s) / s^2.

        For a step into x_0 see `reverse_step`.
        """
        begin, end = self.reverse_step(t)
        _, lost = self.snr_ratio(begin, end)
        return self.weight_unit * jnp.square(self.kappa(begin)) * self.snr(end) * lost

    def score_ratio(self, t: Num[ArrayLike, "*t"]) -> Float[jax.Array, "*t"]:
        """Returns DSPO's B(t), of the shape of `t`: weight of the data score against the preference score.

        The policy-to-data score difference is -(e - y) / sqrt(1 - abar_{t-1}) (Eq. 27), the gradient of the
        implicit reward -lam c (e - r) with c = beta_t / (sigma^2 sqrt(alpha_t (1 - abar_t))) (Eq. 26 with the
        1 / sigma^2 of the Gaussian, printed there as 1 / (2 sigma^2)). Their ratio is

            B(t) = 1 / (c sqrt(1 - abar_{t-1})) = sqrt(alpha_t (1 - abar_{t-1}) / (1 - abar_t)),

        the square root of SNR(t) / SNR(s). Eq. 28 prints its inverse times omega(t). B vanishes where SNR(t)
        does: x_t tells nothing of x_0 there.
        """
        kept, _ = self.snr_ratio(*self.reverse_step(t))
        return jnp.sqrt(kept)

    def denoising_weight(self, t: Num[ArrayLike, "*t"]) -> Float[jax.Array, "*t"]:
        """Returns DSPO's weight A(t) B(t)^2 of ||e - y||^2 without a preference, of the shape of `t`.

        A(t) is `reward_weight` and B(t) `score_ratio`, so that it is kappa(t)^2 SNR(t) (1 - B(t)^2); for eps
        beta_t / (1 - abar_t).
        """
        return self.reward_weight(t) * jnp.square(self.score_ratio(t))

    def epsilon_weight(self, t: Num[ArrayLike, "*t"]) -> Float[jax.Array, "*t"]:
        """Returns the weight that makes the prediction's squared error one of the noise.

        It is kappa^2 SNR: 1 for eps, abar for v, (1 - sigma)^2 for the velocity of rectified flow.
        """
        return jnp.square(self.kappa(t)) * self.snr(t)

    def min_snr_weight(self, t: Num[ArrayLike, "*t"], gamma: float) -> Float[jax.Array, "*t"]:
        """Returns the Min-SNR-gamma weight of the prediction's squared error, of the shape of `t`.

        It is min(SNR, gamma) for the error of x_0 (Hang et al. 2023, arXiv 2303.09556): what a constant
        weight of eps comes to, but no more than gamma. So it is kappa^2 min(SNR, gamma) for that of the
        prediction: min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v, as in diffusers'
        training scripts (--snr_gamma). At zero SNR the error of x_0 counts for nothing, and so does that
        of v.
        """
        return jnp.square(self.kappa(t)) * jnp.minimum(self.snr(t), gamma)
