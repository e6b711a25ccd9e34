"""Spacing of a sampler's timesteps on the schedule, and the reading of a scheduler_config.json."""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np
from jaxtyping import Int32

from dspo_jax import schema, spelling
from dspo_jax.errors import UserError
from dspo_jax.json_files import shown
from dspo_jax.schedules.process import SchedulerConfig
from dspo_jax.schema import Key, flag, integer, number

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

# Defaults are diffusers' for all of its classes; where they disagree, `registry.SAMPLERS` has a class's own.
# Keys that must have one value are left to `require`.
_KEYS: dict[str, Key] = {
    "final_sigmas_type": Key("zero", str),
    "interpolation_type": Key("linear", str),
    "euler_at_final": flag(False, null=True),
    "lower_order_final": flag(True, null=True),
    "set_alpha_to_one": flag(True, null=True),
    "sigma_max": number(None, low=1e-6, high=1e6, null=True),
    "sigma_min": number(None, low=1e-6, high=1e6, null=True),
    "skip_prk_steps": Key(None, bool, null=True),  # None: by the class of the file, see `pndm`
    "steps_offset": integer(0, low=0, high=100_000),
    "timestep_spacing": Key("leading", str),
    "use_karras_sigmas": flag(False, null=True),
}


def spaced_timesteps(
    num_train_timesteps: int,
    num_inference_steps: int,
    *,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
) -> Int32[np.ndarray, " N"]:
    """Returns the timesteps of N steps, in the order of the calls.

    Args:
      num_train_timesteps: T of the schedule.
      num_inference_steps: N, at most T.
      timestep_spacing: "leading", "trailing" or "linspace" (Lin et al. 2023, Table 2).
      steps_offset: Added to every timestep of "leading"; the other spacings ignore it, as in diffusers.

    Returns:
      [N] int32, decreasing.

    Raises:
      UserError: Unknown spacing, N out of range, or an offset that leaves the schedule.
    """
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise UserError(spelling.unknown("timestep_spacing", str(timestep_spacing), TIMESTEP_SPACINGS))
    check_steps(num_train_timesteps, num_inference_steps)
    timesteps: np.ndarray
    if timestep_spacing == "leading":
        timesteps = (
            num_train_timesteps // num_inference_steps * np.arange(num_inference_steps)[::-1] + steps_offset
        )
    elif timestep_spacing == "trailing":
        stride = num_train_timesteps / num_inference_steps
        # N indices rather than a float range: the range can yield an N + 1st element by rounding.
        timesteps = np.round(num_train_timesteps - stride * np.arange(num_inference_steps)) - 1
    else:
        timesteps = np.linspace(0, num_train_timesteps - 1, num_inference_steps).round()[::-1]
    if timesteps[-1] < 0 or timesteps[0] >= num_train_timesteps:
        raise UserError(
            f"steps_offset = {steps_offset}: with num_inference_steps = {num_inference_steps} "
            f"it moves timesteps outside 0..{num_train_timesteps - 1}; lower one of the two"
        )
    return timesteps.astype(np.int32)


def check_steps(num_train_timesteps: int, num_inference_steps: int) -> None:
    """Refuses a number of steps that a schedule does not have.

    Raises:
      UserError: It is not between 1 and T.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise UserError(
            f"num_inference_steps = {num_inference_steps}: "
            f"must be between 1 and the schedule's {num_train_timesteps}"
        )


def check_sampler_config(config: SchedulerConfig) -> None:
    """Refuses a scheduler_config.json in which a key that a sampler reads is of another type.

    Raises:
      UserError: names the key and its value.
    """
    schema.check("scheduler config", config, _KEYS)


def fill_sampler_config(config: SchedulerConfig, defaults: SchedulerConfig) -> SchedulerConfig:
    """Fills a scheduler_config.json with defaults; `defaults` go before those of the table.

    Raises:
      UserError: As `check_sampler_config`.
    """
    check_sampler_config(config)
    return {**{key: entry.default for key, entry in _KEYS.items()}, **defaults, **config}


def spacing_of(config: SchedulerConfig) -> SchedulerConfig:
    """Returns the keyword arguments of `spaced_timesteps` that a filled config fixes."""
    return {key: config[key] for key in ("timestep_spacing", "steps_offset")}


def require(config: SchedulerConfig, key: str, allowed: Collection[object], why: str) -> None:
    """Refuses a config with a value that is not computed here.

    Raises:
      UserError: `config[key]` is there and is none of `allowed`; the message gives `why` and the first of
        `allowed` as the fix.
    """
    if key in config and config[key] not in allowed:
        fix = json.dumps(next(iter(allowed)))
        raise UserError(
            f"scheduler config: {key} = {shown(config[key])}: not supported ({why}); set it to {fix}"
        )


def choice(config: SchedulerConfig, key: str, allowed: Collection[str]) -> str:
    """Returns the value of a key of a filled config.

    Raises:
      UserError: The value is none of `allowed`.
    """
    value = config[key]
    if value not in allowed:
        raise UserError(spelling.unknown(f"scheduler config: {key}", str(value), allowed))
    return str(value)
