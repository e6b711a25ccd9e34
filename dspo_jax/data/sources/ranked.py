"""Ranked lists: several images of a prompt in an order, as they are or in pairs (HPD, ImageReward)."""

import abc
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dspo_jax import spelling
from dspo_jax.data.sources.pairs import PreferencePair, Row
from dspo_jax.data.sources.selection import Candidates, Selection, require
from dspo_jax.errors import UserError
from dspo_jax.images.image_files import SOURCE_ALLOWS_OUTSIDE, ImagePaths

_COMPARISONS = ("all", "best", "list")
_LONGEST = 64  # images of a list


class RankedList(NamedTuple):
    """The images of one prompt, by name, and their ranks: the lower, the better."""

    caption: str
    images: Sequence[str]
    ranks: Sequence[float]
    name: int | str | None


@dataclasses.dataclass(frozen=True)
class Ranked(Selection):
    """Base class of the sources of ranked lists.

    Every two images of a list give a pair, or (`comparisons="best"`) the best and each of the others; two of
    the same rank are a tie and left out. The preference is 1. The key is "{number of the list}/{number of the
    winner}>{number of the loser}", counted from 0; meta holds both ranks and the list's id where it has one.
    `loser_won` is known.

    Or (`comparisons="list"`) a list gives an example of `length` images, best first, with minus the rank as
    the score of each: the best, the worst, and others evenly spread over the ranks between them. Lists that
    are shorter, and those of equal ranks alone, are left out. The key is the number of the list.

    Attributes:
      path: the JSON file, or the same rows as parquet.
      images: the folder that the names of images are relative to.
      comparisons: "all", "best" or "list".
      length: of "list", the images of each example, at least 3.
      allow_outside: whether images may lie outside that folder, by `..`, an absolute path or a symbolic link.
      min_margin (of `Selection`): smallest difference of the two ranks, of a list of best and worst.
    """

    path: str = ""
    images: str = ""
    comparisons: str = "all"
    length: int = 0
    allow_outside: bool = False

    max_margin: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.comparisons not in _COMPARISONS:
            raise UserError(spelling.unknown("config.source.comparisons", self.comparisons, _COMPARISONS))
        if self.comparisons == "list" and not 3 <= self.length <= _LONGEST:
            raise UserError(
                f"config.source.length = {self.length}: must be from 3 to {_LONGEST}, the images of each "
                "example of config.source.comparisons = 'list'; for pairs take 'all' or 'best'"
            )
        if self.comparisons != "list" and self.length:
            raise UserError(
                f"config.source.length = {self.length}: is of config.source.comparisons = 'list'; set that, "
                "or leave length out"
            )

    @property
    def images_per_example(self) -> int:
        return self.length or 2

    @abc.abstractmethod
    def parse(self, row: Row) -> RankedList:
        """Reads one object of the file; what it lacks is a KeyError."""

    def gather(self, rows: list[Row]) -> list[Row]:
        """Makes the objects that `parse` reads of the rows of the file."""
        return rows

    @abc.abstractmethod
    def folder(self) -> Path:
        """Returns the folder of the images where none is given."""

    def file_splits(self) -> tuple[str, ...]:
        require("path", self.path)
        return ("train",)

    def candidates(self, split: str) -> Candidates:
        if self.comparisons == "list":
            return self._lists()
        rows: list[tuple[int, int, int, str, str, str, float]] = []
        paths = self._paths()
        for number, (caption, images, ranks, _) in enumerate(_read(self)):
            paths.check(images)
            order = sorted(range(len(ranks)), key=lambda i: ranks[i])
            for i, j in itertools.combinations(order, 2):
                if self.comparisons == "all" or ranks[i] == ranks[order[0]]:
                    rows.append((number, i, j, caption, images[i], images[j], ranks[j] - ranks[i]))
        names = ("list", "i", "j", "caption", "winner", "loser", "margin")
        kinds = (*[pa.int32()] * 3, *[pa.string()] * 3, pa.float64())
        columns = list(zip(*rows, strict=True)) or [()] * len(names)
        table = pa.table(
            {name: pa.array(column, kind) for name, column, kind in zip(names, columns, kinds, strict=True)}
        )
        left_out = {"tie": table["margin"].to_numpy() == 0}
        images_of = ("winner", "loser")
        return Candidates(table, ("list", "i", "j"), left_out, (*images_of, "list"), images_of)

    def _lists(self) -> Candidates:
        """Returns the lists, of which some are too short."""
        lists, paths = _read(self), self._paths()
        for _, images, _, _ in lists:
            paths.check(images)
        lengths = np.asarray([len(ranks) for _, _, ranks, _ in lists], int)
        margins = np.asarray(
            [max(ranks, default=0) - min(ranks, default=0) for _, _, ranks, _ in lists], float
        )
        names = [
            "\n".join(f"{ranks[i]} {images[i]}" for i in _spread(ranks, self.length))
            for _, images, ranks, _ in lists
        ]
        table = pa.table(
            {
                "list": pa.array(range(len(lists)), pa.int32()),
                "caption": pa.array([caption for caption, _, _, _ in lists], pa.string()),
                "names": pa.array(names, pa.string()),
                "margin": margins,
            }
        )
        left_out = {f"fewer than {self.length} images": lengths < self.length, "tie": margins == 0}
        return Candidates(table, ("list", "names"), left_out, ("names", "list"))

    def _list(self, number: int) -> PreferencePair:
        caption, images, ranks, name = _read(self)[number]
        chosen = _spread(ranks, self.length)
        first, second, *others = (self._paths().find(images[i]) for i in chosen)
        return PreferencePair(
            caption=caption,
            winner=first,
            loser=second,
            others=tuple(others),
            scores=tuple(float(-ranks[i]) for i in chosen),
            key=str(number),
            meta={"ranks": [ranks[i] for i in chosen], "id": name},
        )

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        if self.comparisons == "list":
            yield from map(self._list, self.selected(split).rows["list"][start:stop].to_pylist())
            return
        lists = _read(self)
        paths = self._paths()
        for batch in self.selected(split).rows[start:stop].to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                number, i, j = row["list"], row["i"], row["j"]
                caption, images, ranks, name = lists[number]
                yield PreferencePair(
                    caption=caption,
                    winner=paths.find(images[i]),
                    loser=paths.find(images[j]),
                    key=f"{number}/{i}>{j}",
                    loser_won=row["loser_won"],
                    meta={"winner_rank": ranks[i], "loser_rank": ranks[j], "id": name},
                )

    def _paths(self) -> ImagePaths:
        folder = Path(self.images) if self.images else self.folder()
        return ImagePaths(folder, SOURCE_ALLOWS_OUTSIDE, self.allow_outside)


