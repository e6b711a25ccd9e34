"""Bradley-Terry strengths from comparisons by people of different reliability."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
from scipy import optimize
from scipy.special import expit

_Item = TypeVar("_Item", bound=Hashable)

PRIOR_DEVIATION = 2.0
"""Standard deviation of the normal prior of a strength, which keeps one never beaten finite."""

# Beta prior of a person's reliability, with mode 0.9: most people tell what they prefer.
_RIGHT, _WRONG = 10.0, 2.0


@dataclasses.dataclass(frozen=True, eq=False)
class Strengths(Generic[_Item]):
    """Strengths of items and reliabilities of people.

    Attributes:
      items: what was compared.
      values: [items] strengths, of mean 0; the better wins with probability sigmoid(difference).
      covariance: [items, items] of the strengths, by Laplace's approximation.
      reliabilities: by person, the probability that a vote says what the strengths say.
    """

    items: Sequence[_Item]
    values: np.ndarray
    covariance: np.ndarray
    reliabilities: dict[int, float]


def fit_strengths(comparisons: Sequence[tuple[int, _Item, _Item, float]]) -> Strengths[_Item]:
    """Fits strengths and reliabilities by their posterior's mode.

    A person of reliability r prefers i to j with probability r sigmoid(s_i - s_j) + (1 - r) sigmoid(s_j -
    s_i); a tie is half a vote for each.

    Source of the model: Chen et al., "Pairwise Ranking Aggregation in a Crowdsourced Setting", WSDM 2013. The
    priors are ours.

    Args:
      comparisons: (person, item, other item, share), share 1 where the item is preferred, 0.5 for a tie.
    """
    items = list(dict.fromkeys(item for _, one, other, _ in comparisons for item in (one, other)))
    people = list(dict.fromkeys(person for person, *_ in comparisons))
    place, seat = ({each: i for i, each in enumerate(of)} for of in (items, people))
    first = np.array([place[one] for _, one, _, _ in comparisons])
    second = np.array([place[other] for _, _, other, _ in comparisons])
    person = np.array([seat[who] for who, *_ in comparisons])
    share = np.array([value for *_, value in comparisons], np.float64)
    count = len(items)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        strengths, reliability = values[:count], expit(values[count:])
        wins = expit(strengths[first] - strengths[second])
        right = reliability[person]
        chance = np.clip(right * wins + (1 - right) * (1 - wins), 1e-12, 1 - 1e-12)
        fit = share * np.log(chance) + (1 - share) * np.log(1 - chance)
        prior = _RIGHT * np.log(reliability) + _WRONG * np.log1p(-reliability)  # of the logits
        total = fit.sum() + prior.sum() - 0.5 * (strengths**2).sum() / PRIOR_DEVIATION**2
        by_chance = share / chance - (1 - share) / (1 - chance)
        by_difference = by_chance * (2 * right - 1) * wins * (1 - wins)
        slope = np.zeros_like(values)
        np.add.at(slope, first, by_difference)
        np.add.at(slope, second, -by_difference)
        slope[:count] -= strengths / PRIOR_DEVIATION**2
        by_logit = by_chance * (2 * wins - 1) * right * (1 - right)
        np.add.at(slope, count + person, by_logit)
        slope[count:] += _RIGHT * (1 - reliability) - _WRONG * reliability
        return -float(total), -slope

    start = np.concatenate([np.zeros(count), np.full(len(people), np.log(_RIGHT / _WRONG))])
    # A difference of strengths and its sign are told apart by the reliabilities alone: start at the votes.
    np.add.at(start, first, share - 0.5)
    np.add.at(start, second, 0.5 - share)
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000}).x
    covariance = _covariance(loss, found, count) if count <= 64 else np.full((count, count), np.nan)
    centre = np.eye(count) - 1 / count
    return Strengths(
        items,
        found[:count] - found[:count].mean(),
        centre @ covariance @ centre,
        dict(zip(people, expit(found[count:]).tolist(), strict=True)),
    )


def _covariance(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]], values: np.ndarray, count: int
) -> np.ndarray:
    """Inverts the Hessian of the loss, made of differences of its gradient."""
    step = 1e-4
    rows = [
        (loss(values + step * unit)[1] - loss(values - step * unit)[1]) / (2 * step)
        for unit in np.eye(len(values))
    ]
    hessian = np.array(rows)
    return np.linalg.inv((hessian + hessian.T) / 2)[:count, :count]
