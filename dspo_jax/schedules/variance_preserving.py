"""The forward diffusion process: noise schedule, signal-to-noise ratio, and eps / v / x0 conversions.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, with abar the cumulative product of alpha = 1 - beta (DDPM, Ho
et al. 2020, Eq. 4). A timestep is the index into these arrays, 0 <= t < T: index t is step t + 1 of the
papers, whose steps start at 1.

Axes in the annotations: `steps`, the T timesteps of the process; `t`, those of a timestep argument; `image`,
those of images, of which the axes of `t` are the first.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Float32, Integer

from dspo_jax import schema, spelling
from dspo_jax.errors import UserError
from dspo_jax.json_files import shown
from dspo_jax.schema import Key, flag, integer, number

Array = jax.Array | np.ndarray

PREDICTION_TYPES = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("scaled_linear", "linear")

_KEYS: dict[str, Key] = {
    "num_train_timesteps": integer(high=100_000),
    "beta_start": number(),
    "beta_end": number(),
    "beta_schedule": Key(schema.REQUIRED, str),
    "prediction_type": Key("epsilon", str),
    "rescale_betas_zero_snr": flag(False, null=True),
}
# Defaults of diffusers' scheduler classes, which disagree: (beta_start, beta_end, beta_schedule).
_BETAS: dict[tuple[float, float, str], tuple[str, ...]] = {
    (0.0001, 0.02, "linear"): (
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ),
    (0.00085, 0.012, "linear"): (
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
    ),
}
_CONSISTENCY = ("LCMScheduler", "TCDScheduler")


SchedulerConfig = Mapping[str, Any]
"""A scheduler_config.json by key."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete variance-preserving noise schedule and what the network predicts under it.

    Every method takes integer `t` whose axes are the leading axes of the images (`[]`, `[B]` or `[B, P]`) and
    broadcasts over the remaining ones. Results are float32; a `t` beyond the last timestep gives NaN.

    Attributes:
      betas: [T] float32, the variance added at each step.
      alphas_cumprod: [T] float32, abar. Both are computed in float64 and rounded once.
      prediction_type: "epsilon", or "v_prediction" for v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans &
        Ho 2022).
    """

    betas: Float[Array, " steps"]
    alphas_cumprod: Float[Array, " steps"]
    prediction_type: str = dataclasses.field(default="epsilon", metadata={"static": True})

    @classmethod
    def scaled_linear(
        cls,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
    ) -> "Schedule":
        """Makes Stable Diffusion's schedule: sqrt(beta) runs linearly from its start to its end.

        Raises:
          UserError: A value is out of range; the message names it.
        """
        return cls.from_config(
            {
                "beta_schedule": "scaled_linear",
                "beta_start": beta_start,
                "beta_end": beta_end,
                "num_train_timesteps": num_train_timesteps,
                "prediction_type": prediction_type,
            }
        )

    @classmethod
    def from_config(cls, config: SchedulerConfig) -> "Schedule":
        """Builds the forward process that a diffusers `scheduler_config.json` describes.

        Keys that only concern a sampler (`timestep_spacing`, `steps_offset`, ...) are not read here. Absent
        ones have the defaults of the `_class_name` in diffusers. With `rescale_betas_zero_snr`, abar is 0 at
        the last timestep (Lin et al. 2023, arXiv 2305.08891, Algorithm 1), which needs v prediction: from
        noise alone a network that predicts the noise says nothing of the image.

        Args:
          config: The parsed file.

        Raises:
          UserError: A key is missing and the class is not known, or a value is not supported; the message
            names the key and value.
        """
        class_name = config.get("_class_name")
        if class_name in _CONSISTENCY:
            raise UserError(
                f"scheduler config: _class_name = {class_name!r}: a consistency model (LCM, TCD), which "
                "steps from any timestep to the image, is neither trained nor drawn here; if the folder has "
                "an ordinary model, name its scheduler, for example DDIMScheduler"
            )
        for (start, end, kind), classes in _BETAS.items():
            if class_name in classes:
                defaults = {"beta_schedule": kind, "beta_start": start, "beta_end": end}
                config = {**defaults, "num_train_timesteps": 1000, **config}
        schema.check(f"scheduler config (_class_name = {shown(class_name)})", config, _KEYS)
        if config.get("trained_betas") is not None:
            raise UserError(
                "scheduler config: trained_betas is set: explicit betas are not supported; "
                "set it to null and give beta_schedule, beta_start and beta_end"
            )
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(
                spelling.unknown("scheduler config: prediction_type", str(prediction_type), PREDICTION_TYPES)
            )
        zero_snr = bool(config.get("rescale_betas_zero_snr"))
        if zero_snr and prediction_type == "epsilon":
            raise UserError(
                "scheduler config: rescale_betas_zero_snr = true with prediction_type = 'epsilon': the last "
                "timestep is noise alone, from which the noise tells nothing of the image; set one to false "
                "or the other to 'v_prediction', as the model was trained"
            )
        beta_schedule = config["beta_schedule"]
        if beta_schedule not in BETA_SCHEDULES:
            raise UserError(
                spelling.unknown("scheduler config: beta_schedule", str(beta_schedule), BETA_SCHEDULES)
            )

        steps, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
        if not 0 < start <= end < 1:
            raise UserError(
                f"scheduler config: beta_start = {start!r}, beta_end = {end!r}: must satisfy "
                "0 < beta_start <= beta_end < 1"
            )
        if beta_schedule == "linear":
            betas = np.linspace(start, end, steps, dtype=np.float64)
        else:
            betas = np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
        alphas_cumprod = np.cumprod(1 - betas)
        if zero_snr:
            if steps == 1:
                raise UserError(
                    "scheduler config: rescale_betas_zero_snr = true: needs num_train_timesteps of at least 2"
                )
            alphas_cumprod = _rescale_to_zero_snr(alphas_cumprod)
            betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        alphas_cumprod = alphas_cumprod.astype(np.float32)
        if not alphas_cumprod[: steps - zero_snr].all():
            raise UserError(
                f"scheduler config: beta_end = {end}, num_train_timesteps = {steps}: nothing is left of the "
                "image before the last timestep, and its noise level is infinite; lower one of them"
            )
        return cls(betas.astype(np.float32), alphas_cumprod, prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of timesteps."""
        return self.alphas_cumprod.shape[0]

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last timestep is noise alone; of a schedule of concrete values."""
        return not self.alphas_cumprod[-1]

    def add_noise(
        self, x0: Float[Array, "*image"], noise: Float[Array, "*image"], t: Integer[ArrayLike, "..."]
    ) -> Float32[jax.Array, "*image"]:
        """Returns x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, of the shape of `x0`."""
        signal, sigma = self._scales(t, x0)
        return signal * x0 + sigma * noise

    def target(
        self, x0: Float[Array, "*image"], noise: Float[Array, "*image"], t: Integer[ArrayLike, "..."]
    ) -> Float32[jax.Array, "*image"]:
        """Returns the regression target of the network at `t`: the noise, or v; of the shape of `x0`."""
        if self.prediction_type == "epsilon":
            return jnp.asarray(noise, jnp.float32)
        signal, sigma = self._scales(t, x0)
        return signal * noise - sigma * x0

    def to_x0(
        self, prediction: Float[Array, "*image"], x_t: Float[Array, "*image"], t: Integer[ArrayLike, "..."]
    ) -> Float32[jax.Array, "*image"]:
        """Returns the clean image that `prediction` implies for `x_t`."""
        signal, sigma = self._scales(t, x_t)
        if self.prediction_type == "epsilon":
            return jnp.subtract(x_t, sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def to_epsilon(
        self, prediction: Float[Array, "*image"], x_t: Float[Array, "*image"], t: Integer[ArrayLike, "..."]
    ) -> Float32[jax.Array, "*image"]:
        """Returns the noise that `prediction` implies for `x_t`."""
        if self.prediction_type == "epsilon":
            return jnp.asarray(prediction, jnp.float32)
        signal, sigma = self._scales(t, x_t)
        return signal * prediction + sigma * x_t

    def snr(self, t: Integer[ArrayLike, "*t"]) -> Float32[jax.Array, "*t"]:
        """Returns the signal-to-noise ratio abar_t / (1 - abar_t), of the shape of `t`."""
        alpha_bar = jnp.take(self.alphas_cumprod, t)
        return alpha_bar / (1 - alpha_bar)

    def min_snr_weight(self, t: Integer[ArrayLike, "*t"], gamma: float) -> Float32[jax.Array, "*t"]:
        """Returns the Min-SNR-gamma weight of the prediction's squared error, of the shape of `t`.

        It is min(SNR, gamma) for the error of x_0 (Hang et al. 2023, arXiv 2303.09556): what a constant
        weight of eps comes to, but no more than gamma. An error of x_0 is one of eps divided by sqrt(SNR),
        and one of v times sqrt(1 - abar) = 1 / sqrt(SNR + 1), so this is min(SNR, gamma) / SNR for eps and
        min(SNR, gamma) / (SNR + 1) for v, as in diffusers' training scripts (--snr_gamma). At zero SNR the
        error of x_0 counts for nothing, and so does that of v.
        """
        snr = self.snr(t)
        return jnp.minimum(snr, gamma) / (snr if self.prediction_type == "epsilon" else snr + 1)

    def reward_weight(self, t: Integer[ArrayLike, "*t"]) -> Float32[jax.Array, "*t"]:
        """Returns the papers' time weight of the implicit reward, of the shape of `t`.

        Under the posterior variance, log p(x_{t-1} | x_t) of the reverse step that leaves timestep t, taken
        at the mean of q(x_{t-1} | x_t, x_0), is -1/2 w(t) ||eps_theta - eps||^2 + const with

            w(t) = beta_t / ((1 - abar_{t-1}) alpha_t)

        (DSPO Eq. 22-23, where the step is called t + 1 -> t. Eq. 11 prints another factor alpha_t: it comes
        from a mean coefficient sqrt(alpha_t / alpha_{t+1}) in Eq. 2 where DDPM has 1 / sqrt(alpha_{t+1}).) An
        error of v is an error of eps divided by sqrt(abar_t), so for v prediction the weight is abar_t w(t),
        which is abar_{t-1} beta_t / (1 - abar_{t-1}) and finite where abar_t is 0.

        The step into x_0 (t = 0) has no variance and its weight diverges; it takes the weight of t = 1, as
        improved DDPM's released code does for the log-variance.
        """
        before, _, beta = self._step(t)
        weight = beta / (1 - before)
        return weight / (1 - beta) if self.prediction_type == "epsilon" else before * weight

    def score_ratio(self, t: Integer[ArrayLike, "*t"]) -> Float32[jax.Array, "*t"]:
        """Returns DSPO's B(t), of the shape of `t`: weight of the data score against the preference score.

        The policy-to-data score difference is -(e - y) / sqrt(1 - abar_{t-1}) (Eq. 27), the gradient of the
        implicit reward -lam c (e - r) with c = beta_t / (sigma^2 sqrt(alpha_t (1 - abar_t))) (Eq. 26 with the
        1 / sigma^2 of the Gaussian, printed there as 1 / (2 sigma^2)). Their ratio is

            B(t) = 1 / (c sqrt(1 - abar_{t-1})) = sqrt(alpha_t (1 - abar_{t-1}) / (1 - abar_t)).

        Eq. 28 prints its inverse times omega(t). t = 0, where B vanishes, takes the value of t = 1, as in
        `reward_weight`. B vanishes where abar_t is 0, too: x_t tells nothing of x_0 there.
        """
        before, at, beta = self._step(t)
        return jnp.sqrt((1 - beta) * (1 - before) / (1 - at))

    def denoising_weight(self, t: Integer[ArrayLike, "*t"]) -> Float32[jax.Array, "*t"]:
        """Returns DSPO's weight A(t) B(t)^2 of ||e - y||^2 without a preference, of the shape of `t`.

        A(t) is `reward_weight` and B(t) `score_ratio`; for eps the product is beta_t / (1 - abar_t).
        """
        return self.reward_weight(t) * jnp.square(self.score_ratio(t))

    def _scales(self, t: ArrayLike, like: Array) -> tuple[jax.Array, jax.Array]:
        """Returns sqrt(abar_t) and sqrt(1 - abar_t), shaped to broadcast against `like`."""
        t = jnp.asarray(t)
        if t.shape != like.shape[: t.ndim]:
            raise UserError(
                f"timesteps of shape {t.shape} do not match the leading axes of images {like.shape}"
            )
        alpha_bar = jnp.take(self.alphas_cumprod, t).reshape(t.shape + (1,) * (like.ndim - t.ndim))
        return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)

    def _step(self, t: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns abar before, abar at, and beta of the reverse step that leaves `t`; t = 0 is taken as 1."""
        t = jnp.maximum(jnp.asarray(t), 1)
        return jnp.take(self.alphas_cumprod, t - 1), jnp.take(self.alphas_cumprod, t), jnp.take(self.betas, t)


def _rescale_to_zero_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(abar) [T] so that its last value is 0 and its first is kept (Algorithm 1)."""
    signal = np.sqrt(alphas_cumprod)
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
