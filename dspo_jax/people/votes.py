"""Votes in an SQLite file: what was shown to whom, and what they said; nothing acknowledged is ever lost."""

import dataclasses
import json
import secrets
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dspo_jax.errors import UserError
from dspo_jax.people import stored_groups
from dspo_jax.people.groups import Group

TIE, SKIP = "tie", "skip"
"""Choices beside the images themselves."""

Choice = str | int | tuple[int, ...]
"""`TIE`, `SKIP`, the number of the better image of a group, or the numbers of its images, best first."""

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE sessions (digest TEXT PRIMARY KEY, person INTEGER NOT NULL REFERENCES people(id));
CREATE TABLE showings (
  id INTEGER PRIMARY KEY, person INTEGER NOT NULL REFERENCES people(id),
  shown INTEGER NOT NULL REFERENCES groups(id), places TEXT NOT NULL,
  repeats INTEGER REFERENCES showings(id), since REAL NOT NULL
);
CREATE INDEX showings_of ON showings(person);
CREATE TABLE votes (
  id INTEGER PRIMARY KEY, showing INTEGER NOT NULL REFERENCES showings(id), question TEXT NOT NULL,
  choice TEXT NOT NULL, since REAL NOT NULL, withdrawn REAL
);
CREATE UNIQUE INDEX one_vote ON votes(showing, question) WHERE withdrawn IS NULL;
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a collection of votes is made; fixed when its file is made.

    Attributes:
      questions: name -> the question as people read it, in the order in which they are asked.
      seed: of order, sides, repeats and checks.
      repeat_share: of what is shown, the share that the person has judged before.
      check_share: the share of attention checks.
      votes_per_group: people who judge each group; 0: all of them.
    """

    questions: dict[str, str]
    seed: int = 0
    repeat_share: float = 0.05
    check_share: float = 0.05
    votes_per_group: int = 0

    def __post_init__(self) -> None:
        """Refuses shares that no collection can have.

        Raises:
          UserError: by the flag of the command.
        """
        for name in ("repeat_share", "check_share"):
            if not 0 <= getattr(self, name) <= 0.5:
                raise UserError(f"--{name}={getattr(self, name)}: must be from 0 to 0.5")
        if self.votes_per_group < 0:
            raise UserError(
                f"--votes_per_group={self.votes_per_group}: must be at least 0, which is no limit"
            )


@dataclasses.dataclass(frozen=True)
class Showing:
    """A group as it was shown to a person once.

    Attributes:
      number: of the showing.
      person: number of the person.
      group: number of the group.
      places: the group's images from left to right.
      repeats: the earlier showing of the same group to the same person, if this is to test consistency.
    """

    number: int
    person: int
    group: int
    places: tuple[int, ...]
    repeats: int | None = None


@dataclasses.dataclass(frozen=True)
class Vote:
    """A person's answer to one question about a group.

    Attributes:
      number: of the vote, which rises with time.
      showing: what was shown.
      question: name of the question.
      choice: what was chosen, by the numbers of the group's images.
      time: in seconds since 1970.
    """

    number: int
    showing: Showing
    question: str
    choice: Choice
    time: float


class VoteStore:
    """The SQLite file of a collection. A method that changes it returns when the change is on the disk."""

    def __init__(self, path: Path, connection: sqlite3.Connection):
        """Takes an open connection; `create` and `open_votes` make one."""
        self.path = path
        self._connection = connection
        self._lock = threading.Lock()
        facts = self._facts()
        self.plan = Plan(**json.loads(facts["plan"]))
        self.secret, self.link_token = facts["secret"], facts["link_token"]
        self.groups = stored_groups.read(connection, path)

    def _facts(self) -> dict[str, str]:
        return dict(self._connection.execute("SELECT name, value FROM facts"))

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._connection:  # commits, or rolls back after an error
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection

    def relocate(self, groups: Sequence[Group]) -> None:
        """Notes where the images are now; `groups` are those of the file otherwise."""
        with self._write() as write:
            stored_groups.write(write, groups, self.path)
        self.groups = list(groups)

    def people(self) -> dict[int, str]:
        """Returns the people by number."""
        with self._lock:
            return dict(self._read_people(self._connection))

    @staticmethod
    def _read_people(connection: sqlite3.Connection) -> list[tuple[int, str]]:
        return connection.execute("SELECT id, name FROM people ORDER BY id").fetchall()

    def join(self, name: str, digest: str) -> int:
        """Notes a session of a person, who may be new; returns the person's number.

        Upper and lower case are one name, as a phone writes the first letter large by itself, but for people
        whom an earlier version told apart by it.
        """
        with self._write() as write:
            people = [
                (number, unicodedata.normalize("NFC", each)) for number, each in self._read_people(write)
            ]
            person = next((number for number, each in people if each == name), None)
            if person is None:
                alike = (number for number, each in people if each.casefold() == name.casefold())
                person = next(alike, None)
            if person is None:
                person = write.execute("INSERT INTO people (name) VALUES (?)", (name,)).lastrowid
            write.execute("INSERT INTO sessions VALUES (?, ?)", (digest, person))
        assert person is not None
        return person

    def leave(self, digest: str) -> None:
        """Ends a session."""
        with self._write() as write:
            write.execute("DELETE FROM sessions WHERE digest = ?", (digest,))

    def person_of(self, digest: str) -> int | None:
        """Returns whose session it is."""
        with self._lock:
            row = self._connection.execute(
                "SELECT person FROM sessions WHERE digest = ?", (digest,)
            ).fetchone()
        return row[0] if row else None

    def show(self, person: int, group: int, places: Sequence[int], repeats: int | None) -> Showing:
        """Notes that a group is shown to a person."""
        with self._write() as write:
            number = write.execute(
                "INSERT INTO showings (person, shown, places, repeats, since) VALUES (?, ?, ?, ?, ?)",
                (person, group, json.dumps(list(places)), repeats, time.time()),
            ).lastrowid
        assert number is not None
        return Showing(number, person, group, tuple(places), repeats)

    def vote(self, showing: int, question: str, choice: Choice) -> Vote | None:
        """Notes a vote and returns it; None where another choice stands there already.

        The same vote sent once more, as after a lost answer, is the vote that is there.
        """
        text = json.dumps(choice)
        with self._write() as write:
            write.execute(
                "INSERT INTO votes (showing, question, choice, since) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO NOTHING",
                (showing, question, text, time.time()),
            )
            [vote] = self._votes("showing = ? AND question = ?", (showing, question))
        return vote if json.dumps(vote.choice) == text else None

    def withdraw(self, vote: int) -> None:
        """Takes a vote back, which stays in the file as withdrawn."""
        with self._write() as write:
            write.execute(
                "UPDATE votes SET withdrawn = ? WHERE id = ? AND withdrawn IS NULL", (time.time(), vote)
            )

    def showings(self) -> list[Showing]:
        """Returns everything that was shown, in its order."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT id, person, shown, places, repeats FROM showings ORDER BY id"
            ).fetchall()
        return [
            Showing(number, person, group, tuple(json.loads(places)), repeats)
            for number, person, group, places, repeats in rows
        ]

    def votes(self) -> list[Vote]:
        """Returns the votes that stand, in their order."""
        with self._lock:
            return self._votes("1", ())

    def _votes(self, condition: str, values: tuple[object, ...]) -> list[Vote]:
        rows = self._connection.execute(
            "SELECT votes.id, showings.id, person, shown, places, repeats, question, choice, votes.since "
            "FROM votes JOIN showings ON showing = showings.id "
            f"WHERE withdrawn IS NULL AND {condition} ORDER BY votes.id",
            values,
        )
        found = []
        for number, showing, person, group, places, repeats, question, text, since in rows:
            choice = json.loads(text)
            shown = Showing(showing, person, group, tuple(json.loads(places)), repeats)
            found.append(
                Vote(number, shown, question, tuple(choice) if isinstance(choice, list) else choice, since)
            )
        return found


