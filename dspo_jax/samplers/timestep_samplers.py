"""The samplers that walk over whole timesteps of the schedule: DDIM, DDPM and PNDM.

x_t has unit variance throughout. abar is the cumulative product of 1 - beta, `before` its value at the
timestep that a step ends at.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from dspo_jax.errors import UserError
from dspo_jax.samplers.sampler import CoefficientTable
from dspo_jax.samplers.spacing import require, spaced_timesteps, spacing_of
from dspo_jax.schedules.process import SchedulerConfig
from dspo_jax.schedules.variance_preserving import Schedule

# PLMS: the weights of this output and of those before it, by the number of the call; the last row is for all
# that follow. Call 1 repeats call 0's step with the mean of both and is not used again, hence the zeros.
_PLMS = np.array(
    [
        [1, 0, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0, 0],
        [3 / 2, 0, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 0, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, 0, -9 / 24],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24, 0],
    ]
)


def ddim(
    schedule: Schedule, config: SchedulerConfig, num_inference_steps: int, first: int, eta: float = 0.0
) -> CoefficientTable:
    """DDIM (Song et al. 2021, Eq. 12), as diffusers' `DDIMScheduler`.

    A step's noise has the standard deviation of Eq. 16,

        sigma = eta sqrt((1 - before) / (1 - at)) sqrt(1 - at / before):

    none for eta = 0, that of the posterior q(x_before | x_at, x_0), and so of `ddpm`, for eta = 1.
    """
    _refuse_clipping(config)
    timesteps = _timesteps(schedule, config, num_inference_steps)
    # As diffusers: a fixed stride down, which where N does not divide T is not quite the next timestep.
    ends = timesteps - schedule.num_train_timesteps // num_inference_steps
    at, before = _alphas(schedule, timesteps, ends, config["set_alpha_to_one"])
    sigma = eta * np.sqrt((1 - before) / (1 - at) * (1 - at / before))
    x, prediction = _ddim_steps(schedule, at, before, sigma)
    noise = sigma if eta else None
    return CoefficientTable(timesteps, *_noising(schedule, timesteps), x, prediction[:, None], noise)


def ddpm(
    schedule: Schedule, config: SchedulerConfig, num_inference_steps: int, first: int
) -> CoefficientTable:
    """Ancestral sampling (Ho et al. 2020, Eq. 7 with the smaller variance), as diffusers' `DDPMScheduler`.

    A step ends at the timestep of the next call, the last one without noise at x_0.
    """
    _refuse_clipping(config)
    require(
        config, "variance_type", ("fixed_small", None), "the variance of the noise is the posterior's, beta~"
    )
    timesteps = _timesteps(schedule, config, num_inference_steps)
    at = schedule_alphas(schedule)[timesteps]
    before = np.append(at[1:], 1.0)
    alpha = at / before
    x0_of_x, x0_of_prediction = to_x0(schedule, at)
    x0_weight = np.sqrt(before) * (1 - alpha) / (1 - at)
    x_weight = np.sqrt(alpha) * (1 - before) / (1 - at)
    return CoefficientTable(
        timesteps,
        *_noising(schedule, timesteps),
        step_x=x_weight + x0_weight * x0_of_x,
        step_outputs=(x0_weight * x0_of_prediction)[:, None],
        step_noise=np.sqrt((1 - before) / (1 - at) * (1 - alpha)),
    )


def pndm(
    schedule: Schedule, config: SchedulerConfig, num_inference_steps: int, first: int
) -> CoefficientTable:
    """PLMS (Liu et al. 2022, Eq. 9 and 12), as diffusers' `PNDMScheduler` with skip_prk_steps.

    N steps are N + 1 calls, as the second timestep is called twice. diffusers takes the second call for that
    repetition wherever it starts: from an image noised to a later timestep, the latents lag one timestep
    behind the calls from then on. So they do here.
    """
    if schedule.has_zero_terminal_snr:
        raise UserError(
            "sampler 'pndm': rescale_betas_zero_snr = true in the scheduler config: not done by diffusers' "
            "PNDMScheduler, which divides by abar; take another sampler, for example ddim"
        )
    skipped = config["skip_prk_steps"]
    if not (config.get("_class_name") != "PNDMScheduler" if skipped is None else skipped):
        raise UserError(
            "scheduler config: skip_prk_steps = false: not supported (Runge-Kutta steps of four calls each); "
            "set it to true"
        )
    timesteps = _timesteps(schedule, config, num_inference_steps)
    timesteps = np.concatenate([timesteps[:2], timesteps[1:]])
    stride = schedule.num_train_timesteps // num_inference_steps
    begins = timesteps.copy()
    begins[first + 1 : first + 2] += stride
    at, before = _alphas(schedule, begins, begins - stride, config["set_alpha_to_one"])
    x, prediction = _ddim_steps(schedule, at, before)
    calls = np.clip(np.arange(len(timesteps)) - first, 0, len(_PLMS) - 1)
    outputs = prediction[:, None] * _PLMS[calls]
    if first + 1 < len(timesteps):
        # Call 1 steps from call 0's latents again; they follow from its own: x_0 = (x_1 - outputs_0 m_0) / x.
        x[first + 1] /= x[first]
        outputs[first + 1, 1] -= x[first + 1] * outputs[first, 0]
    return CoefficientTable(timesteps, *_noising(schedule, timesteps), x, outputs)


def schedule_alphas(schedule: Schedule) -> Float64[np.ndarray, " T"]:
    """Computes abar of a schedule, [T] float64."""
    return np.asarray(schedule.alphas_cumprod, np.float64)


def to_x0(
    schedule: Schedule, alpha_bar: Float64[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Returns a, b of x_0 = a x_t + b prediction, each of the shape of `alpha_bar`."""
    signal, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    if schedule.prediction_type == "epsilon":
        return 1 / signal, -sigma / signal
    return signal, -sigma


