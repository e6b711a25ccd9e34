"""Scalars of a validation from the errors of each image: implicit accuracy, margin, errors by timestep."""

import math
from collections.abc import Mapping

import numpy as np

_Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal


def binomial_interval(successes: float, n: int) -> tuple[float, float]:
    """Computes Wilson's 95 % interval for a share, which stays in [0, 1] and holds for small n.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.

    Args:
      successes: how many of `n`; ties may count one half.
      n: number of independent trials; 0 gives (0, 1).

    Raises:
      ValueError: `successes` is not between 0 and `n`.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes = {successes}: must lie between 0 and n = {n}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + _Z_95**2 / (2 * n)) / (1 + _Z_95**2 / n)
    half = _Z_95 / (1 + _Z_95**2 / n) * math.sqrt(share * (1 - share) / n + _Z_95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(
    values: np.ndarray, timesteps: np.ndarray, scores: np.ndarray | None = None
) -> dict[str, float]:
    """Returns the scalars that `Validator` reports.

    Args:
      values: [S, D, N, P]: S = 2 (error, drift) or 1 (error) x draw x example x image (winner, loser).
      timesteps: [D].
      scores: [N, P], of lists.
    """
    drifts_DNP = values[-1]
    if scores is not None:
        ends_N2 = np.stack([scores.argmax(1), scores.argmin(1)], axis=1)
        values = np.take_along_axis(values, ends_N2[None, None], axis=3)
    images = ("winner", "loser")[: values.shape[3]]
    measures = ("error", "drift")[: len(values)]
    means_SDP = values.mean(2)
    summary = {
        f"{image}_{measure}": float(means_SDP[s, :, p].mean())
        for s, measure in enumerate(measures)
        for p, image in enumerate(images)
    }
    for d, timestep in enumerate(timesteps):
        for p, image in enumerate(images):
            summary[f"{image}_{measures[-1]}_t{timestep}"] = float(means_SDP[-1, d, p])
    if measures[-1] != "drift" or len(images) == 1:
        return summary
    margins_DN = values[1, :, :, 1] - values[1, :, :, 0]
    correct_N = _correct(drifts_DNP.mean(0), scores)
    low, high = binomial_interval(correct_N.sum(), len(correct_N))
    summary |= {
        "margin": float(margins_DN.mean()),
        "implicit_accuracy": float(correct_N.mean()),
        "implicit_accuracy_low": low,
        "implicit_accuracy_high": high,
        "num_pairs" if scores is None else "num_lists": len(correct_N),
    }
    for timestep, margins_N, drifts_NP in zip(timesteps, margins_DN, drifts_DNP, strict=True):
        summary[f"margin_t{timestep}"] = float(margins_N.mean())
        summary[f"implicit_accuracy_t{timestep}"] = float(_correct(drifts_NP, scores).mean())
    return summary


def summarise_labelled(values: np.ndarray, timesteps: np.ndarray, liked: np.ndarray) -> dict[str, float]:
    """Returns the scalars that `Validator` reports of labelled images.

    Args:
      values: [2, D, N]: (error, drift) x draw x image.
      timesteps: [D].
      liked: [N], the probability that each image is liked; some are above and some below 1/2.
    """
    weights_N2 = np.stack([liked, 1 - liked], axis=1).astype(np.float64)
    weights_N2 /= weights_N2.sum(0)
    summary = {}
    for values_DN, measure in zip(values, ("error", "drift"), strict=True):
        means_D2 = values_DN @ weights_N2
        for means_D, image in zip(means_D2.T, ("winner", "loser"), strict=True):
            summary[f"{image}_{measure}"] = float(means_D.mean())
            if measure == "drift":
                summary |= {
                    f"{image}_drift_t{t}": float(each) for t, each in zip(timesteps, means_D, strict=True)
                }
    rewards_DN = -values[1]
    for end, rewards_N in [
        ("", rewards_DN.mean(0)),
        *((f"_t{t}", rewards_N) for t, rewards_N in zip(timesteps, rewards_DN, strict=True)),
    ]:
        summary[f"margin{end}"] = summary[f"loser_drift{end}"] - summary[f"winner_drift{end}"]
        summary[f"implicit_accuracy{end}"] = _share_above(rewards_N, liked)
    return summary | {"num_images": len(liked)}


def format_accuracy(scores: Mapping[str, float]) -> str:
    """Formats the implicit accuracy of a validation, with its interval where there is one."""
    text = f"{scores['implicit_accuracy']:.3f}"
    if "implicit_accuracy_low" in scores:
        text += f" [{scores['implicit_accuracy_low']:.3f}, {scores['implicit_accuracy_high']:.3f}]"
    for unit in ("pairs", "lists", "images"):
        if f"num_{unit}" in scores:
            text += f" of {scores[f'num_{unit}']:,.0f} {unit}"
    return text


def _share_above(rewards: np.ndarray, liked: np.ndarray) -> float:
    """Returns the area under the ROC curve: how often a liked image has a higher reward than a disliked one.

    Ties count one half, and a reward that is not a number is wrong. An image of a soft label is both, and not
    compared with itself.
    """
    liked = liked.astype(np.float64)
    disliked = 1 - liked
    number = ~np.isnan(rewards)
    _, place = np.unique(rewards[number], return_inverse=True)
    equal = np.bincount(place, disliked[number])
    below = np.cumsum(equal) - equal
    right = liked[number] * (below[place] + 0.5 * (equal[place] - disliked[number]))
    return float(right.sum() / (liked.sum() * disliked.sum() - (liked * disliked).sum()))


def _correct(drifts: np.ndarray, scores: np.ndarray | None) -> np.ndarray:
    """Scores the ranking by rewards, which are minus the drifts, of each pair or list, [N].

    A pair of images counts 1 where it is ranked as people did, 1/2 where the rewards are equal, and 0 else
    and where a drift is not a number; a list the mean over its pairs of different scores, 1/2 where it has
    none.

    Args:
      drifts: [N, P]; of pairs the winner's, the loser's.
      scores: [N, P], of lists.
    """
    if scores is None:
        scores = np.asarray([[1.0, 0.0]])
    above = scores[:, :, None] > scores[:, None, :]
    margins = drifts[:, None, :] - drifts[:, :, None]
    right = np.where(np.isnan(margins), 0.0, 0.5 + 0.5 * np.sign(margins))
    number = above.sum((1, 2))
    return np.where(number > 0, (right * above).sum((1, 2)) / np.maximum(number, 1), 0.5)
