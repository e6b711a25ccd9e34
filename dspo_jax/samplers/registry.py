"""The samplers by name, and by the diffusers scheduler that each is equal to."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.json_files import shown
from dspo_jax.samplers import flow_samplers, sigma_samplers, timestep_samplers
from dspo_jax.samplers.sampler import CoefficientTable, Sampler
from dspo_jax.samplers.spacing import check_steps, fill_sampler_config
from dspo_jax.schedules.process import Process, SchedulerConfig
from dspo_jax.schedules.rectified_flow import RectifiedFlow
from dspo_jax.schedules.variance_preserving import Schedule


class Entry(NamedTuple):
    """A sampler.

    Attributes:
      scheduler: The diffusers class that it is equal to, or what it is where diffusers has none.
      table: `(schedule, config, num_inference_steps, first)` gives the rows, of which that of step `first` is
        run first; the config has been filled.
      defaults: What that class takes for keys that a scheduler_config.json lacks, where the classes disagree.
      karras: Whether that class knows Karras's noise levels.
      eta: Whether `table` takes eta as well, the share of a step's noise that is drawn anew.
      process: The kind of process that it reverses.
      calls: Calls of the network in a step, but for the last step.
    """

    scheduler: str
    table: Callable[..., CoefficientTable]
    defaults: SchedulerConfig = MappingProxyType({})
    karras: bool = False
    eta: bool = False
    process: type[Process] = Schedule
    calls: int = 1


_LINSPACE = {"timestep_spacing": "linspace"}
_USUAL = ("ddim", "flow_euler")

SAMPLERS: dict[str, Entry] = {
    "ddim": Entry("DDIMScheduler", timestep_samplers.ddim, eta=True),
    "ddpm": Entry("DDPMScheduler", timestep_samplers.ddpm),
    "dpmpp_2m": Entry("DPMSolverMultistepScheduler", sigma_samplers.dpmpp_2m, _LINSPACE, karras=True),
    "euler": Entry("EulerDiscreteScheduler", sigma_samplers.euler, _LINSPACE, karras=True),
    "euler_ancestral": Entry("EulerAncestralDiscreteScheduler", sigma_samplers.euler_ancestral, _LINSPACE),
    "flow_ancestral": Entry(
        "not in diffusers: exact steps with noise",
        flow_samplers.flow_ancestral,
        eta=True,
        process=RectifiedFlow,
    ),
    "flow_dpmpp_2m": Entry(
        "DPMSolverMultistepScheduler with use_flow_sigmas",
        flow_samplers.flow_dpmpp_2m,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
        process=RectifiedFlow,
    ),
    "flow_euler": Entry("FlowMatchEulerDiscreteScheduler", flow_samplers.flow_euler, process=RectifiedFlow),
    "flow_grpo": Entry(
        "not in diffusers: Flow-GRPO's steps", flow_samplers.flow_grpo, eta=True, process=RectifiedFlow
    ),
    "flow_heun": Entry(
        "FlowMatchHeunDiscreteScheduler", flow_samplers.flow_heun, process=RectifiedFlow, calls=2
    ),
    "pndm": Entry("PNDMScheduler", timestep_samplers.pndm, {"set_alpha_to_one": False}),
}


def own_sampler(config: SchedulerConfig) -> str:
    """Returns the name of the sampler that a scheduler_config.json asks for by its `_class_name`.

    Raises:
      UserError: It names no class or one that is not computed here.
    """
    wanted = config.get("_class_name")
    if config.get("use_flow_sigmas"):
        wanted = f"{wanted} with use_flow_sigmas"
    for name, entry in SAMPLERS.items():
        if entry.scheduler == wanted:
            return name
    raise UserError(
        f"scheduler config: _class_name = {shown(config.get('_class_name'))}: not supported; "
        f"name one of the samplers {', '.join(SAMPLERS)} instead"
    )


def make_sampler(
    name: str,
    schedule: Process,
    config: SchedulerConfig,
    num_inference_steps: int,
    *,
    strength: float = 1.0,
    karras: bool | None = None,
    eta: float = 0.0,
) -> Sampler:
    """Returns a sampler, equal to `Scheduler.from_config(config)` of diffusers with `set_timesteps(N)`.

    Keys that the config lacks take the defaults of the scheduler whose sampler is asked for; keys that this
    scheduler does not read are not looked at.

    Args:
      name: One of `SAMPLERS`.
      schedule: The forward process that the network was trained under, of concrete values.
      config: The parsed scheduler_config.json, of any scheduler class.
      num_inference_steps: N. The network is called N times, by "pndm" N + 1 and by "flow_heun" 2 N - 1 times.
      strength: Below 1 only the last int(N strength) steps are taken, from a noised image, as
        StableDiffusionImg2ImgPipeline does; of rectified flow N strength, rounded up, as
        StableDiffusion3Img2ImgPipeline does.
      karras: Overrides the config's use_karras_sigmas.
      eta: Of "ddim" and "flow_ancestral", from 0 (deterministic) to 1 (as much new noise in every step as
        "ddpm"). Of "flow_grpo" its a; 0.7 in the released code.

    Raises:
      UserError: An unknown name, a sampler of another process, a number of steps or an offset that the
        schedule does not have, a strength that leaves no step, an eta that the sampler does not have, or
        something in the config that is not computed; the message names it.
    """
    if name not in SAMPLERS:
        raise UserError(spelling.unknown("sampler", name, SAMPLERS))
    check_eta(name, eta)
    entry = SAMPLERS[name]
    if not isinstance(schedule, entry.process):
        raise UserError(
            f"sampler {name!r}: does not reverse the process of this model; these do: "
            f"{', '.join(samplers_of(schedule))}"
        )
    if karras is not None:
        if karras and not entry.karras:
            able = ", ".join(other for other, entry in SAMPLERS.items() if entry.karras)
            raise UserError(f"karras = True: sampler {name!r} has no such noise levels; these have: {able}")
        config = {**config, "use_karras_sigmas": karras}
    config = fill_sampler_config(config, entry.defaults)
    check_steps(schedule.num_train_timesteps, num_inference_steps)
    if not 0 <= strength <= 1:
        raise UserError(f"strength = {strength}: must be between 0 and 1")
    taken = num_inference_steps * strength
    first = num_inference_steps - int(taken)
    if isinstance(schedule, RectifiedFlow):
        first = int(num_inference_steps - taken)
    if first == num_inference_steps:
        raise UserError(
            f"strength = {strength}: takes none of num_inference_steps = {num_inference_steps}; "
            f"it must be at least 1 / {num_inference_steps}"
        )
    more = {"eta": eta} if entry.eta else {}
    table = entry.table(schedule, config, num_inference_steps, first, **more)
    return Sampler.from_table(table, entry.calls * first, strength)


def samplers_of(process: Process) -> list[str]:
    """Returns the names of the samplers that reverse a process; the first is the one that suits most uses."""
    names = [name for name, entry in SAMPLERS.items() if isinstance(process, entry.process)]
    return sorted(names, key=lambda name: (name not in _USUAL, name))


def check_eta(name: str | None, eta: float) -> None:
    """Refuses an eta that a sampler, one of `SAMPLERS`, does not have; of None, one that none has.

    Raises:
      UserError: It is not between 0 and 1, or not 0 for a sampler that has none.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta = {eta}: must be between 0 and 1")
    if eta and name is not None and not SAMPLERS[name].eta:
        able = ", ".join(other for other, entry in SAMPLERS.items() if entry.eta)
        raise UserError(f"eta = {eta}: sampler {name!r} has none; leave it out, or take one of: {able}")
