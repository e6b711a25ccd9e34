"""Bradley-Terry strengths from comparisons by people of different reliability."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
from scipy import optimize
from scipy.special import expit, logsumexp, softmax

_Item = TypeVar("_Item", bound=Hashable)

PRIOR_DEVIATION = 2.0
"""Standard deviation of the normal prior of a strength, which keeps one never beaten finite."""

# Beta prior of a person's reliability: most people tell what they prefer. Votes are integrated over it.
_RIGHT, _WRONG = 10.0, 2.0
_NODES = 100
_MOST_WITH_COVARIANCE = 64  # items


@dataclasses.dataclass(frozen=True, eq=False)
class Strengths(Generic[_Item]):
    """Strengths of items and reliabilities of people.

    Attributes:
      items: what was compared.
      values: [items] strengths, of mean 0; the better wins with probability sigmoid(difference).
      covariance: [items, items] of the strengths, by Laplace's approximation; NaN of more than 64 items.
      reliabilities: by person, the mean of the probability that a vote says what the strengths say.
    """

    items: Sequence[_Item]
    values: np.ndarray
    covariance: np.ndarray
    reliabilities: dict[int, float]


def fit_strengths(comparisons: Sequence[tuple[int, _Item, _Item, float]]) -> Strengths[_Item]:
    """Fits strengths by the mode of their posterior, in which the reliabilities are integrated out.

    A person of reliability r prefers i to j with probability r sigmoid(s_i - s_j) + (1 - r) sigmoid(s_j -
    s_i); a tie is half a vote for each. Strengths and reliabilities fitted together would be too sure: a
    person has few votes.

    Source of the model: Chen et al., "Pairwise Ranking Aggregation in a Crowdsourced Setting", WSDM 2013. The
    priors are ours.

    Args:
      comparisons: (person, item, other item, share), share 1 where the item is preferred, 0.5 for a tie.
    """
    items = list(dict.fromkeys(item for _, one, other, _ in comparisons for item in (one, other)))
    people = list(dict.fromkeys(person for person, *_ in comparisons))
    place, seat = ({each: i for i, each in enumerate(of)} for of in (items, people))
    # Votes of a person on the same two items are counted together: [K], K the different ones.
    counts: dict[tuple[int, int, int], np.ndarray] = {}
    for who, one, other, share in comparisons:
        key = (seat[who], place[one], place[other])
        counts[key] = counts.get(key, np.zeros(2)) + np.array([share, 1 - share])
    person, first, second = np.array(list(counts)).T
    won, lost = np.array(list(counts.values())).T[:, :, None]
    nodes = (np.arange(_NODES) + 0.5) / _NODES
    weights = (_RIGHT - 1) * np.log(nodes) + (_WRONG - 1) * np.log1p(-nodes)

    def weigh(strengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns chances [K, nodes] and log weights of the nodes for each person [people, nodes]."""
        wins = expit(strengths[first] - strengths[second])[:, None]
        chances = nodes * wins + (1 - nodes) * (1 - wins)
        of_person = np.tile(weights, (len(people), 1))
        np.add.at(of_person, person, won * np.log(chances) + lost * np.log1p(-chances))
        return chances, of_person

    def loss(strengths: np.ndarray) -> tuple[float, np.ndarray]:
        chances, of_person = weigh(strengths)
        posterior = softmax(of_person, axis=1)[person]
        wins = expit(strengths[first] - strengths[second])[:, None]
        by_difference = (won / chances - lost / (1 - chances)) * (2 * nodes - 1) * wins * (1 - wins)
        pull = (posterior * by_difference).sum(axis=1)
        slope = np.bincount(first, pull, len(items)) - np.bincount(second, pull, len(items))
        total = logsumexp(of_person, axis=1).sum() - 0.5 * (strengths**2).sum() / PRIOR_DEVIATION**2
        return -float(total), strengths / PRIOR_DEVIATION**2 - slope

    # The opposite strengths with the opposite reliabilities fit as well: start on the side of the votes.
    balance = (won - lost)[:, 0]
    start = np.bincount(first, balance, len(items)) - np.bincount(second, balance, len(items))
    votes = (won + lost)[:, 0]
    start = start / (np.bincount(first, votes, len(items)) + np.bincount(second, votes, len(items)))
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000}).x
    reliabilities = softmax(weigh(found)[1], axis=1) @ nodes
    centre = np.eye(len(items)) - 1 / len(items)
    few = len(items) <= _MOST_WITH_COVARIANCE
    return Strengths(
        items,
        found - found.mean(),
        centre @ _covariance(loss, found) @ centre if few else np.full((len(items),) * 2, np.nan),
        dict(zip(people, reliabilities.tolist(), strict=True)),
    )


def _covariance(loss: Callable[[np.ndarray], tuple[float, np.ndarray]], values: np.ndarray) -> np.ndarray:
    """Inverts the Hessian of the loss, made of differences of its gradient."""
    step = 1e-4
    rows = [
        (loss(values + step * unit)[1] - loss(values - step * unit)[1]) / (2 * step)
        for unit in np.eye(len(values))
    ]
    hessian = np.array(rows)
    return np.linalg.inv((hessian + hessian.T) / 2)
