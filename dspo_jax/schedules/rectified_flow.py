"""Rectified flow: a straight line from the image to the noise, whose velocity the network predicts.

x_sigma = (1 - sigma) x_0 + sigma eps, v = eps - x_0 (Esser et al. 2024, arXiv 2403.03206; Liu et al. 2023).
The noise level sigma is 0 at the image and 1 at the noise. It is float32 wherever it goes: bfloat16 makes
0.998 a 1. The network is told 1000 sigma.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from dspo_jax import schema
from dspo_jax.errors import UserError
from dspo_jax.json_files import shown
from dspo_jax.schedules.process import Array, Process, SchedulerConfig
from dspo_jax.schedules.sigma_draws import SigmaDraw, make_sigma_draw
from dspo_jax.schema import flag, integer, number

# diffusers' class -> the key that it calls the shift.
_SHIFT_KEYS = {
    "FlowMatchEulerDiscreteScheduler": "shift",
    "FlowMatchHeunDiscreteScheduler": "shift",
    "DPMSolverMultistepScheduler": "flow_shift",
}
_KEYS: dict[str, schema.Key] = {
    "num_train_timesteps": integer(1000, high=100_000),
    "shift": number(1.0, low=1e-3, high=1e3),
    "flow_shift": number(1.0, low=1e-3, high=1e3, null=True),
    "prediction_type": schema.Key("flow_prediction", str),
    "use_flow_sigmas": flag(False, null=True),
}
# Keys that change the levels of sampling, or the direction of time, with what leaves them as they are.
_UNCHANGED: dict[str, tuple[object, ...]] = {
    "use_dynamic_shifting": (False, None),
    "shift_terminal": (None,),
    "invert_sigmas": (False, None),
    "stochastic_sampling": (False, None),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RectifiedFlow(Process):
    """Rectified flow, whose levels are float32 sigma from 0 to 1.

    Results are float32, or of the dtype of sigma where that is float64.

    Attributes:
      num_steps: T, the steps of equal size in sigma that the time weights are taken of.
      shift: a of sigma' = a sigma / (1 + (a - 1) sigma), of the levels that samplers call; what is trained is
        drawn as `make_draw` says.
      prediction_type: "flow_prediction", for v = eps - x_0.
    """

    level_dtype = jnp.float32

    num_steps: int = dataclasses.field(default=1000, metadata={"static": True})
    shift: float = dataclasses.field(default=1.0, metadata={"static": True})
    prediction_type: str = dataclasses.field(default="flow_prediction", metadata={"static": True})

    @classmethod
    def from_config(cls, config: SchedulerConfig) -> "RectifiedFlow":
        """Builds the process that a diffusers `scheduler_config.json` of flow matching describes.

        Args:
          config: The parsed file, of FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, or
            DPMSolverMultistepScheduler with `use_flow_sigmas`.

        Raises:
          UserError: Another class, or a value that is not supported; the message names key and value.
        """
        class_name = config.get("_class_name")
        if class_name not in _SHIFT_KEYS:
            raise UserError(
                f"scheduler config: _class_name = {shown(class_name)}: is not of flow matching; allowed: "
                f"{', '.join(_SHIFT_KEYS)}"
            )
        schema.check(f"scheduler config (_class_name = {shown(class_name)})", config, _KEYS)
        for key, allowed in _UNCHANGED.items():
            if config.get(key) not in allowed:
                fix = "null" if allowed == (None,) else "false"
                raise UserError(
                    f"scheduler config: {key} = {shown(config[key])}: not supported (noise levels are spaced "
                    f"evenly and shifted once for all sizes); set it to {fix}"
                )
        if class_name == "DPMSolverMultistepScheduler" and not config.get("use_flow_sigmas"):
            raise UserError(
                "scheduler config: use_flow_sigmas is not true: this model predicts the velocity of a flow; "
                "set it to true"
            )
        prediction_type = config.get("prediction_type", "flow_prediction")
        if prediction_type != "flow_prediction":
            raise UserError(
                f"scheduler config: prediction_type = {shown(prediction_type)}: this model predicts the "
                'velocity of a flow; set it to "flow_prediction"'
            )
        shift = config.get(_SHIFT_KEYS[class_name])
        return cls(config.get("num_train_timesteps", 1000), 1.0 if shift is None else float(shift))

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.num_steps

    @property
    def weight_unit(self) -> float:
        """T / 2, with which `reward_weight` tends to (1 - sigma) / sigma as T grows."""
        return self.num_steps / 2

    def check_levels(self, t: ArrayLike) -> jax.Array:
        """Returns levels as an array.

        Raises:
          UserError: they are not float32 or float64.
        """
        t = jnp.asarray(t)
        if jnp.issubdtype(t.dtype, jnp.integer):
            raise UserError(
                f"timesteps of dtype {t.dtype}: a model of rectified flow takes float32 levels from 0, the "
                "image, to 1, the noise; divide timesteps by 1000"
            )
        if not jnp.issubdtype(t.dtype, jnp.floating) or t.dtype.itemsize < 4:
            raise UserError(f"noise levels of dtype {t.dtype}: must be float32, as less rounds 0.998 to 1")
        return t

    def scales(self, t: Num[ArrayLike, "*t"]) -> tuple[Float[jax.Array, "*t"], Float[jax.Array, "*t"]]:
        """Returns 1 - sigma and sigma."""
        t = self.check_levels(t)
        return 1 - t, t

    def target(
        self, x0: Float[Array, "*image"], noise: Float[Array, "*image"], t: Num[ArrayLike, "..."]
    ) -> Float[jax.Array, "*image"]:
        """Returns v = noise - x_0, of the shape of `x0`; the same at every level."""
        self.scales_like(t, x0)
        return jnp.subtract(noise, x0)

    def to_x0(
        self, prediction: Float[Array, "*image"], x_t: Float[Array, "*image"], t: Num[ArrayLike, "..."]
    ) -> Float[jax.Array, "*image"]:
        """Returns x_sigma - sigma v."""
        _, sigma = self.scales_like(t, x_t)
        return jnp.subtract(x_t, sigma * prediction)

    def to_epsilon(
        self, prediction: Float[Array, "*image"], x_t: Float[Array, "*image"], t: Num[ArrayLike, "..."]
    ) -> Float[jax.Array, "*image"]:
        """Returns x_sigma + (1 - sigma) v."""
        signal, _ = self.scales_like(t, x_t)
        return jnp.add(x_t, signal * prediction)

    def snr(self, t: Num[ArrayLike, "*t"]) -> Float[jax.Array, "*t"]:
        """Returns (1 - sigma)^2 / sigma^2, of the shape of `t`."""
        t = self.check_levels(t)
        return jnp.square((1 - t) / t)

    def kappa(self, t: Num[ArrayLike, "*t"]) -> Float[jax.Array, "*t"]:
        """Returns sigma."""
        return self.check_levels(t)

    def reverse_step(self, t: Num[ArrayLike, "*t"]) -> tuple[Num[jax.Array, "*t"], Num[jax.Array, "*t"]]:
        """Returns sigma and sigma - 1 / T; of what lies below 2 / T, those of 2 / T."""
        t = jnp.maximum(self.check_levels(t), 2 / self.num_steps)
        return t, t - 1 / self.num_steps

    def snr_ratio(
        self, begin: Num[ArrayLike, "*t"], end: Num[ArrayLike, "*t"]
    ) -> tuple[Float[jax.Array, "*t"], Float[jax.Array, "*t"]]:
        """Returns (1 - d)^2 and d (2 - d) with d = (begin - end) / ((1 - end) begin)."""
        t, s = self.check_levels(begin), self.check_levels(end)
        d = (t - s) / ((1 - s) * t)
        return jnp.square(1 - d), d * (2 - d)

    def network_time(self, t: Num[ArrayLike, "*t"]) -> Num[jax.Array, "*t"]:
        """Returns T sigma, float32."""
        return self.num_steps * self.check_levels(t)

    def level_at(self, time: Num[ArrayLike, "*t"]) -> Num[jax.Array, "*t"]:
        """Returns time / T, float32."""
        return jnp.asarray(time, jnp.float32) / self.num_steps

    def level_between(self, part: ArrayLike, whole: float) -> np.ndarray:
        """Returns part / whole as sigma, float32."""
        return np.asarray(np.asarray(part) / whole).astype(np.float32)

    def make_draw(self, first: int, last: int | None, keys: Mapping[str, Any]) -> SigmaDraw:
        """Returns the distribution of sigma that `config.levels` asks for.

        Raises:
          UserError: `config.timesteps` is set, or a key of `config.levels` does not fit.
        """
        if first != 0 or last is not None:
            raise UserError(
                f"config.timesteps.first = {first} and config.timesteps.last = {last}: are of models with "
                "integer timesteps; leave them out: this model's noise levels are drawn as config.levels says"
            )
        return make_sigma_draw(keys)

    def is_same(self, other: Process) -> bool:
        """Whether the other is a flow, too, and is told its levels in the same unit."""
        return isinstance(other, RectifiedFlow) and self.num_steps == other.num_steps