def _spread(ranks: Sequence[float], count: int) -> list[int]:
    """Returns the places of `count` images, best first: the best, the worst, others evenly between them."""
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    if len(order) < count:
        return order
    return [order[round(i * (len(order) - 1) / (count - 1))] for i in range(count)]


@functools.cache
def _read(source: Ranked) -> list[RankedList]:
    path = Path(source.path)
    if not path.is_file():
        raise FileNotFoundError(
            f"config.source.path = {source.path!r}: no such file; it is the JSON of ranks"
        )
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
    lists = []
    for number, row in enumerate(source.gather(rows)):
        where = f"{path}: entry {number}"
        try:
            parsed = source.parse(row)
        except KeyError as error:
            raise UserError(f"{where}: no {error.args[0]!r} (found: {', '.join(row)})") from error
        except TypeError as error:
            raise UserError(f"{where}: not what this source reads ({error})") from error
        for name, values, kind in (
            ("the prompt", [parsed.caption], str),
            ("the images", parsed.images, str),
            ("the ranks", parsed.ranks, int | float),
        ):
            if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
                raise UserError(f"{where}: {name} = {values!r}: must be of type {kind}")
        for text in (parsed.caption, *parsed.images):
            fault = spelling.fault_of_text(text)
            if fault:
                raise UserError(f"{where}: {text!r} has {fault} in it; mend or delete the entry")
        if not all(-(10**9) < rank < 10**9 for rank in parsed.ranks):  # NaN neither
            raise UserError(f"{where}: the ranks = {parsed.ranks!r}: must be small numbers")
        if len(parsed.images) != len(parsed.ranks):
            raise UserError(f"{where}: {len(parsed.images)} images, but {len(parsed.ranks)} ranks")
        lists.append(parsed)
    return lists


