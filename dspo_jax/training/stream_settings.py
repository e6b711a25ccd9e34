"""The keys that say where batches come from, by which rewards, and what they are compared with.

A field is a key, with its limit beside it; configs/common.py says what the keys mean.
"""

import dataclasses
from collections.abc import Sequence

from dspo_jax.limits import AT_LEAST_1, DECAY, FINITE, NOT_NEGATIVE, PROBABILITY, choice, limited
from dspo_jax.samplers import SAMPLERS, samplers_of
from dspo_jax.sampling.rendering import Drawing
from dspo_jax.schedules.process import Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """The keys of `config.stream`."""

    kind: str = choice("dataset", "prompts", "trajectories", "own_pairs", "self_play")
    prompts: Sequence[str]
    images: int = limited(AT_LEAST_1)
    updates: int = limited(AT_LEAST_1)
    batch_size: int = limited(AT_LEAST_1)
    sampler: str | None = choice(
        *("ddim", "ddpm", "euler_ancestral", "flow_ancestral", "flow_euler", "flow_grpo"), optional=True
    )
    eta: float = limited(PROBABILITY)
    num_inference_steps: int = limited(AT_LEAST_1)
    guidance_scale: float = limited(FINITE)
    guidance_rescale: float = limited(PROBABILITY)

    @property
    def needs_prompts(self) -> bool:
        """Whether batches are made of prompts and rewards, and not of `config.data`."""
        return self.kind not in ("dataset", "self_play")

    @property
    def unit(self) -> str:
        """Name of the examples of a batch: "images" or "pairs"."""
        return "images" if self.kind in ("prompts", "trajectories") else "pairs"

    @property
    def drawing(self) -> Drawing:
        """The sampler's settings in training."""
        return Drawing(
            sampler=self.sampler,
            steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            guidance_rescale=self.guidance_rescale,
            eta=self.eta if self.sampler is None or SAMPLERS[self.sampler].eta else 0.0,
        )

    def with_sampler(self, process: Process) -> "StreamSettings":
        """Returns the settings with the sampler that is meant where they name none: of a model's process.

        "ddim"; of rectified flow "flow_euler", or "flow_ancestral" where a policy gradient needs a density.
        """
        names = samplers_of(process)
        if self.kind == "trajectories":
            names = [name for name in names if SAMPLERS[name].eta]
        return dataclasses.replace(self, sampler=self.sampler or names[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """The keys of `config.rewards`."""

    train: str
    validation: Sequence[str]
    folder: str
    prompts: Sequence[str]
    images: int = limited(AT_LEAST_1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """The keys of `config.reference`."""

    model: str | None
    every: int = limited(NOT_NEGATIVE)
    decay: float = limited(DECAY)
    draws: int  # see `reference_errors.check_draws`


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """The keys of `config.advantages`."""

    of: str = choice("prompt", "group", "round")
    deviation: str = choice("group", "global")
    buffer_size: int = limited(AT_LEAST_1)
    min_count: int = limited(AT_LEAST_1)
