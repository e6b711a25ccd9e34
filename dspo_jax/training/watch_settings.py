"""Settings of how a run is watched and saved: checkpoints, validation, samples, profiles."""

import dataclasses
from collections.abc import Sequence

from dspo_jax.limits import AT_LEAST_1, FINITE, NOT_NEGATIVE, Limit, limited


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """The keys of `config.checkpoint`."""

    every: int = limited(AT_LEAST_1)
    max_to_keep: int = limited(AT_LEAST_1)
    fallback: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """The keys of `config.validation`."""

    split: str
    every: int = limited(NOT_NEGATIVE)
    draws: int = limited(AT_LEAST_1)
    patience: int = limited(NOT_NEGATIVE)
    batch_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The keys of `config.samples`."""

    every: int = limited(NOT_NEGATIVE)
    prompts: Sequence[str]
    seeds: Sequence[int] = limited(
        Limit(
            f"needs at least one, each from 0 to {2**32 - 1}",
            lambda seeds: len(seeds) > 0 and all(0 <= seed < 2**32 for seed in seeds),
        )
    )
    num_inference_steps: int
    guidance_scale: float = limited(FINITE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """The keys of `config.profile`."""

    start: int = limited(NOT_NEGATIVE)
    steps: int = limited(NOT_NEGATIVE)
