"""Selection of a source's rows and splits: filters, ties, held-out captions; shared by sources of files."""

import abc
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dspo_jax import spelling
from dspo_jax.errors import UserError

_FIRST_SPLITS = ("train", "validation")


def draw(seed: int, *what: str) -> float:
    """Returns a number in [0, 1) that depends on the seed and the strings only: the same on every machine."""
    digest = hashlib.sha256("|".join((str(seed), *what)).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def sort_splits(names: Sequence[str]) -> tuple[str, ...]:
    """Sorts splits: `train` and `validation` first, the others by name."""
    return tuple(sorted(set(names), key=lambda name: (name not in _FIRST_SPLITS, name)))


def require(argument: str, value: str) -> str:
    """Returns an argument that has no default.

    Raises:
      UserError: it is empty; the message says how to set it.
    """
    if not value:
        raise UserError(f"config.source.{argument} is not set: give --config.source.{argument}=...")
    return value


def check_ids(winner_id: str, loser_id: str, loser: str) -> None:
    """Refuses a name for the ids of winners without one for those of losers, and ids of single images.

    Raises:
      UserError: by the argument.
    """
    for name, other, value in (("winner_id", loser_id, winner_id), ("loser_id", winner_id, loser_id)):
        if value and not (other and loser):
            raise UserError(
                f"config.source.{name} = {value!r}: tells winners and losers apart; name the ids of both, "
                "and the losers, or leave it out"
            )


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The rows of one split of the files, of which a selection is made.

    Attributes:
      rows: columns `caption` (string) and `margin` (number), and whatever the source needs. Where there is a
        column `group`, it stands for the caption in holding out and filtering, so that several captions of
        the same images stay together.
      columns: columns of `rows` that the source needs afterwards; the others are dropped.
      left_out: rows that the source itself leaves out: a mask [n] by reason.
      identity: columns that tell the pairs of a caption apart, whatever the order of the files and rows.
      images: the columns that say which images winner and loser are; None where that is not known.
    """

    rows: pa.Table
    columns: tuple[str, ...]
    left_out: Mapping[str, np.ndarray]
    identity: tuple[str, ...]
    images: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Selected:
    """The rows of a split (the columns that its source needs and `loser_won`); those left out, by reason.

    `digest` is the SHA-256 sum of the rows: which they are, their captions and margins, in order.
    """

    rows: pa.Table
    left_out: Mapping[str, int]
    digest: str


@dataclasses.dataclass(frozen=True)
class Selection(abc.ABC):
    """The arguments that all sources of files share, and what follows from them.

    Attributes:
      caption_pattern: a regular expression that must occur in the caption; "" keeps all.
      min_margin: smallest margin between winner and loser, in the source's own unit.
      one_pair_per_prompt: keeps one random pair of each caption (DSPO-nodup of DSPO's Table 6); which one
        depends on the seed, not on the order of the files.
      validation_share: share of the captions that are held out as `validation` where the files hold only
        `train`; all pairs of a caption go to the same split. At least one caption is held out if there are
        two; 0 holds out none.
      seed: of the choice of pairs and of the captions held out.
    """

    caption_pattern: str = ""
    min_margin: float = 0.0
    one_pair_per_prompt: bool = False
    validation_share: float = 0.05
    seed: int = 0

    max_margin: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.caption_pattern)
        except re.error as error:
            raise UserError(
                f"config.source.caption_pattern = {self.caption_pattern!r}: no regular expression ({error})"
            ) from error
        if not 0 <= self.min_margin <= self.max_margin:
            raise UserError(
                f"config.source.min_margin = {self.min_margin}: must be from 0 to {self.max_margin:g}"
            )
        if not 0 <= self.validation_share < 1:
            raise UserError(
                f"config.source.validation_share = {self.validation_share}: must be at least 0 and below 1"
            )

    @abc.abstractmethod
    def file_splits(self) -> tuple[str, ...]:
        """Returns the splits that the files come in."""

    @abc.abstractmethod
    def candidates(self, split: str) -> Candidates:
        """Reads all of one of `file_splits`, but for the images."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The files' own splits; or `train` and, if captions are held out, `validation`."""
        in_files = self.file_splits()
        return tuple(_select(self, "train")) if in_files == ("train",) else in_files

    def selected(self, split: str) -> Selected:
        """Returns the rows of a split, read once in a process.

        Raises:
          UserError: there is no such split.
        """
        if split not in self.splits:
            raise UserError(spelling.unknown("split", split, self.splits))
        return _select(self, split if split in self.file_splits() else "train")[split]

    def num_examples(self, split: str) -> int:
        return self.selected(split).rows.num_rows

    def left_out(self, split: str) -> Mapping[str, int]:
        return self.selected(split).left_out

    def digest(self, split: str) -> str:
        return self.selected(split).digest


@functools.cache
def _select(source: Selection, file_split: str) -> dict[str, Selected]:
    """Returns names the splits made of a split of the files: that split, or `train` and `validation`."""
    candidates = source.candidates(file_split)
    rows = candidates.rows
    # One number for each different caption; spaces around it do not make it another.
    name = "group" if "group" in rows.column_names else "caption"
    text = rows[name].cast(pa.large_string()).fill_null("")
    encoded = pc.utf8_trim_whitespace(text).combine_chunks().dictionary_encode()
    prompt, captions = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()

    kept, left_out = _filter(source, candidates, prompt, captions)
    if source.file_splits() == ("train",):
        held_out = _hold_out(captions, np.unique(prompt[kept]), source.validation_share, source.seed)
        members = {"train": ~held_out[prompt], "validation": held_out[prompt]}
        if not held_out.any():
            del members["validation"]
    else:
        members = {file_split: np.ones(rows.num_rows, bool)}
    rows = rows.select(list(dict.fromkeys((*candidates.columns, *(candidates.images or ()), "margin"))))
    selected = {}
    for split, member in members.items():
        counts = {reason: int((mask & member).sum()) for reason, mask in left_out.items()}
        of_split = rows.take(np.flatnonzero(kept & member))
        won = np.zeros(of_split.num_rows, bool)
        if candidates.images is not None:
            winner, loser = (of_split[name] for name in candidates.images)
            won = pc.is_in(loser, value_set=winner.combine_chunks(), skip_nulls=True).to_numpy()
        digest = _digest(of_split, prompt[kept & member], captions)
        of_split = of_split.select(candidates.columns).append_column("loser_won", pa.array(won))
        selected[split] = Selected(
            of_split.combine_chunks(), {reason: count for reason, count in counts.items() if count}, digest
        )
    return selected


def _digest(rows: pa.Table, prompt: np.ndarray, captions: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([captions[i] for i in np.unique(prompt)]).encode())
    digest.update(np.unique(prompt, return_inverse=True)[1].astype(np.int64).tobytes())
    for name in sorted(rows.column_names):
        digest.update(json.dumps([name, rows[name].to_pylist()]).encode())
    return digest.hexdigest()


def _filter(
    source: Selection, candidates: Candidates, prompt: np.ndarray, captions: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Selects rows: which [n] are kept, and which are left out, by the first reason that applies."""
    rows = candidates.rows
    left_out: dict[str, np.ndarray] = {}
    kept = np.ones(rows.num_rows, bool)

    def leave_out(reason: str, mask: np.ndarray) -> None:
        left_out[reason] = mask & kept
        kept[mask] = False

    for reason, mask in candidates.left_out.items():
        leave_out(reason, mask)
    if source.caption_pattern:
        search = re.compile(source.caption_pattern).search
        leave_out("caption_pattern", np.asarray([not search(caption) for caption in captions], bool)[prompt])
    if source.min_margin:
        leave_out("min_margin", ~(rows["margin"].to_numpy() >= source.min_margin))
    if source.one_pair_per_prompt:
        chosen = _choose_one(rows, np.flatnonzero(kept), prompt, captions, candidates.identity, source.seed)
        leave_out("one_pair_per_prompt", ~np.isin(np.arange(rows.num_rows), chosen))
    return kept, left_out


def _hold_out(captions: Sequence[str], kept: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Chooses held-out captions [len(captions)]: of the `kept` ones at least one is held out, and one is not.

    But for these two, whether a caption is held out depends on itself alone: more data does not move it.
    """
    if share == 0 or len(kept) < 2:
        return np.zeros(len(captions), bool)
    draws = np.asarray([draw(seed, "split", caption) for caption in captions])
    held_out = draws < share
    held_out[kept[np.argmin(draws[kept])]] = True
    held_out[kept[np.argmax(draws[kept])]] = False
    return held_out


def _choose_one(
    rows: pa.Table,
    kept: np.ndarray,
    prompt: np.ndarray,
    captions: Sequence[str],
    identity: Sequence[str],
    seed: int,
) -> np.ndarray:
    """Numbers of the rows that remain when of each caption one is taken, among those numbered `kept`."""
    if len(kept) == 0:
        return kept
    table = rows.select(list(identity)).take(kept).append_column("prompt", pa.array(prompt[kept]))
    order = pc.sort_indices(table, [(name, "ascending") for name in ("prompt", *identity)]).to_numpy()
    number, first, count = np.unique(prompt[kept][order], return_index=True, return_counts=True)
    draws = np.asarray([draw(seed, "pair", captions[i]) for i in number])
    return kept[order[first + (draws * count).astype(np.int64)]]
