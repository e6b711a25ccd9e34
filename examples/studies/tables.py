"""Tables and figures of a sweep: win rates pooled over training seeds, Holm's correction, markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dspo_jax.evaluation.people import Answer, two_way_interval
from dspo_jax.evaluation.win_rates import Estimate, WinRate, compare
from dspo_jax.files import whole
from dspo_jax.json_files import JsonObject


def scores_of(result: JsonObject, reward: str, step: str = "") -> np.ndarray:
    """Returns the scores [prompts, seeds] of a run, at its last judged step unless another is named."""
    steps = result["steps"]
    return np.array(steps[step or max(steps, key=int)]["scores"][reward])


def pool(models: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> tuple[WinRate, Estimate]:
    """Compares a method with another, or with the base, over several training seeds.

    Args:
      models: scores [prompts, seeds] of each training seed of the method.
      others: of the other method, as many, on the same prompts and noise; or of the base alone.

    Returns:
      The win rate of all images together, whose sign test is over prompts; and its interval over prompts and
      training seeds (a bootstrap of both, Owen 2007): other prompts and other trainings would give something
      else. With one training seed it is over prompts alone; with three it is still too narrow.
    """
    others = _for_each(models, others)
    together = compare(np.concatenate(models, axis=1), np.concatenate(others, axis=1))
    if len(models) == 1:
        return together, together.share
    wins = [(ours > theirs) + (ours == theirs) / 2 for ours, theirs in zip(models, others, strict=True)]
    return together, _interval(wins)


def change(models: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Estimate:
    """Returns the mean difference of two methods' scores of the same image; as `pool`, but for the size."""
    pairs = zip(models, _for_each(models, others), strict=True)
    return _interval([ours - theirs for ours, theirs in pairs])


def _for_each(models: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    return list(others) * len(models) if len(others) == 1 else others


def _interval(values: Sequence[np.ndarray]) -> Estimate:
    """Mean of values [prompts, seeds] of each training seed, and its interval over prompts and trainings."""
    answers = [
        Answer("", prompt, (seed, seed), training, float(value))
        for training, of_training in enumerate(values)
        for (prompt, seed), value in np.ndenumerate(of_training)
    ]
    return two_way_interval(answers, [answer.share for answer in answers])


def per_cent(share: Estimate) -> str:
    """Returns a win rate with its interval."""
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table; a bar within a cell does not end it."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def share_of(row: Mapping[str, Any]) -> Estimate:
    """Returns the win rate of a row of a table."""
    return Estimate(row["win_rate"], row["low"], row["high"])


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values that hold for all comparisons at once (Holm 1979), in the order that they came in.

    The k-th smallest of m, k from 0, is multiplied by m - k; none may be below the one before it, or above 1.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, (len(p_values) - rank) * p_values[number])
        adjusted[number] = min(1.0, highest)
    return adjusted


def draw_medians(
    table: Sequence[Mapping[str, Any]], key: str, medians: Mapping[str, float], file: Path
) -> None:
    """Draws the median and the quartiles of every reward over a numeric key, and the base's median.

    Args:
      table: rows with `reward`, `quartiles` and the key.
      key: what is varied.
      medians: of the base, by reward.
      file: the PNG.
    """
    rewards = list(dict.fromkeys(row["reward"] for row in table))
    figure = Figure(figsize=(5 * len(rewards), 4), layout="constrained")
    for axis, reward in zip(figure.subplots(1, len(rewards), squeeze=False)[0], rewards, strict=True):
        rows = sorted((row for row in table if row["reward"] == reward), key=lambda row: row[key])
        at, quartiles = [row[key] for row in rows], np.array([row["quartiles"] for row in rows])
        axis.plot(at, quartiles[:, 1], marker="o", label="median")
        axis.fill_between(at, quartiles[:, 0], quartiles[:, 2], alpha=0.2, label="quartiles")
        axis.axhline(medians[reward], color="gray", linestyle="--", label="median of the base")
        if min(at) > 0:
            axis.set_xscale("log")
            axis.set_xticks(at, [f"{value:g}" for value in at])
            axis.minorticks_off()
        axis.set(xlabel=key, ylabel=reward)
        axis.legend()
    with whole(file) as partial:
        figure.savefig(partial, format="png", dpi=120)
