"""Votes as comparisons of two images, with the people who fail attention checks left out."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from dspo_jax.errors import UserError
from dspo_jax.people.groups import ImageFile
from dspo_jax.people.votes import SKIP, TIE, Choice, Vote, VoteStore


class Judgement(NamedTuple):
    """A person's preference between two images of a group.

    Attributes:
      person: number of the person.
      group: number of the group.
      prompt: of the group.
      first, second: the images; first is before second in the group.
      share: 1.0 where the first is preferred, 0.5 for a tie, 0.0 where the second is.
    """

    person: int
    group: int
    prompt: str
    first: ImageFile
    second: ImageFile
    share: float


class Checks(NamedTuple):
    """Attention checks of a person."""

    passed: int
    answered: int


def count_checks(store: VoteStore) -> dict[int, Checks]:
    """Counts the attention checks of everybody who voted; any question counts, skipped ones fail."""
    found: dict[int, Checks] = {}
    for vote in store.votes():
        person, answer = vote.showing.person, store.groups[vote.showing.group].answer
        passed, answered = found.get(person, Checks(0, 0))
        if answer is not None:
            passed, answered = passed + (vote.choice == answer), answered + 1
        found[person] = Checks(passed, answered)
    return found


def read_judgements(store: VoteStore, question: str, *, min_checks: float = 0.0) -> list[Judgement]:
    """Returns what people said, once for each group and person: without repetitions and checks.

    Args:
      store: the votes.
      question: name of the question.
      min_checks: share of attention checks that a person must pass to be counted; who met none counts.

    Raises:
      UserError: nobody was asked that question, or `min_checks` is no share.
    """
    if question not in store.plan.questions:
        asked = ", ".join(store.plan.questions)
        raise UserError(f"--question={question}: not asked in {store.path}; asked: {asked}")
    if not 0 <= min_checks <= 1:
        raise UserError(f"--min_checks={min_checks}: must be from 0 to 1")
    trusted = {
        person
        for person, checks in count_checks(store).items()
        if checks.passed >= min_checks * checks.answered
    }
    found = [
        judgement
        for vote in store.votes()
        if vote.question == question and vote.showing.person in trusted
        if vote.showing.repeats is None and store.groups[vote.showing.group].answer is None
        for judgement in _compare(store, vote)
    ]
    return sorted(found, key=lambda each: (each.group, each.person))  # when somebody voted stays out


def count_consistent(store: VoteStore, question: str) -> tuple[int, int]:
    """Returns how many repeated groups got the same answer, and how many were repeated.

    They are shown the other way round; who always says left is not consistent.
    """
    choices: dict[int, Choice] = {}
    repeated: list[tuple[int, Choice]] = []
    for vote in store.votes():
        if vote.question == question and vote.choice != SKIP:
            choices[vote.showing.number] = vote.choice
            if vote.showing.repeats is not None:
                repeated.append((vote.showing.repeats, vote.choice))
    pairs = [(choices[first], again) for first, again in repeated if first in choices]
    return sum(first == again for first, again in pairs), len(pairs)


def _compare(store: VoteStore, vote: Vote) -> Iterator[Judgement]:
    group, choice = store.groups[vote.showing.group], vote.choice
    images = group.images
    if choice == SKIP:
        return
    for i, j in itertools.combinations(range(len(images)), 2):
        if choice == TIE:
            share = 0.5
        elif isinstance(choice, tuple):
            share = float(choice.index(i) < choice.index(j))
        else:
            share = float(choice == i)
        yield Judgement(vote.showing.person, vote.showing.group, group.prompt, images[i], images[j], share)
