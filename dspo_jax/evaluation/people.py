"""People's votes on the images of an evaluation: win rates, and how people and rewards agree."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from dspo_jax.errors import UserError
from dspo_jax.evaluation.image_folders import Images
from dspo_jax.evaluation.prompt_sets import PromptSet
from dspo_jax.evaluation.win_rates import Estimate, Verdict, decide, draw_counts
from dspo_jax.files import sha256
from dspo_jax.people.judgements import Judgement, count_consistent, read_judgements
from dspo_jax.people.votes import open_votes

_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class PeopleWinRate:
    """A model against its base by people's votes.

    Attributes:
      share: in [0, 1], of the votes for the model's image; ties count one half.
      images_won, images_tied, images_lost: votes for the model's image, for neither, for the base's.
      won, lost, tied: prompts with more votes for the model, for the base, and as many.
      p_value: of the sign test over prompts, two-sided.
    """

    share: Estimate
    images_won: int
    images_tied: int
    images_lost: int
    won: int
    lost: int
    tied: int
    p_value: float

    @property
    def verdict(self) -> Verdict:
        """Better or worse than the base, if the interval is on one side of one half and p is below 0.05."""
        return decide(self.share, self.p_value)


@dataclasses.dataclass(frozen=True)
class PeopleAnswers:
    """Votes on one question.

    Attributes:
      win_rates: by model, of those that were voted on.
      votes, people, prompts: numbers of those.
      alpha: Krippendorff's, of pairs that several people judged; None where there is nothing to compare.
      consistent, repeated: pairs shown again that got the same answer, and all of them.
      agreement: reward -> share of the votes that are no ties for which the reward scores the preferred image
        higher; a tie of the reward counts one half. None where there is no such vote.
    """

    win_rates: Mapping[str, PeopleWinRate]
    votes: int
    people: int
    prompts: int
    alpha: float | None
    consistent: int
    repeated: int
    agreement: Mapping[str, Estimate | None]


class Votes(NamedTuple):
    """Votes on one question as they were read.

    Attributes:
      judgements: on pairs of images.
      consistent, repeated: as in `PeopleAnswers`.
    """

    judgements: Sequence[Judgement]
    consistent: int
    repeated: int


class Answer(NamedTuple):
    """A vote on a model's image and the base's; share 1 is for the model."""

    model: str
    prompt: int
    seeds: tuple[int, int]  # of the model's image and of the base's
    person: int
    share: float


def read_votes(path: Path, *, min_checks: float = 0.0) -> dict[str, Votes]:
    """Reads the votes that `collect` wrote, by question.

    Raises:
      FileNotFoundError: no such file.
      UserError: it holds no votes, or `min_checks` is no share.
    """
    store = open_votes(path)
    try:
        votes = {
            question: Votes(
                read_judgements(store, question, min_checks=min_checks), *count_consistent(store, question)
            )
            for question in store.plan.questions
        }
    finally:
        store.close()
    if not any(each.judgements for each in votes.values()):
        raise UserError(f"--people={path}: holds no votes; collect some first")
    return votes


def assess_votes(
    votes: Mapping[str, Votes],
    prompts: PromptSet,
    images: Mapping[str, Images],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    base: str,
) -> dict[str, PeopleAnswers]:
    """Computes win rates and agreement by question, of the votes on a model's image beside the base's.

    Images are found by their content, so that it does not matter where people saw them.

    Args:
      votes: by question.
      prompts, images, scores: of the evaluation.
      base: label of the base.

    Raises:
      UserError: no vote is on images of this evaluation.
    """
    places: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for label, of_label in images.items():
        for number, files in enumerate(of_label.files):
            for seed, file in enumerate(files):
                key = (prompts.prompts[number].text, sha256(file))
                places.setdefault(key, []).append((label, number, seed))
    answers = {
        question: [answer for each in found.judgements for answer in _find(each, places, base)]
        for question, found in votes.items()
    }
    if not any(answers.values()):
        raise UserError(
            "--people: no vote is on an image of a model of this evaluation beside the base's of the same "
            "prompt; give collect the folders eval/images/base and eval/images/NAME"
        )
    return {
        question: _assess(found, votes[question], images, scores, base)
        for question, found in answers.items()
        if found
    }


def _find(
    judgement: Judgement, places: Mapping[tuple[str, str], Sequence[tuple[str, int, int]]], base: str
) -> list[Answer]:
    """Returns a vote as an answer for every model that drew one image, where the other is the base's."""
    found: dict[str, Answer] = {}
    first, second = (
        places.get((judgement.prompt, image.sha256), []) for image in (judgement.first, judgement.second)
    )
    for ours, theirs, share in ((first, second, judgement.share), (second, first, 1 - judgement.share)):
        for label, number, seed in ours:
            for other, other_number, other_seed in theirs:
                if label != base and other == base and number == other_number and label not in found:
                    found[label] = Answer(label, number, (seed, other_seed), judgement.person, share)
    return list(found.values())


