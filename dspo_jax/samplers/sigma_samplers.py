"""The samplers that walk over noise levels sigma = sqrt((1 - abar) / abar): Euler's two and DPM-Solver++.

A level may lie between two timesteps of the schedule. The latents of Euler's are the image plus sigma times
noise, so what the network is given is scaled down; those of DPM-Solver++ have unit variance throughout.
"""

from __future__ import annotations

import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.samplers.sampler import CoefficientTable
from dspo_jax.samplers.spacing import choice, require, spaced_timesteps, spacing_of
from dspo_jax.samplers.timestep_samplers import schedule_alphas, to_epsilon, to_x0
from dspo_jax.schedules.process import SchedulerConfig
from dspo_jax.schedules.variance_preserving import Schedule


def euler(
    schedule: Schedule, config: SchedulerConfig, num_inference_steps: int, first: int
) -> CoefficientTable:
    """Euler's method (Karras et al. 2022, Algorithm 1 without line 6 on), as `EulerDiscreteScheduler`."""
    _refuse_other_levels(config)
    require(config, "timestep_type", ("discrete", None), "the network is conditioned on timesteps")
    timesteps, sigmas = _euler_levels(schedule, config, num_inference_steps)
    if choice(config, "interpolation_type", ("linear", "log_linear")) == "log_linear":
        # One level more than there are timesteps, so that the last step ends above the final sigma.
        lowest, highest = np.log(_schedule_sigmas(schedule)[[0, -1]])
        sigmas = np.exp(np.linspace(highest, lowest, num_inference_steps + 1))
    if config["use_karras_sigmas"]:
        sigmas = _karras(config, sigmas[0], sigmas[-1], num_inference_steps)
        timesteps = _timesteps_of(schedule, sigmas).astype(np.float32)
    sigmas = np.append(sigmas, _final_sigma(schedule, config))
    return _euler_table(schedule, config, timesteps, sigmas, sigmas[1 : num_inference_steps + 1])


def euler_ancestral(
    schedule: Schedule, config: SchedulerConfig, num_inference_steps: int, first: int
) -> CoefficientTable:
    """Euler's method to below the next level and noise back up to it, as `EulerAncestralDiscreteScheduler`.

    The part that is noise anew is the posterior's (k-diffusion's `get_ancestral_step` with eta = 1).
    """
    timesteps, sigmas = _euler_levels(schedule, config, num_inference_steps)
    following = np.append(sigmas[1:], 0.0)
    down = following**2 / sigmas
    return _euler_table(schedule, config, timesteps, sigmas, down, np.sqrt(following**2 - down**2))


def dpmpp_2m(
    schedule: Schedule, config: SchedulerConfig, num_inference_steps: int, first: int
) -> CoefficientTable:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2), as `DPMSolverMultistepScheduler`.

    Its first step is of first order, and so is the last one if it ends at x_0, or if N < 15 with
    lower_order_final.
    """
    _refuse_other_levels(config)
    for key, value in (("algorithm_type", "dpmsolver++"), ("solver_order", 2), ("solver_type", "midpoint")):
        require(config, key, (value,), "this is DPM-Solver++(2M)")
    require(config, "lambda_min_clipped", (-np.inf, None), "no noise level is left out")
    require(config, "thresholding", (False, None), "dynamic thresholding is for pixels, not latents")
    fixed = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
    require(config, "variance_type", fixed, "the network predicts no variance")
    timesteps, sigmas = _dpm_levels(schedule, config, num_inference_steps)
    sigmas = np.append(sigmas, _final_sigma(schedule, config))

    begin, end = sigmas[:-1], sigmas[1:]
    alpha, alpha_end = (1 / np.sqrt(1 + level**2) for level in (begin, end))
    x0_weight = alpha_end * (1 - end / begin)
    lower_order_last = (
        end[-1] == 0 or config["euler_at_final"] or (config["lower_order_final"] and num_inference_steps < 15)
    )
    second = np.arange(first + 1, num_inference_steps - (1 if lower_order_last else 0))
    # 1 / (2 r) of the paper: half this step's width in log sigma over the last one's.
    slope = np.zeros_like(begin)
    slope[second] = np.log(begin[second] / end[second]) / np.log(begin[second - 1] / begin[second]) / 2
    output_x, output_prediction = to_x0(schedule, alpha**2)
    return CoefficientTable(
        timesteps,
        image_scale=alpha,
        noise_scale=begin * alpha,
        step_x=end * alpha_end / (begin * alpha),
        step_outputs=np.stack([x0_weight * (1 + slope), -x0_weight * slope], axis=1),
        output_x=output_x,
        output_prediction=output_prediction,
    )


def _euler_table(
    schedule: Schedule,
    config: SchedulerConfig,
    timesteps: np.ndarray,
    sigmas: np.ndarray,
    ends: np.ndarray,
    step_noise: np.ndarray | None = None,
) -> CoefficientTable:
    """Steps from sigmas[i] to ends[i] along the line of x: dx / dsigma is the noise."""
    begin = sigmas[: len(timesteps)]
    input_scale = 1 / np.sqrt(1 + begin**2)
    epsilon_of_x, epsilon_of_prediction = to_epsilon(schedule, input_scale**2)
    # Where the highest timestep is called, diffusers leaves out that the image is still in it.
    leading = config["timestep_spacing"] == "leading"
    return CoefficientTable(
        timesteps,
        image_scale=np.ones_like(begin),
        noise_scale=begin,
        step_x=1 + (ends - begin) * epsilon_of_x * input_scale,
        step_outputs=((ends - begin) * epsilon_of_prediction)[:, None],
        step_noise=step_noise,
        input_scale=input_scale,
        pure_noise_scale=np.sqrt(sigmas[0] ** 2 + 1) if leading else sigmas[0],
    )


def _euler_levels(
    schedule: Schedule, config: SchedulerConfig, num_inference_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [N] float32, which "linspace" does not round, and their sigmas [N]."""
    total, spacing = schedule.num_train_timesteps, spacing_of(config)
    timesteps = spaced_timesteps(total, num_inference_steps, **spacing).astype(np.float32)
    if spacing["timestep_spacing"] == "linspace":
        timesteps = np.linspace(0, total - 1, num_inference_steps, dtype=np.float32)[::-1]
    return timesteps, np.interp(timesteps, np.arange(total), _schedule_sigmas(schedule))


