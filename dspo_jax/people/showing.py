"""What a person sees next: blind, in an order and on sides that follow from (seed, group, person) alone."""

import random
from collections import Counter
from typing import NamedTuple

from dspo_jax.people.votes import SKIP, Choice, Showing, Vote, VoteStore

REPEAT_AFTER = 10
"""Showings between a group and its repetition, so that few remember what they said."""
_RECENT, _FEWEST = 20, 5  # votes that the rate is computed of


class Progress(NamedTuple):
    """How far a person is.

    Attributes:
      done: groups judged, repetitions and checks among them.
      left: groups that are still to be judged.
      votes_per_minute: of the last votes; None before there are five.
    """

    done: int
    left: int
    votes_per_minute: float | None


class Showings:
    """Chooses what is shown, from what was shown before; a server that starts again goes on where it was."""

    def __init__(self, store: VoteStore):
        """Reads what was shown and voted."""
        self._store = store
        self._asked = list(store.plan.questions)
        self._of_person: dict[int, list[Showing]] = {}
        self._votes: dict[int, dict[str, Vote]] = {}  # by showing and question
        self._judged: Counter[int] = Counter()  # people who judged a group
        self._orders: dict[tuple[int, bool], list[int]] = {}
        for showing in store.showings():
            self._of_person.setdefault(showing.person, []).append(showing)
        for vote in store.votes():
            self._add(vote)

    def current(self, person: int, name: str) -> tuple[Showing, str] | None:
        """Returns what a person is to judge now and the question about it, or None when all is done.

        It stays the same until it is judged, however often it is asked for.
        """
        for showing in self._of_person.get(person, []):
            if question := self._open_question(showing):
                return showing, question
        chosen = self._choose(person, name)
        if chosen is None:
            return None
        group, repeats = chosen
        places = self._places(group, name, repeats)
        showing = self._store.show(person, group, places, repeats.number if repeats else None)
        self._of_person.setdefault(person, []).append(showing)
        return showing, self._asked[0]

    def find(self, person: int, number: int) -> Showing | None:
        """Returns a showing of that person."""
        return next((each for each in self._of_person.get(person, []) if each.number == number), None)

    def vote(self, showing: Showing, question: str, choice: Choice) -> bool:
        """Notes a vote; returns False, and changes nothing, where another choice stands."""
        vote = self._store.vote(showing.number, question, choice)
        if vote is None:
            return False
        if question not in self._votes.get(showing.number, {}):
            self._add(vote)
        return True

    def undo(self, person: int, number: int) -> bool:
        """Takes back a person's last vote if that is its number; returns False where it is not."""
        last = self.last_vote(person)
        if last is None or last.number != number:
            return False
        self._store.withdraw(last.number)
        showing = last.showing
        counted = self._counts(showing)
        del self._votes[showing.number][last.question]
        self._judged[showing.group] += self._counts(showing) - counted
        return True

    def last_vote(self, person: int) -> Vote | None:
        """Returns the last vote of a person that stands."""
        votes = self._votes_of(person)
        return votes[-1] if votes else None

    def progress(self, person: int) -> Progress:
        """Returns how far a person is."""
        shown = self._of_person.get(person, [])
        done = sum(self._open_question(showing) is None for showing in shown)
        recent = [vote.time for vote in self._votes_of(person)[-_RECENT:]]
        rate = None
        if len(recent) >= _FEWEST and recent[-1] > recent[0]:
            rate = 60 * (len(recent) - 1) / (recent[-1] - recent[0])
        return Progress(done, len(self._left(person)) + len(shown) - done, rate)

    def _votes_of(self, person: int) -> list[Vote]:
        votes = [
            vote
            for showing in self._of_person.get(person, [])
            for vote in self._votes.get(showing.number, {}).values()
        ]
        return sorted(votes, key=lambda vote: vote.number)

    def _open_question(self, showing: Showing) -> str | None:
        answered = self._votes.get(showing.number, {})
        return next((name for name in self._asked if name not in answered), None)

    def _add(self, vote: Vote) -> None:
        counted = self._counts(vote.showing)
        self._votes.setdefault(vote.showing.number, {})[vote.question] = vote
        self._judged[vote.showing.group] += self._counts(vote.showing) - counted

    def _counts(self, showing: Showing) -> bool:
        """Tells whether a showing is a judgement of its group: the first one, and not skipped."""
        votes = self._votes.get(showing.number, {}).values()
        return showing.repeats is None and any(vote.choice != SKIP for vote in votes)

    def _left(self, person: int) -> list[int]:
        """Returns the groups that a person has not seen and that need more judgements."""
        seen = {showing.group for showing in self._of_person.get(person, [])}
        most = self._store.plan.votes_per_group
        return [
            number
            for number, group in enumerate(self._store.groups)
            if group.answer is None and number not in seen and not 0 < most <= self._judged[number]
        ]

    def _choose(self, person: int, name: str) -> tuple[int, Showing | None] | None:
        """Chooses a group that is shown next, and the showing that it repeats."""
        left = set(self._left(person))
        if not left:
            return None
        plan, shown = self._store.plan, self._of_person.get(person, [])
        draw = self._random("kind", len(shown), name).random()
        if draw < plan.repeat_share:
            repeated = {showing.repeats for showing in shown}
            for showing in shown[:-REPEAT_AFTER]:
                is_opinion = self._store.groups[showing.group].answer is None
                if is_opinion and showing.number not in repeated and self._counts(showing):
                    return showing.group, showing
        elif draw < plan.repeat_share + plan.check_share:
            seen = {showing.group for showing in shown}
            unseen = [number for number in self._order(person, name, checks=True) if number not in seen]
            if unseen:
                return unseen[0], None
        order = (number for number in self._order(person, name, checks=False) if number in left)
        return min(order, key=self._judged.__getitem__), None

    def _order(self, person: int, name: str, *, checks: bool) -> list[int]:
        if (person, checks) not in self._orders:
            numbers = [i for i, each in enumerate(self._store.groups) if (each.answer is not None) == checks]
            self._random("order", checks, name).shuffle(numbers)
            numbers.sort(key=lambda number: -self._store.groups[number].disagreement)
            self._orders[person, checks] = numbers
        return self._orders[person, checks]

    def _places(self, group: int, name: str, repeats: Showing | None) -> tuple[int, ...]:
        """Returns a group's images from left to right; repeated, they stand the other way round."""
        if repeats is not None:
            return repeats.places[::-1]
        places = list(range(len(self._store.groups[group].images)))
        self._random("places", group, name).shuffle(places)
        return tuple(places)

    def _random(self, what: str, number: object, name: str) -> random.Random:
        return random.Random(f"{self._store.plan.seed}/{what}/{number}/{name}")