def _assess(
    answers: Sequence[Answer],
    votes: Votes,
    images: Mapping[str, Images],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    base: str,
) -> PeopleAnswers:
    win_rates = {}
    for label in images:
        of_label = [answer for answer in answers if answer.model == label]
        if of_label:
            win_rates[label] = _win_rate(of_label)
    units: dict[object, list[float]] = {}
    for answer in answers:
        units.setdefault((answer.model, answer.prompt, answer.seeds), []).append(answer.share)
    clear = [answer for answer in answers if answer.share != 0.5]
    agreement: dict[str, Estimate | None] = {}
    for reward in scores[base]:
        agreed = []
        for model, prompt, (seed, base_seed), _, share in clear:
            higher = np.sign(scores[model][reward][prompt, seed] - scores[base][reward][prompt, base_seed])
            agreed.append(0.5 + 0.5 * float(higher) * (1 if share > 0.5 else -1))
        agreement[reward] = two_way_interval(clear, agreed) if clear else None
    return PeopleAnswers(
        win_rates,
        len(answers),
        len({answer.person for answer in answers}),
        len({answer.prompt for answer in answers}),
        krippendorff_alpha(list(units.values())),
        votes.consistent,
        votes.repeated,
        agreement,
    )


def _win_rate(answers: Sequence[Answer]) -> PeopleWinRate:
    shares = np.array([answer.share for answer in answers])
    balance: dict[int, float] = {}
    for answer in answers:
        balance[answer.prompt] = balance.get(answer.prompt, 0.0) + answer.share - 0.5
    signs = np.sign(list(balance.values()))
    won, lost = int((signs > 0).sum()), int((signs < 0).sum())
    return PeopleWinRate(
        share=two_way_interval(answers, shares),
        images_won=int((shares > 0.5).sum()),
        images_tied=int((shares == 0.5).sum()),
        images_lost=int((shares < 0.5).sum()),
        won=won,
        lost=lost,
        tied=len(signs) - won - lost,
        p_value=float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0,
    )


def two_way_interval(
    answers: Sequence[Answer], values: Sequence[float] | np.ndarray, *, seed: int = 0
) -> Estimate:
    """Returns the mean of votes and its 95 % interval, a percentile bootstrap over prompts and over people.

    A resample draws prompts and people with replacement, each for itself; a vote counts as often as its
    prompt times its person. Other prompts and other people would have given something else; drawing votes
    alone would be too sure.

    Source: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007, section 2.

    Args:
      answers: the votes.
      values: a number for each.
      seed: of the bootstrap.
    """
    prompts = list(dict.fromkeys(answer.prompt for answer in answers))
    people = list(dict.fromkeys(answer.person for answer in answers))
    row, column = ({each: i for i, each in enumerate(of)} for of in (prompts, people))
    totals, counts = np.zeros((2, len(prompts), len(people)))
    for answer, value in zip(answers, values, strict=True):
        totals[row[answer.prompt], column[answer.person]] += value
        counts[row[answer.prompt], column[answer.person]] += 1
    of_prompts = draw_counts(len(prompts), _RESAMPLES, seed).astype(float)
    of_people = draw_counts(len(people), _RESAMPLES, seed + 1).astype(float)
    total, count = (np.einsum("rk,rk->r", of_prompts @ cells, of_people) for cells in (totals, counts))
    means = total[count > 0] / count[count > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(np.mean(values)), float(low), float(high))


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> float | None:
    """Returns Krippendorff's alpha with the interval metric, a tie lying halfway.

    1 is perfect agreement, 0 what chance would give. Source: Krippendorff, "Computing Krippendorff's
    Alpha-Reliability", 2011, sections D and F.

    Args:
      units: of each pair, what people said of it.

    Returns:
      None where no pair was judged by two people, or all said the same of all.
    """
    shared = [np.asarray(unit, float) for unit in units if len(unit) > 1]
    if not shared:
        return None

    def differences(values: np.ndarray) -> float:
        """Sums the squared differences of every two values, in either order."""
        return float(2 * (len(values) * (values**2).sum() - values.sum() ** 2))

    every = np.concatenate(shared)
    observed = sum(differences(unit) / (len(unit) - 1) for unit in shared) / len(every)
    expected = differences(every) / (len(every) * (len(every) - 1))
    return 1 - observed / expected if expected > 1e-12 else None
