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
from jaxtyping import Float, Integer, Key, Num

from dspo_jax import schema, spelling
from dspo_jax.errors import UserError
from dspo_jax.json_files import shown
from dspo_jax.schedules.process import Array, LevelDraw, Process, SchedulerConfig
from dspo_jax.schema import flag, integer, number

PREDICTION_TYPES = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("scaled_linear", "linear")

_KEYS: dict[str, schema.Key] = {
    "num_train_timesteps": integer(high=100_000),
    "beta_start": number(),
    "beta_end": number(),
    "beta_schedule": schema.Key(schema.REQUIRED, str),
    "prediction_type": schema.Key("epsilon", str),
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


@dataclasses.dataclass(frozen=True)
class UniformTimesteps:
    """Whole timesteps, each as likely as the others.

    Attributes:
      first, last: the range, both included.
    """

    first: int
    last: int

    def __call__(self, key: Key[jax.Array, ""], shape: tuple[int, ...]) -> Integer[jax.Array, "..."]:
        """Draws int32 timesteps of a shape."""
        return jax.random.randint(key, shape, self.first, self.last + 1)

    def notes(self) -> list[str]:
        """Returns nothing: it is the default of all trainers."""
        return []


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule(Process):
    """A discrete variance-preserving noise schedule and what the network predicts under it.

    Levels are integer timesteps. Results are float32; a `t` beyond the last timestep gives NaN.

    Attributes:
      betas: [T] float32, the variance added at each step.
      alphas_cumprod: [T] float32, abar. Both are computed in float64 and rounded once.
      prediction_type: "epsilon", or "v_prediction" for v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans &
        Ho 2022).
    """

    level_dtype = jnp.int32

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

    def check_levels(self, t: ArrayLike) -> jax.Array:
        """Returns timesteps as an array.

        Raises:
          UserError: they are not integers.
        """
        t = jnp.asarray(t)
        if not jnp.issubdtype(t.dtype, jnp.integer):
            raise UserError(
                f"timesteps of dtype {t.dtype}: this model's are integers from 0 to "
                f"{self.num_train_timesteps - 1}; levels between 0 and 1 are of rectified flow"
            )
        return t

    def scales(self, t: Num[ArrayLike, "*t"]) -> tuple[Float[jax.Array, "*t"], Float[jax.Array, "*t"]]:
        """Returns sqrt(abar_t) and sqrt(1 - abar_t), each of the shape of `t`."""
        alpha_bar = self._alpha_bar(t)
        return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)

    def target(
        self, x0: Float[Array, "*image"], noise: Float[Array, "*image"], t: Num[ArrayLike, "..."]
    ) -> Float[jax.Array, "*image"]:
        """Returns the regression target of the network at `t`: the noise, or v; of the shape of `x0`."""
        if self.prediction_type == "epsilon":
            return jnp.asarray(noise, jnp.float32)
        signal, sigma = self.scales_like(t, x0)
        return signal * noise - sigma * x0

    def to_x0(
        self, prediction: Float[Array, "*image"], x_t: Float[Array, "*image"], t: Num[ArrayLike, "..."]
    ) -> Float[jax.Array, "*image"]:
        """Returns the clean image that `prediction` implies for `x_t`."""
        signal, sigma = self.scales_like(t, x_t)
        if self.prediction_type == "epsilon":
            return jnp.subtract(x_t, sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def to_epsilon(
        self, prediction: Float[Array, "*image"], x_t: Float[Array, "*image"], t: Num[ArrayLike, "..."]
    ) -> Float[jax.Array, "*image"]:
        """Returns the noise that `prediction` implies for `x_t`."""
        if self.prediction_type == "epsilon":
            return jnp.asarray(prediction, jnp.float32)
        signal, sigma = self.scales_like(t, x_t)
        return signal * prediction + sigma * x_t

    def snr(self, t: Num[ArrayLike, "*t"]) -> Float[jax.Array, "*t"]:
        """Returns the signal-to-noise ratio abar_t / (1 - abar_t), of the shape of `t`."""
        alpha_bar = self._alpha_bar(t)
        return alpha_bar / (1 - alpha_bar)

    def kappa(self, t: Num[ArrayLike, "*t"]) -> Float[jax.Array, "*t"]:
        """Returns |d x_0 / d prediction|: sqrt((1 - abar) / abar) for eps, sqrt(1 - abar) for v."""
        signal, sigma = self.scales(t)
        return sigma / signal if self.prediction_type == "epsilon" else sigma

    def reverse_step(self, t: Num[ArrayLike, "*t"]) -> tuple[Num[jax.Array, "*t"], Num[jax.Array, "*t"]]:
        """Returns t and t - 1; of t = 0, whose step ends at x_0, 1 and 0."""
        t = jnp.maximum(self.check_levels(t), 1)
        return t, t - 1

    def snr_ratio(
        self, begin: Num[ArrayLike, "*t"], end: Num[ArrayLike, "*t"]
    ) -> tuple[Float[jax.Array, "*t"], Float[jax.Array, "*t"]]:
        """Returns alpha_t (1 - abar_{t-1}) / (1 - abar_t) and beta_t / (1 - abar_t)."""
        beta, noise = jnp.take(self.betas, begin), 1 - self._alpha_bar(begin)
        return (1 - beta) * (1 - self._alpha_bar(end)) / noise, beta / noise

    def network_time(self, t: Num[ArrayLike, "*t"]) -> Num[jax.Array, "*t"]:
        """Returns the timestep itself."""
        return self.check_levels(t)

    def level_at(self, time: Num[ArrayLike, "*t"]) -> Num[jax.Array, "*t"]:
        """Returns the timestep itself; a sampler that steps over others between them has no levels."""
        return self.check_levels(time)

    def level_between(self, part: ArrayLike, whole: float) -> np.ndarray:
        """Returns the timestep, int32, at part / whole of all of them; rounded down."""
        return np.asarray(np.asarray(part) * self.num_train_timesteps / whole).astype(np.int32)

    def make_draw(self, first: int, last: int | None, keys: Mapping[str, Any]) -> LevelDraw:
        """Returns the timesteps from `first` to `last`, by default the last of all.

        Raises:
          UserError: they are out of order or of range, or a key of `config.levels` is set.
        """
        for key, value in keys.items():
            if value is not None:
                raise UserError(
                    f"config.levels.{key} = {value!r}: is of models of rectified flow; this one's timesteps "
                    "are drawn evenly, from config.timesteps.first to config.timesteps.last"
                )
        end = self.num_train_timesteps - 1
        last = end if last is None else last
        if not 0 <= first <= last <= end:
            raise UserError(
                f"config.timesteps.first = {first} and config.timesteps.last = {last}: must be in order and "
                f"between 0 and {end}"
            )
        return UniformTimesteps(first, last)

    def is_same(self, other: Process) -> bool:
        """Whether abar is the same."""
        return isinstance(other, Schedule) and np.array_equal(self.alphas_cumprod, other.alphas_cumprod)

    def _alpha_bar(self, t: ArrayLike) -> jax.Array:
        return jnp.take(self.alphas_cumprod, self.check_levels(t))


def _rescale_to_zero_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(abar) [T] so that its last value is 0 and its first is kept (Algorithm 1)."""
    signal = np.sqrt(alphas_cumprod)
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
