"""The samplers of rectified flow: Euler's, Heun's and DPM-Solver++'s methods, and two with noise in steps.

A level sigma runs from 1, the noise, to 0, the image. Formulas are of a step from level t to s; v is the
velocity that the network predicts at t, of which it is told 1000 t.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from dspo_jax.samplers.sampler import CoefficientTable
from dspo_jax.samplers.spacing import require
from dspo_jax.schedules.process import SchedulerConfig
from dspo_jax.schedules.rectified_flow import RectifiedFlow


def flow_euler(
    flow: RectifiedFlow, config: SchedulerConfig, num_inference_steps: int, first: int
) -> CoefficientTable:
    """x_s = x_t + (s - t) v, as diffusers' `FlowMatchEulerDiscreteScheduler`."""
    begin, end = _steps(_levels(flow, num_inference_steps))
    return _table(flow, begin, np.ones_like(begin), (end - begin)[:, None])


def flow_ancestral(
    flow: RectifiedFlow, config: SchedulerConfig, num_inference_steps: int, first: int, eta: float = 0.0
) -> CoefficientTable:
    """A step whose x_s has the right distribution for any eta and size, for a network that is right.

    With V = t^2 - ((1 - t) / (1 - s))^2 s^2, what noising from s to t adds, and z standard normal:

        q = eta s sqrt(V) / t,   r = sqrt(s^2 - q^2),
        x_s = (1 - s + r) x_t + (r (1 - t) - (1 - s) t) v + q z,

    which is (1 - s) x_0 + r eps + q z with the image and the noise that v implies. At eta = 0 it is Euler's
    step, at eta = 1 the posterior q(x_s | x_t, x_0), as `ddpm` is. The step into the image has no noise.
    """
    begin, end = _steps(_levels(flow, num_inference_steps))
    added = begin**2 - ((1 - begin) / (1 - end)) ** 2 * end**2
    noise = eta * end * np.sqrt(np.maximum(added, 0)) / begin
    kept = np.sqrt(np.maximum(end**2 - noise**2, 0))
    # Differences from Euler's coefficients, which are exactly 0 where there is no noise.
    less = np.where(noise > 0, kept - end, 0.0)
    velocity = (end - begin) + less * (1 - begin)
    return _table(flow, begin, 1 + less, velocity[:, None], noise if eta else None)


def flow_grpo(
    flow: RectifiedFlow, config: SchedulerConfig, num_inference_steps: int, first: int, eta: float = 0.0
) -> CoefficientTable:
    """The step of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), as its released code has it; a is `eta`.

    It is one of Euler and Maruyama, with d = s - t below 0:

        b = a sqrt(t / (1 - t)),
        x_s = x_t (1 + b^2 d / (2 t)) + v (1 + b^2 (1 - t) / (2 t)) d + b sqrt(-d) z.

    Where t is 1, the level after it stands for t in 1 - t. Each step leaves b^2 d^2 / t + b^4 d^2 / (4 t^2)
    too much variance of noise; `flow_ancestral` leaves none. The last step adds noise, too.
    """
    begin, end = _steps(_levels(flow, num_inference_steps))
    step = end - begin
    rate = eta**2 * begin / (1 - np.where(begin == 1, end[0], begin))
    velocity = (1 + rate * (1 - begin) / (2 * begin)) * step
    noise = np.sqrt(rate * -step)
    return _table(flow, begin, 1 + rate * step / (2 * begin), velocity[:, None], noise if eta else None)


def flow_heun(
    flow: RectifiedFlow, config: SchedulerConfig, num_inference_steps: int, first: int
) -> CoefficientTable:
    """Heun's method, as diffusers' `FlowMatchHeunDiscreteScheduler`: 2 N - 1 calls for N steps.

    Euler's step to s, a call there, and the step again with the mean of both velocities; the last step is
    Euler's.
    """
    begin, end = _steps(_levels(flow, num_inference_steps))
    step = end - begin
    calls = np.repeat(np.arange(num_inference_steps), 2)[:-1]
    again = np.arange(len(calls)) % 2 == 1
    half = step[calls] / 2
    outputs = np.where(again[:, None], np.stack([half, -half], 1), np.stack([2 * half, 0 * half], 1))
    return _table(flow, np.where(again, end[calls], begin[calls]), np.ones(len(calls)), outputs)


def flow_dpmpp_2m(
    flow: RectifiedFlow, config: SchedulerConfig, num_inference_steps: int, first: int
) -> CoefficientTable:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095), as diffusers' `DPMSolverMultistepScheduler`.

    That is with `use_flow_sigmas`: levels from 0.999 before they are shifted, whole timesteps, and h the
    width of a step in ln((1 - sigma) / sigma). (k-diffusion's and Stability's code measure it in -ln sigma.)
    The first and the last step are of first order.
    """
    for key, value in (("algorithm_type", "dpmsolver++"), ("solver_order", 2), ("solver_type", "midpoint")):
        require(config, key, (value,), "this is DPM-Solver++(2M)")
    require(config, "thresholding", (False, None), "dynamic thresholding is for pixels, not latents")
    require(config, "final_sigmas_type", ("zero",), "the last step ends at the image")
    unshifted = 1 - np.linspace(1, 1 / flow.num_train_timesteps, num_inference_steps + 1)
    exact = _shift(flow, unshifted)[:0:-1]
    begin, end = _steps(exact.astype(np.float32).astype(np.float64))
    second = np.arange(first + 1, num_inference_steps - 1)
    width = np.log((1 - end[:-1]) / end[:-1]) - np.log((1 - begin[:-1]) / begin[:-1])
    # 1 / (2 r) of the paper: half this step's width over the last one's.
    slope = np.zeros_like(begin)
    slope[second] = width[second] / width[second - 1] / 2
    weight = 1 - end / begin
    outputs = np.stack([weight * (1 + slope), -weight * slope], axis=1)
    table = _table(flow, begin, end / begin, outputs)
    return table._replace(
        timesteps=(exact * flow.num_train_timesteps).astype(np.int32),
        output_x=np.ones_like(begin),
        output_prediction=-begin,
    )


def _levels(flow: RectifiedFlow, num_inference_steps: int) -> Float64[np.ndarray, " N"]:
    """Returns sigma of N calls, as float32 numbers.

    They lie evenly between 1 and the shifted 1 / T, and are shifted then: the last of them twice, as in
    diffusers and in Stability's own code.
    """
    last = _shift(flow, np.array([1 / flow.num_train_timesteps]))[0]
    levels = _shift(flow, np.linspace(1, last, num_inference_steps))
    return levels.astype(np.float32).astype(np.float64)


def _shift(flow: RectifiedFlow, sigma: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    shifted: Float64[np.ndarray, " n"] = flow.shift * sigma / (1 + (flow.shift - 1) * sigma)
    return shifted


def _steps(levels: Float64[np.ndarray, " N"]) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """Returns where the steps begin and end."""
    return levels, np.append(levels[1:], 0.0)


def _table(
    flow: RectifiedFlow,
    levels: Float64[np.ndarray, " n"],
    step_x: Float64[np.ndarray, " n"],
    step_outputs: Float64[np.ndarray, "n K"],
    step_noise: Float64[np.ndarray, " n"] | None = None,
) -> CoefficientTable:
    """Returns the rows of n calls at `levels`, whose outputs are the velocity."""
    return CoefficientTable(
        timesteps=levels.astype(np.float32) * np.float32(flow.num_train_timesteps),
        image_scale=1 - levels,
        noise_scale=levels,
        step_x=step_x,
        step_outputs=step_outputs,
        step_noise=step_noise,
    )