def _read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8 or JSON; a number or a nesting without end
        raise UserError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a {type(rows).__name__}, but must be a list of prompts with images")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {number}: a {type(row).__name__}, but must be an object")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as parquet ({reason}); fetch it again") from error


@dataclasses.dataclass(frozen=True)
class HpdV2(Ranked):
    """Human Preference Dataset v2: `train.json` or `test.json` and the images beside it.

    An entry of `train.json` has `prompt`, `file_path` (two images; `image_path` in some copies) and
    `human_preference`, 1 for the preferred image and 0 for the other. One of `test.json` has `prompt`,
    `image_path` (several images) and `rank`, the average of several people's ranks, 1 being the best.
    Without `images`, those of `train.json` are in the folder `train` beside it, and so on, as the archives
    unpack.

    Source: Wu et al., "Human Preference Score v2", arXiv:2306.09341; the README of github.com/tgxs002/HPSv2
    and the card of ymhao/HPDv2 on the hub give these schemas. That lower ranks are better is how that
    repository's evaluation.py compares them with the order of its scores.
    """

    def parse(self, row: Row) -> RankedList:
        images = row["image_path"] if "image_path" in row else row["file_path"]
        ranks = row["rank"] if "rank" in row else [1 - preferred for preferred in row["human_preference"]]
        return RankedList(row["prompt"], images, ranks, None)

    def folder(self) -> Path:
        return Path(self.path).with_suffix("")


@dataclasses.dataclass(frozen=True)
class HpdV3(Ranked):
    """Human Preference Dataset v3: a JSON list of {`prompt`, `path1`, `path2`}, `path1` being preferred.

    Without `images`, the files are relative to the folder of the JSON file, where the archive of the images
    unpacks to. `confidence`, `choice_dist` and the models' names, which rows have too, are not read.

    Source: Ma et al., "HPSv3", arXiv:2508.03789 (1.17 million pairs, MizzenAI/HPDv3 on the hub); the schema
    as lightrft/datasets/hpdv3.py of github.com/opendilab/LightRFT reads it.
    """

    def parse(self, row: Row) -> RankedList:
        return RankedList(row["prompt"], [row["path1"], row["path2"]], [1, 2], None)

    def folder(self) -> Path:
        return Path(self.path).parent


_OF_IMAGE = ("prompt_id", "prompt", "image_path", "rank")


@dataclasses.dataclass(frozen=True)
class ImageRewardRankings(Ranked):
    """ImageReward's annotations: a row for each prompt or, as ImageRewardDB has them, for each image.

    A JSON list of {`id`, `prompt`, `generations`, `ranking`}: `generations` are image files, `ranking` their
    ranks, 1 being the best; equal ranks occur. Or rows of `prompt_id`, `prompt`, `image_path` and `rank`, in
    parquet (ImageRewardDB's metadata-train.parquet) or a JSON list; those of one `prompt_id` are a list.
    Without `images`, the files are relative to the folder of the file: `image_path` is
    "images/train/train_1/NAME.webp", so that images/train/train_1.zip is unpacked into a folder of its name.

    Source: Xu et al., "ImageReward", arXiv:2304.05977; data/test.json of github.com/THUDM/ImageReward has
    the first schema (466 prompts), THUDM/ImageRewardDB on the hub the second.
    """

    def gather(self, rows: list[Row]) -> list[Row]:
        if not rows or not isinstance(rows[0].get("image_path"), str):
            return rows
        lists: dict[str, Row] = {}
        for number, row in enumerate(rows):
            for key in _OF_IMAGE:
                if key not in row:
                    raise UserError(f"{self.path}: row {number}: no {key!r} (found: {', '.join(row)})")
            name = str(row["prompt_id"])
            of_prompt = lists.setdefault(
                name, {"id": name, "prompt": row["prompt"], "generations": [], "ranking": []}
            )
            if of_prompt["prompt"] != row["prompt"]:
                raise UserError(
                    f"{self.path}: row {number}: prompt_id {name!r} stands beside another prompt before; "
                    "give each prompt an id of its own"
                )
            of_prompt["generations"].append(row["image_path"])
            of_prompt["ranking"].append(row["rank"])
        return list(lists.values())

    def parse(self, row: Row) -> RankedList:
        return RankedList(row["prompt"], row["generations"], row["ranking"], row.get("id"))

    def folder(self) -> Path:
        return Path(self.path).parent
