"""Win rates of a model over its base, with intervals and a sign test; rejection sampling of the base."""

import dataclasses
import functools
from typing import Literal

import numpy as np
from scipy import stats

from dspo_jax.errors import UserError

Verdict = Literal["better", "worse", "undecided"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


def decide(share: Estimate, p_value: float) -> Verdict:
    """Returns the verdict of an interval of a win rate and of a sign test: both must be clear."""
    if p_value >= 0.05 or share.low <= 0.5 <= share.high:
        return "undecided"
    return "better" if share.low > 0.5 else "worse"


@dataclasses.dataclass(frozen=True)
class WinRate:
    """A model against its base under one reward.

    Attributes:
      share: in [0, 1], of the images that score higher than the base's of the same prompt and seed; ties
        count one half.
      images_won, images_tied, images_lost: images that score higher than the base's, the same, and lower.
      per_seed: `share` of each seed by itself; `share` is their mean.
      won, lost, tied: prompts, counted as the sign test counts them.
      p_value: of the sign test, two-sided.
      mean_reward, base_mean_reward: over all prompts and seeds.
    """

    share: Estimate
    images_won: int
    images_tied: int
    images_lost: int
    per_seed: tuple[float, ...]
    won: int
    lost: int
    tied: int
    p_value: float
    mean_reward: Estimate
    base_mean_reward: Estimate

    @property
    def verdict(self) -> Verdict:
        """Better or worse than the base, if the interval is on one side of one half and p is below 0.05."""
        return decide(self.share, self.p_value)


@dataclasses.dataclass(frozen=True, eq=False)
class Rejection:
    """Rejection sampling: the best of several draws of the base against one draw of the model.

    Attributes:
      win_rate: [D] of the best of 1, 2, ... D draws; ties count one half.
      mean_draws, median_draws: until one scores higher than the model's; where no draw does it counts D.
      never: share of the prompts (and the model's seeds) for which no draw does.
      images_won, images_tied, images_lost: by the best of all D draws, of the model's images.
    """

    win_rate: np.ndarray
    mean_draws: float
    median_draws: int
    never: float
    images_won: int
    images_tied: int
    images_lost: int


def compare(model: np.ndarray, base: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> WinRate:
    """Compares scores of a model and its base, pair by pair.

    The intervals are percentile bootstraps over prompts: a resample draws prompts with replacement, and of
    each prompt takes all seeds, as images of one prompt are not independent. The sign test is over prompts
    too: with several seeds a prompt is won if more of its seeds are won than lost, and where as many are won
    as lost the prompt is left out.

    Args:
      model: scores [prompts, seeds]; higher is better.
      base: scores [prompts, seeds] of the base.
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      UserError: scores of different shapes, of no prompt, or NaN.
    """
    _check(model, base)
    if model.shape != base.shape:
        raise UserError(f"scores of shape {model.shape} against {base.shape}: must be of the same images")
    wins = (model > base) + (model == base) / 2
    by_prompt = np.stack([a.mean(axis=1, dtype=np.float64) for a in (wins, model, base)], axis=1)
    low, high = _bootstrap(by_prompt, resamples, seed)
    share, mean_reward, base_mean_reward = (
        Estimate(*map(float, column)) for column in zip(by_prompt.mean(axis=0), low, high, strict=True)
    )
    signs = np.sign((model > base).sum(axis=1) - (model < base).sum(axis=1))
    won, lost = int((signs > 0).sum()), int((signs < 0).sum())
    return WinRate(
        share=share,
        images_won=int((model > base).sum()),
        images_tied=int((model == base).sum()),
        images_lost=int((model < base).sum()),
        per_seed=tuple(wins.mean(axis=0).tolist()),
        won=won,
        lost=lost,
        tied=len(signs) - won - lost,
        p_value=float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0,
        mean_reward=mean_reward,
        base_mean_reward=base_mean_reward,
    )


def reject(model: np.ndarray, base: np.ndarray) -> Rejection:
    """Computes how often the best of several draws of the base beats one image of the model.

    Every value is an expectation over which draws are taken, without replacement, computed from how many
    draws score below, the same as and above the model's. A draw suffices if it scores higher.

    Source: Wallace et al. 2024, supplement S9 and Fig. S5.

    Args:
      model: scores [prompts, seeds]; each is compared with all draws of its prompt.
      base: scores [prompts, D] of the draws.

    Raises:
      UserError: scores of different prompts, of no prompt, or NaN.
    """
    _check(model, base)
    if len(model) != len(base):
        raise UserError(f"scores of {len(model)} prompts against {len(base)}: must be of the same prompts")
    draws = base.shape[1]
    lower = (base[:, None] < model[:, :, None]).sum(axis=-1)
    not_higher = (base[:, None] <= model[:, :, None]).sum(axis=-1)
    # [a, n]: the probability that n of D draws are all among the a lowest, C(a, n) / C(D, n).
    among, n = np.arange(draws + 1)[:, None], np.arange(draws)
    factors = np.maximum(among - n, 0) / (draws - n)
    all_among = np.concatenate([np.ones((draws + 1, 1)), np.cumprod(factors, axis=1)], axis=1)
    no_win, no_higher = (
        np.bincount(counts.ravel(), minlength=draws + 1) / counts.size @ all_among
        for counts in (lower, not_higher)
    )
    return Rejection(
        win_rate=1 - (no_win[1:] + no_higher[1:]) / 2,
        mean_draws=float(no_higher[:-1].sum()),
        median_draws=int(np.argmax(np.append(no_higher[1:-1], 0.0) <= 0.5 + 1e-9)) + 1,
        never=float(no_higher[-1]),
        images_won=int((not_higher < draws).sum()),
        images_tied=int(((lower < draws) & (not_higher == draws)).sum()),
        images_lost=int((lower == draws).sum()),
    )


def _check(model: np.ndarray, base: np.ndarray) -> None:
    for name, scores in (("the model", model), ("the base", base)):
        if scores.ndim != 2 or not scores.size:
            raise UserError(f"scores of {name}: of shape {scores.shape}; must be [prompts, images] of some")
        if np.isnan(scores).any():
            prompt, column = np.argwhere(np.isnan(scores))[0]
            raise UserError(f"scores of {name}: NaN for prompt {prompt}, image {column}")


def _bootstrap(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Percentiles 2.5 and 97.5, [2, K], of the mean of rows drawn with replacement from values [N, K]."""
    parts = np.array_split(draw_counts(len(values), resamples, seed), max(1, resamples // 500))
    means = np.concatenate([part.astype(float) @ values for part in parts]) / len(values)
    return np.percentile(means, [2.5, 97.5], axis=0)


@functools.lru_cache(maxsize=32)  # to draw takes longer than the means, and every reward has the same prompts
def draw_counts(count: int, resamples: int, seed: int) -> np.ndarray:
    """Returns how often each of `count` rows is in each resample: [resamples, count]."""
    draw = np.random.default_rng(seed)
    counts = np.empty((resamples, count), np.uint16)
    for row in counts:
        row[:] = np.bincount(draw.integers(count, size=count), minlength=count)
    return counts
