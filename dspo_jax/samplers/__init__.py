"""Samplers: from noise to latents, each as one `lax.scan` over the network, equal to diffusers' schedulers.

A step of any of them is linear in the latents and in the network's outputs at this and earlier calls, so a
sampler is a table of coefficients: `sampler.py` steps through any such table, the families' files compute
them in float64, `registry.py` lists them by name, and `transitions.py` has a step's probability.
"""

from dspo_jax.samplers.registry import SAMPLERS, check_eta, make_sampler, own_sampler, samplers_of
from dspo_jax.samplers.sampler import Sampler, State
from dspo_jax.samplers.spacing import TIMESTEP_SPACINGS, spaced_timesteps
from dspo_jax.samplers.transitions import log_probability

__all__ = [
    "SAMPLERS",
    "TIMESTEP_SPACINGS",
    "Sampler",
    "State",
    "check_eta",
    "log_probability",
    "make_sampler",
    "own_sampler",
    "samplers_of",
    "spaced_timesteps",
]
