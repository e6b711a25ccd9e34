"""Samplers: from noise to latents, each as one `lax.scan` over the network, equal to diffusers' schedulers.

Every one of them takes steps that are linear in the latents and in what the network said at this and earlier
calls, so a sampler is a table of coefficients: `sampler.py` runs any such table, the files of the families
compute them in float64, `registry.py` finds them by name.
"""

from dspo_jax.samplers.registry import SAMPLERS, check_eta, make_sampler, own_sampler
from dspo_jax.samplers.sampler import Sampler
from dspo_jax.samplers.spacing import TIMESTEP_SPACINGS, spaced_timesteps

__all__ = [
    "SAMPLERS",
    "TIMESTEP_SPACINGS",
    "Sampler",
    "check_eta",
    "make_sampler",
    "own_sampler",
    "spaced_timesteps",
]
