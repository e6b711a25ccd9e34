"""The samplers by name, and by the diffusers scheduler that each is equal to."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.json_files import shown
from dspo_jax.samplers import sigma_samplers, timestep_samplers
from dspo_jax.samplers.sampler import CoefficientTable, Sampler
from dspo_jax.samplers.spacing import check_steps, fill_sampler_config
from dspo_jax.schedules.variance_preserving import Schedule, SchedulerConfig


class Entry(NamedTuple):
    """A sampler.

    Attributes:
      scheduler: The diffusers class.
      table: `(schedule, config, num_inference_steps, first)` gives the rows, of which `first` is run
        first; the config has been filled.
      defaults: What that class takes for keys that a scheduler_config.json lacks, where the classes disagree.
      karras: Whether that class knows Karras's noise levels.
      eta: Whether `table` takes eta as well, the share of a step's noise that is drawn anew.
    """

    scheduler: str
    table: Callable[..., CoefficientTable]
    defaults: SchedulerConfig = MappingProxyType({})
    karras: bool = False
    eta: bool = False


_LINSPACE = {"timestep_spacing": "linspace"}

SAMPLERS: dict[str, Entry] = {
    "ddim": Entry("DDIMScheduler", timestep_samplers.ddim, eta=True),
    "ddpm": Entry("DDPMScheduler", timestep_samplers.ddpm),
    "dpmpp_2m": Entry("DPMSolverMultistepScheduler", sigma_samplers.dpmpp_2m, _LINSPACE, karras=True),
    "euler": Entry("EulerDiscreteScheduler", sigma_samplers.euler, _LINSPACE, karras=True),
    "euler_ancestral": Entry("EulerAncestralDiscreteScheduler", sigma_samplers.euler_ancestral, _LINSPACE),
    "pndm": Entry("PNDMScheduler", timestep_samplers.pndm, {"set_alpha_to_one": False}),
}


def own_sampler(config: SchedulerConfig) -> str:
    """Returns the name of the sampler that a scheduler_config.json asks for by its `_class_name`.

    Raises:
      UserError: It names no class or one that is not computed here.
    """
    for name, entry in SAMPLERS.items():
        if entry.scheduler == config.get("_class_name"):
            return name
    raise UserError(
        f"scheduler config: _class_name = {shown(config.get('_class_name'))}: not supported; "
        f"name one of the samplers {', '.join(SAMPLERS)} instead"
    )


def make_sampler(
    name: str,
    schedule: Schedule,
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
      num_inference_steps: N. The network is called N times, by "pndm" N + 1 times.
      strength: Below 1 only the last int(N strength) steps are taken, from a noised image, as
        StableDiffusionImg2ImgPipeline does.
      karras: Overrides the config's use_karras_sigmas.
      eta: Of "ddim", from 0 (deterministic) to 1 (as much new noise in every step as "ddpm").

    Raises:
      UserError: An unknown name, a number of steps or an offset that the schedule does not have, a strength
        that leaves no step, an eta that the sampler does not have, or something in the config that is not
        computed; the message names it.
    """
    if name not in SAMPLERS:
        raise UserError(spelling.unknown("sampler", name, SAMPLERS))
    check_eta(name, eta)
    entry = SAMPLERS[name]
    if karras is not None:
        if karras and not entry.karras:
            able = ", ".join(other for other, entry in SAMPLERS.items() if entry.karras)
            raise UserError(f"karras = True: sampler {name!r} has no such noise levels; these have: {able}")
        config = {**config, "use_karras_sigmas": karras}
    config = fill_sampler_config(config, entry.defaults)
    check_steps(schedule.num_train_timesteps, num_inference_steps)
    if not 0 <= strength <= 1:
        raise UserError(f"strength = {strength}: must be between 0 and 1")
    first = num_inference_steps - int(num_inference_steps * strength)
    if first == num_inference_steps:
        raise UserError(
            f"strength = {strength}: takes none of num_inference_steps = {num_inference_steps}; "
            f"it must be at least 1 / {num_inference_steps}"
        )
    more = {"eta": eta} if entry.eta else {}
    table = entry.table(schedule, config, num_inference_steps, first, **more)
    return Sampler.from_table(table, first, strength)


def check_eta(name: str, eta: float) -> None:
    """Refuses an eta that a sampler, one of `SAMPLERS`, does not have.

    Raises:
      UserError: It is not between 0 and 1, or not 0 for a sampler that has none.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta = {eta}: must be between 0 and 1")
    if eta and not SAMPLERS[name].eta:
        able = ", ".join(other for other, entry in SAMPLERS.items() if entry.eta)
        raise UserError(f"eta = {eta}: sampler {name!r} has none; leave it out, or take one of: {able}")
