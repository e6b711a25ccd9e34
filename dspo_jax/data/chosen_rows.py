"""Choice of the rows of a source that are encoded, by the scores of their images."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float32

from dspo_jax.data.scoring import ScoreFiles, SplitScores
from dspo_jax.data.settings import SelectSettings
from dspo_jax.data.source_shards import Shard, SourceShards
from dspo_jax.data.sources import PreferencePair
from dspo_jax.errors import UserError

# The other splits stay whole, so that runs on one selection and another are judged on the same examples.
_SPLIT = "train"


def check_selection(select: SelectSettings, splits: Sequence[str], images: int) -> None:
    """Refuses a selection that means nothing for rows of so many images.

    Raises:
      UserError: by key.
    """
    if select.min_gap is not None and images != 2:
        what = "single images" if images == 1 else "lists"
        raise UserError(
            f"config.select.min_gap = {select.min_gap:g}: is between winner and loser, and these are {what}; "
            "leave it out"
        )
    if select.agree and images != 2:
        what = "single images" if images == 1 else "lists"
        raise UserError(
            f"config.select.agree = {select.agree}: compares winner and loser, and these are {what}; leave "
            "it 0"
        )
    given = {"agree": select.agree, "min_gap": select.min_gap is not None, "top": select.top < 1}
    if any(given.values()) and _SPLIT not in splits:
        key = next(key for key, is_given in given.items() if is_given)
        raise UserError(
            f"config.select.{key} = {getattr(select, key):g}: selects from split {_SPLIT!r}, which is not "
            f"encoded (config.splits = {tuple(splits)})"
        )


def choose(
    found: SplitScores, split: str, select: SelectSettings, others: Sequence[SplitScores] = ()
) -> tuple[Bool[np.ndarray, " N"], dict[str, int]]:
    """Chooses rows of a split, by one filter after the other.

    Args:
      found: of all rows of the split.
      split: its name; `agree`, `min_gap` and `top` are of "train".
      select: the filters. `top` of what the others have left, to the nearest whole number and at least one,
        are those with the highest scores, and of equal ones the first. The score of a pair is its winner's.
      others: the scores of further rewards, which `agree` counts; a missing one prefers neither image.

    Returns:
      Whether each row is encoded (a row without a score is, so that it is counted as a bad one), and how many
      are not, by reason.

    Raises:
      UserError: nothing is left, by key.
    """
    usable = np.isfinite(found.scores).all(axis=1)
    left = np.flatnonzero(usable)
    left_out = {}
    if select.images == "single":
        _, first = np.unique(found.pictures[left, 0], return_index=True)
        left_out["repeated image"] = len(left) - len(first)
        left = left[np.sort(first)]
    if select.agree and split == _SPLIT:
        votes = sum((each.scores[left, 0] > each.scores[left, 1]).astype(int) for each in (found, *others))
        kept = left[votes >= select.agree]
        if len(left) and not len(kept):
            raise UserError(
                f"config.select.agree = {select.agree}: leaves no pair of split {split!r}; at most "
                f"{votes.max()} of {1 + len(others)} reward(s) prefer a winner"
            )
        left_out["select.agree"] = len(left) - len(kept)
        left = kept
    if select.min_gap is not None and split == _SPLIT:
        winner, loser = found.scores[left].T
        kept = left[winner - loser >= select.min_gap]
        if len(left) and not len(kept):
            raise UserError(
                f"config.select.min_gap = {select.min_gap:g}: leaves no pair of split {split!r}; the largest "
                f"gap is {(winner - loser).max():g}"
            )
        left_out["select.min_gap"] = len(left) - len(kept)
        left = kept
    if select.top < 1 and split == _SPLIT:
        count = max(1, round(select.top * len(left)))
        best = np.argsort(-found.scores[left, 0], kind="stable")[:count]
        left_out["select.top"] = len(left) - len(best)
        left = left[np.sort(best)]
    chosen = ~usable
    chosen[left] = True
    return chosen, {reason: count for reason, count in left_out.items() if count}


class ChosenRows:
    """The rows of a source that are encoded, with their scores; all of them where nothing was scored."""

    def __init__(self, rows: SourceShards, files: Sequence[ScoreFiles], select: SelectSettings):
        """Chooses, from the scores of all rows if there are any; the first files' are those of the examples.

        Raises:
          UserError: see `choose`.
        """
        self._rows = rows
        self._scores: dict[str, Float32[np.ndarray, "N P"]] = {}
        self._chosen: dict[str, Bool[np.ndarray, " N"]] = {}
        self._left_out: dict[str, dict[str, int]] = {split: {} for split in rows.splits}
        if not files:
            return
        for split in rows.splits:
            found, *others = (each.read(split) for each in files)
            self._scores[split] = found.scores
            self._chosen[split], self._left_out[split] = choose(found, split, select, others)

    def take(self, shard: Shard, pairs: Iterable[PreferencePair]) -> Iterator[PreferencePair]:
        """Yields the chosen ones of a shard's rows, with their scores."""
        if shard[0] not in self._scores:
            yield from pairs
            return
        place = self._rows.place(shard)
        of_shard = self._chosen[shard[0]][place], self._scores[shard[0]][place]
        for pair, is_chosen, scores in zip(pairs, *of_shard, strict=True):
            if is_chosen:
                yield dataclasses.replace(pair, scores=tuple(scores.tolist()))

    def count(self, split: str) -> int:
        """Counts the chosen rows of a split."""
        return int(self._chosen[split].sum()) if split in self._chosen else self._rows.of_split[split]

    def left_out(self, split: str) -> Mapping[str, int]:
        """Counts the other rows of a split by reason: `repeated image`, `select.agree`, ..."""
        return self._left_out[split]