def _dpm_levels(
    schedule: Schedule, config: SchedulerConfig, num_inference_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [N] int32 and their sigmas [N].

    "leading" and "linspace" are spaced for one step more, whose timestep is the one left out at the end.
    Karras's levels are exact, and their timesteps rounded.
    """
    sigmas = _schedule_sigmas(schedule)
    if config["use_karras_sigmas"]:
        levels = _karras(config, sigmas[-1], sigmas[0], num_inference_steps)
        return _timesteps_of(schedule, levels).round().astype(np.int32), levels
    total, spacing = schedule.num_train_timesteps, spacing_of(config)
    if spacing["timestep_spacing"] == "trailing":
        timesteps = spaced_timesteps(total, num_inference_steps, **spacing)
    elif num_inference_steps < total:
        timesteps = spaced_timesteps(total, num_inference_steps + 1, **spacing)[:-1]
    else:
        raise UserError(
            f"num_inference_steps = {total}: with timestep_spacing = {spacing['timestep_spacing']!r} "
            f"DPM-Solver++ takes at most {total - 1} steps"
        )
    return timesteps, sigmas[timesteps]


def _karras(config: SchedulerConfig, highest: float, lowest: float, count: int) -> np.ndarray:
    """Levels [count] that are evenly spaced in sigma^(1/7) (Karras et al. 2022, Eq. 5)."""
    lowest, highest = (
        bound if config[key] is None else float(config[key])
        for key, bound in (("sigma_min", lowest), ("sigma_max", highest))
    )
    return np.linspace(highest ** (1 / 7), lowest ** (1 / 7), count) ** 7


def _timesteps_of(schedule: Schedule, sigmas: np.ndarray) -> np.ndarray:
    """Interpolates the timesteps of noise levels, linearly in log sigma; [n] float64."""
    levels = np.log(_schedule_sigmas(schedule))
    return np.interp(np.log(sigmas), levels, np.arange(len(levels)))


def _schedule_sigmas(schedule: Schedule) -> np.ndarray:
    """Computes sigma of every timestep, [T] float64; at zero SNR the 4096 that diffusers puts there."""
    alpha_bar = schedule_alphas(schedule)
    alpha_bar = np.where(alpha_bar == 0, 2.0**-24, alpha_bar)
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def _final_sigma(schedule: Schedule, config: SchedulerConfig) -> float:
    """Returns the level that the last step ends at."""
    if choice(config, "final_sigmas_type", ("zero", "sigma_min")) == "zero":
        return 0.0
    return float(_schedule_sigmas(schedule)[0])


def _refuse_other_levels(config: SchedulerConfig) -> None:
    for key in ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"):
        require(config, key, (False, None), "noise levels are spaced by timestep or by use_karras_sigmas")
