"""The keys of configs/encode/common.py as frozen values, parsed and checked once, before anything is encoded.

A field is a key, with its limit beside it; configs/encode/common.py says what the keys mean.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from dspo_jax import limits
from dspo_jax.data.prepare import FLIPS
from dspo_jax.errors import UserError
from dspo_jax.limits import AT_LEAST_1, NOT_NEGATIVE, Limit, choice, limited
from dspo_jax.pipelines.stored import T5_DTYPES

VAE_DTYPES = ("float32", "bfloat16")
"""In float16 SDXL's VAE gives NaN."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """The keys of `config.source`; those that are the source's own are its `arguments`."""

    name: str
    max_skipped: float
    arguments: Mapping[str, object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The keys of `config.text`."""

    max_chunks: int = limited(AT_LEAST_1)
    max_sequence_length: int | None
    store_t5: bool
    t5_dtype: str = choice(*T5_DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """The keys of `config.rewards`."""

    folder: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """The keys of `config.select`."""

    images: str = choice("pairs", "single")
    agree: int = limited(NOT_NEGATIVE)
    top: float = limited(Limit("must be above 0 and at most 1", lambda share: 0 < share <= 1))
    min_gap: float | None = limited(
        Limit("must be a finite number", lambda gap: gap is None or math.isfinite(gap))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """A config of the encoding, its ranges checked."""

    model: str
    resolution: int | None = limited(Limit("must be at least 1", lambda side: side is None or side >= 1))
    max_aspect_ratio: float = limited(AT_LEAST_1)
    bucket_step: int = limited(AT_LEAST_1)
    text: TextSettings
    flip: str = choice(*FLIPS)
    seed: int
    vae_dtype: str = choice(*VAE_DTYPES)
    batch_size: int = limited(AT_LEAST_1)
    num_workers: int | None = limited(Limit("must be at least 0", lambda count: count is None or count >= 0))
    rows_per_shard: int = limited(AT_LEAST_1)
    splits: Sequence[str]
    score: str
    rewards: RewardSettings
    select: SelectSettings
    source: SourceSettings

    @property
    def scores(self) -> list[str]:
        """The rewards that `score` names, of which the first is stored."""
        return [name.strip() for name in self.score.split(",")] if self.score else []


def parse(config: ConfigDict) -> EncodeSettings:
    """Parses the config of an encoding.

    Raises:
      UserError: a key is unknown, missing, not set or out of range.
    """
    if not config.model:
        raise UserError("config.model is not set: give --config.model=MODEL_DIR, a diffusers folder")
    if not config.source.name:
        raise UserError("config.source.name is not set: start from a recipe in configs/encode")
    source = config.source.to_dict()
    common = {key: source.pop(key) for key in ("name", "max_skipped") if key in source}
    values = {**config.to_dict(), "source": {**common, "arguments": source}}
    settings = limits.parse(EncodeSettings, values, "config")
    if not settings.score:
        for key, value in {"images": "pairs", "agree": 0, "top": 1.0, "min_gap": None}.items():
            given = getattr(settings.select, key)
            if given != value:
                raise UserError(
                    f"config.select.{key} = {given!r}: selects by a score; give --config.score=REWARD, too"
                )
    names, agree = settings.scores, settings.select.agree
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"config.score = {settings.score!r}: must be different rewards, separated by commas")
    if agree > len(names):
        raise UserError(
            f"config.select.agree = {agree}: more than the {len(names)} reward(s) of config.score = "
            f"{settings.score!r}; name more of them, separated by commas"
        )
    if len(names) > 1 and not agree:
        raise UserError(
            f"config.score = {settings.score!r}: several rewards are read by config.select.agree alone; give "
            f"--config.select.agree={len(names)}, or one reward"
        )
    return settings