def create(path: Path, plan: Plan, groups: Sequence[Group]) -> VoteStore:
    """Makes the file of a collection, or opens it where it was made with the same plan and images.

    Images that were moved are the same; the file then notes where they are now.

    Raises:
      UserError: the file is something else, or of other images, or of another plan.
    """
    if path.exists():
        store = open_votes(path)
        if not stored_groups.are_same(store.groups, groups):
            store.close()
            raise UserError(
                f"--out={path}: holds votes on other images, or on these in another order; name another file"
            )
        if [each.disagreement for each in store.groups] != [each.disagreement for each in groups]:
            store.close()
            raise UserError(
                f"--scores: the votes of {path} were begun with other scores, or with none; give the same "
                "again, or name another --out"
            )
        if store.plan != plan:
            field = next(
                field.name
                for field in dataclasses.fields(Plan)
                if getattr(plan, field.name) != getattr(store.plan, field.name)
            )
            theirs = getattr(store.plan, field)
            store.close()
            raise UserError(
                f"--{field}: these votes were begun with {theirs!r}; give that again, or name another --out"
            )
        if store.groups != list(groups):
            store.relocate(groups)
        return store
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    connection = sqlite3.connect(partial, isolation_level=None)
    connection.executescript(_SCHEMA + stored_groups.SCHEMA)
    with connection:
        connection.execute("BEGIN")
        facts = {"plan": json.dumps(dataclasses.asdict(plan))}
        facts |= {name: secrets.token_urlsafe(32) for name in ("secret", "link_token")}
        connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
        stored_groups.write(connection, groups, path)
    connection.close()
    partial.rename(path)
    return open_votes(path)


def open_votes(path: Path) -> VoteStore:
    """Opens the file of a collection, also while a server writes to it.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is no file of votes.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of votes")
    if not path.is_file():
        raise UserError(f"{path}: is a folder or a device; name a file of votes")
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        if stored_groups.version_of(connection) not in stored_groups.VERSIONS:
            connection.close()
            raise UserError(f"{path}: not a file of votes that this version reads; name what collect wrote")
        # On the disk after each commit: neither a killed server nor a power failure loses a vote.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return VoteStore(path, connection)
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: cannot be read as votes ({error}); name what collect wrote") from error