def to_epsilon(
    schedule: Schedule, alpha_bar: Float64[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Returns a, b of epsilon = a x_t + b prediction, each of the shape of `alpha_bar`."""
    if schedule.prediction_type == "epsilon":
        return np.zeros_like(alpha_bar), np.ones_like(alpha_bar)
    return np.sqrt(1 - alpha_bar), np.sqrt(alpha_bar)


def _alphas(
    schedule: Schedule, begins: np.ndarray, ends: np.ndarray, set_alpha_to_one: bool
) -> tuple[np.ndarray, np.ndarray]:
    """abar at timesteps [n] where steps begin and end; an end below 0 is x_0 or timestep 0."""
    alphas = schedule_alphas(schedule)
    before = np.where(ends >= 0, alphas[np.maximum(ends, 0)], 1.0 if set_alpha_to_one else alphas[0])
    return alphas[begins], before


def _ddim_steps(
    schedule: Schedule, at: np.ndarray, before: np.ndarray, sigma: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """a, b, each [n], of x_before = a x_at + b prediction + noise of standard deviation sigma.

    Noise and image are kept, at other scales (Song et al. 2021, Eq. 12); PNDM's Eq. 9 is the same written
    without a difference of nearly equal terms.
    """
    x0_of_x, x0_of_prediction = to_x0(schedule, at)
    epsilon_of_x, epsilon_of_prediction = to_epsilon(schedule, at)
    # Rounding must not make the noise that is kept negative: none is, for eta = 1 at zero SNR.
    signal, kept = np.sqrt(before), np.sqrt(np.maximum(1 - before - sigma**2, 0))
    return (
        signal * x0_of_x + kept * epsilon_of_x,
        signal * x0_of_prediction + kept * epsilon_of_prediction,
    )


def _timesteps(schedule: Schedule, config: SchedulerConfig, num_inference_steps: int) -> np.ndarray:
    spacing = spacing_of(config)
    return spaced_timesteps(schedule.num_train_timesteps, num_inference_steps, **spacing)


def _noising(schedule: Schedule, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scales of image and noise at timesteps [n]."""
    alpha_bar = schedule_alphas(schedule)[timesteps]
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def _refuse_clipping(config: SchedulerConfig) -> None:
    # A config that lacks clip_sample gets none, whatever the scheduler's default: so do diffusers' pipelines.
    bounded = "latents are not bounded by 1, so clipping x_0 would distort them"
    require(config, "clip_sample", (False, None), bounded)
    require(config, "thresholding", (False, None), "dynamic thresholding is for pixels, not latents")
