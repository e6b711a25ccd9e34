"""Votes as a folder that `encode` reads: pairs, labels of single images, rankings."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from dspo_jax.errors import UserError
from dspo_jax.files import appear, link_or_copy, sha256, write_text
from dspo_jax.images.image_files import ImagePaths
from dspo_jax.json_files import JsonObject
from dspo_jax.people.bradley_terry import fit_strengths
from dspo_jax.people.groups import ImageFile
from dspo_jax.people.judgements import Judgement, read_judgements
from dspo_jax.people.votes import VoteStore

PREFERENCES = ("share", "majority", "reliability")
"""Ways to make one preference of several votes: their share, 1 for the majority, a fit that weighs people."""

_Shares = dict[tuple[int, ImageFile, ImageFile], float]


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """Settings of an export: which votes count, and how a pair's votes become one preference.

    Attributes:
      question: name of the question.
      preference: of `PREFERENCES`.
      ties: whether pairs that are even are written, with preference 0.5.
      min_checks: share of attention checks that a person must pass.
    """

    question: str
    preference: str = "share"
    ties: bool = False
    min_checks: float = 0.0


class Exported(NamedTuple):
    """Numbers of what was written."""

    pairs: int
    ties: int
    labels: int
    rankings: int


def export(
    store: VoteStore,
    out: Path,
    how: Aggregation,
    *,
    moved_to: Sequence[Path] = (),
    who: bool = False,
    allow_outside: bool = False,
) -> Exported:
    """Writes pairs.jsonl, labels.jsonl, rankings.json and the images, without people and times unless asked.

    Args:
      store: the votes.
      out: a folder that must not exist.
      how: votes to preferences.
      moved_to: folders in which the images lie now, in any place, if they are not where people saw them.
      who: whether votes.jsonl says who voted what and when.
      allow_outside: whether images may lie outside the folders that they were collected from.

    Raises:
      FileNotFoundError: an image or a folder is missing.
      UserError: no votes, `out` exists, or an image is not what people saw.
    """
    judgements = read_judgements(store, how.question, min_checks=how.min_checks)
    if not judgements:
        raise UserError(f"{store.path}: no vote on {how.question} to export; collect some first")
    shares = share_of(judgements, how.preference)
    with appear(out) as partial:
        place = _Images(partial, moved_to, allow_outside)
        prompts = {number: group.prompt for number, group in enumerate(store.groups)}
        pairs = _make_pairs(shares, prompts, place, how.ties)
        labels = _make_labels(shares, prompts, place, soft=how.preference != "majority")
        rankings = _make_rankings(shares, prompts, place)
        partial.mkdir(exist_ok=True)
        _write_lines(partial / "pairs.jsonl", pairs)
        _write_lines(partial / "labels.jsonl", labels)
        if rankings:
            text = json.dumps(rankings, ensure_ascii=False, indent=1)
            write_text(partial / "rankings.json", text + "\n")
        if who:
            _write_lines(partial / "votes.jsonl", _list_votes(store, place))
    ties = sum(share == 0.5 for share in shares.values())
    return Exported(len(pairs), ties, len(labels), len(rankings))


def share_of(judgements: Sequence[Judgement], preference: str) -> _Shares:
    """Returns for every two images of a group in how far the first is preferred, in [0, 1]."""
    votes: dict[tuple[int, ImageFile, ImageFile], list[float]] = {}
    for each in judgements:
        votes.setdefault((each.group, each.first, each.second), []).append(each.share)
    shares = {pair: float(np.mean(values)) for pair, values in votes.items()}
    if preference == "majority":
        return {pair: float(np.sign(share - 0.5) / 2 + 0.5) for pair, share in shares.items()}
    if preference == "reliability":
        # The same file may be an image of two prompts, and is then as good as each has it.
        found = fit_strengths(
            [
                (each.person, (each.prompt, each.first), (each.prompt, each.second), each.share)
                for each in judgements
            ]
        )
        strength = dict(zip(found.items, found.values.tolist(), strict=True))
        prompts = {each.group: each.prompt for each in judgements}
        return {
            (group, first, second): float(
                expit(strength[prompts[group], first] - strength[prompts[group], second])
            )
            for group, first, second in shares
        }
    return shares


class _Images:
    """Brings images into the folder, once each, under names that tell their content and nothing else."""

    def __init__(self, out: Path, moved_to: Sequence[Path], allow_outside: bool):
        self._out, self._allow_outside = out, allow_outside
        self._moved_to = list(moved_to)
        self._moved = _find_by_content(moved_to, allow_outside)

    def __call__(self, image: ImageFile) -> str:
        name = f"images/{image.sha256[:16]}{Path(image.file).suffix.lower()}"
        target = self._out / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(self._find(image), target)
        return name

    def _find(self, image: ImageFile) -> Path:
        if self._moved_to:
            if image.sha256 not in self._moved:
                raise FileNotFoundError(
                    f"--images={','.join(map(str, self._moved_to))}: no file there is {image.file} as people "
                    "saw it; name all folders that hold the images now"
                )
            paths, file = self._moved[image.sha256]
            return paths.find(file)
        path = ImagePaths(Path(image.folder), "--allow_outside", self._allow_outside).find(image.file)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such image any more; name the folder that it was moved to with --images"
            )
        if sha256(path) != image.sha256:
            raise UserError(f"{path}: is another image by now than people saw; bring it back")
        return path


def _find_by_content(folders: Sequence[Path], allow_outside: bool) -> dict[str, tuple[ImagePaths, str]]:
    """Returns the files anywhere in folders by their SHA-256: the folder of each and its name there."""
    found: dict[str, tuple[ImagePaths, str]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"--images={folder}: no such folder")
        paths = ImagePaths(folder, "--allow_outside", allow_outside)
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                found[sha256(file)] = paths, str(file.relative_to(folder))
    return found


def _make_pairs(shares: _Shares, prompts: Mapping[int, str], place: _Images, ties: bool) -> list[JsonObject]:
    rows: list[JsonObject] = []
    for (group, first, second), share in shares.items():
        if share == 0.5 and not ties:
            continue
        winner, loser = (first, second) if share >= 0.5 else (second, first)
        rows.append(
            {
                "caption": prompts[group],
                "winner": place(winner),
                "loser": place(loser),
                "preference": max(share, 1 - share),
                "key": f"{group}-{len(rows)}",
            }
        )
    return rows


def _make_labels(shares: _Shares, prompts: Mapping[int, str], place: _Images, soft: bool) -> list[JsonObject]:
    """Makes a row for each image: liked where it is preferred to the others of its prompt on average."""
    rows: list[JsonObject] = []
    for (prompt, image), share in _mean_shares(shares, prompts).items():
        if soft or share != 0.5:
            label: float | bool = share if soft else share > 0.5
            rows.append({"caption": prompt, "image": place(image), "label": label, "key": str(len(rows))})
    return rows


def _make_rankings(shares: _Shares, prompts: Mapping[int, str], place: _Images) -> list[JsonObject]:
    """Makes an entry for each prompt with three images or more, as ImageReward's annotations have them.

    Every two of its images must have been compared: others have no place in one order.
    """
    of_prompt: dict[str, dict[ImageFile, float]] = {}
    for (prompt, image), share in _mean_shares(shares, prompts).items():
        of_prompt.setdefault(prompt, {})[image] = share
    compared = {(prompts[group], frozenset(images)) for group, *images in shares}
    complete = [
        (prompt, images)
        for prompt, images in of_prompt.items()
        if len(images) > 2
        if all((prompt, frozenset(pair)) in compared for pair in itertools.combinations(images, 2))
    ]
    return [
        {
            "id": str(number),
            "prompt": prompt,
            "generations": list(map(place, images)),
            "ranking": [1 + sum(other > share for other in images.values()) for share in images.values()],
        }
        for number, (prompt, images) in enumerate(complete)
    ]


def _mean_shares(shares: _Shares, prompts: Mapping[int, str]) -> dict[tuple[str, ImageFile], float]:
    """Returns the mean share of each image over everything that it was compared with."""
    found: dict[tuple[str, ImageFile], list[float]] = {}
    for (group, first, second), share in shares.items():
        found.setdefault((prompts[group], first), []).append(share)
        found.setdefault((prompts[group], second), []).append(1 - share)
    return {key: float(np.mean(values)) for key, values in found.items()}


def _list_votes(store: VoteStore, place: _Images) -> list[JsonObject]:
    people = store.people()
    rows: list[JsonObject] = []
    for vote in store.votes():
        group = store.groups[vote.showing.group]
        choice: object = vote.choice
        if isinstance(choice, int):
            choice = place(group.images[choice])
        elif isinstance(choice, tuple):
            choice = [place(group.images[i]) for i in choice]
        rows.append(
            {
                "person": people[vote.showing.person],
                "time": datetime.fromtimestamp(vote.time, UTC).isoformat(timespec="seconds"),
                "caption": group.prompt,
                "images": [place(group.images[i]) for i in vote.showing.places],
                "question": vote.question,
                "choice": choice,
                "repeated": vote.showing.repeats is not None,
                "check": group.answer is not None,
            }
        )
    return rows


def _write_lines(path: Path, rows: Sequence[JsonObject]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
