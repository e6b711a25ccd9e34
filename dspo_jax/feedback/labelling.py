"""Preference pairs from images of the same prompts, drawn here or elsewhere and ordered by a reward."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.evaluation.image_folders import ImageFolder
from dspo_jax.feedback.existing_images import ImagesOfPrompt, gather_images, place_gathered, read_images
from dspo_jax.files import write_json, write_text
from dspo_jax.json_files import member, read_object
from dspo_jax.locks import is_empty
from dspo_jax.parallel import processes
from dspo_jax.rewards import Reward
from dspo_jax.rewards.scores import score_files
from dspo_jax.sampling.drawing import sample
from dspo_jax.sampling.folder import SETTINGS, place_images
from dspo_jax.sampling.image_sampler import ImageRequest
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Rendering

PAIRS = ("best_worst", "all")
# In the output: images that were not drawn here, and what encode reads.
_GATHERED, _PAIRS_FILE = "gathered", "pairs.jsonl"
_ORIGIN = "origin.json"  # beside gathered images: the folder that they are from


# Evaluations count their seeds from 0: no image that a model is judged by begins with noise it trained on.
_FIRST_SEED = 1000


class Choice(NamedTuple):
    """One comparison: number of the prompt, of the image that won and of the image that lost."""

    prompt: int
    winner: int
    loser: int


def choose_pairs(
    scores: Sequence[np.ndarray], pairs: str = "best_worst", temperature: float = 0.0, seed: int = 0
) -> list[Choice]:
    """Chooses the comparisons and their winners; images with equal scores are never compared.

    Args:
      scores: of each prompt, those of its images.
      pairs: "best_worst" compares a prompt's best with its worst; "all" every two of its images.
      temperature: 0: the higher score wins. Above it the winner is drawn, as the noisy judgements of the
        Bradley-Terry model are: P(a wins) = sigmoid((score of a - score of b) / temperature).
      seed: of the draw of winners.
    """
    draw = np.random.default_rng(seed)
    chosen = []
    for prompt, row in enumerate(scores):
        best_worst = [(int(np.argmax(row)), int(np.argmin(row)))]
        for a, b in best_worst if pairs == "best_worst" else itertools.combinations(range(len(row)), 2):
            difference = float(row[a]) - float(row[b])
            if difference == 0:
                continue
            a_wins = difference > 0
            if temperature:
                a_wins = draw.random() < 0.5 * (1 + np.tanh(difference / (2 * temperature)))
            chosen.append(Choice(prompt, *((a, b) if a_wins else (b, a))))
    return chosen


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Settings of labelling: images drawn of each prompt, comparisons among them, and who wins.

    Attributes:
      images_per_prompt: images drawn, with seeds from 1000 on; seeds of evaluations begin at 0.
      pairs, temperature: see `choose_pairs`.
    """

    images_per_prompt: int = 4
    pairs: str = "best_worst"
    temperature: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what gives no pair.

        Raises:
          UserError: by the flag of the command.
        """
        if self.images_per_prompt < 2:
            raise UserError(f"--num_images={self.images_per_prompt}: a pair needs at least 2 of a prompt")
        if self.pairs not in PAIRS:
            raise UserError(spelling.unknown("--pairs", self.pairs, PAIRS))
        if self.temperature < 0:
            raise UserError(f"--temperature={self.temperature:g}: must not be negative")


def label(
    model: str | Path,
    prompts: Sequence[Prompt],
    reward: Reward,
    out: Path,
    rendering: Rendering,
    pairing: Pairing,
    *,
    overwrite: bool = False,
) -> dict[str, float]:
    """Draws, scores and orders images; writes out/pairs.jsonl, which the source `folder` reads.

    Args:
      model: draws the images.
      prompts: to draw.
      reward: orders the images of a prompt.
      out: gets images/, scores/ and pairs.jsonl.
      rendering: how the images are drawn.
      pairing: which images are compared.
      overwrite: whether images of other settings that are in `out` may be deleted.

    Returns:
      What was done: images; pairs; ties, comparisons that were left out because the scores are equal; winners
      and losers, the mean score of the images that won and that lost.

    Raises:
      UserError: a setting that is refused, or no two images of a prompt with different scores.
    """
    name, images = str(model), out / "images"
    if (out / _PAIRS_FILE).exists() and not (images / SETTINGS).is_file():
        raise UserError(f"--out={out}: has a pairs.jsonl of others in it; choose another folder")
    seeds = range(_FIRST_SEED, _FIRST_SEED + pairing.images_per_prompt)
    sample({name: model}, prompts, images, rendering, seeds=seeds, overwrite=overwrite)
    requests = [[ImageRequest(prompt.text, i, seed) for seed in seeds] for i, prompt in enumerate(prompts)]
    files = place_images(images, [name], list(itertools.chain(*requests)), rendering.image_format)[name]
    drawn = [ImagesOfPrompt(row[0].prompt, [files[request] for request in row]) for row in requests]
    return _write_pairs(drawn, reward, out, pairing)


def label_images(folder: ImageFolder, reward: Reward, out: Path, pairing: Pairing) -> dict[str, float]:
    """Scores and orders images that exist already; writes out/pairs.jsonl, which the source `folder` reads.

    Args:
      folder: see `read_images`; prompts of which it has one image are left out.
      reward: orders the images of a prompt.
      out: gets gathered/, scores/ and pairs.jsonl.
      pairing: which images are compared.

    Returns:
      What `label` returns.

    Raises:
      UserError: a setting or folder that is refused, an output of other images, an image that cannot be read,
        or no two images of a prompt with different scores.
      FileNotFoundError: the folder, its file of prompts, or an image.
    """
    if not is_empty(out) and not (out / _GATHERED).is_dir():
        raise UserError(f"--out={out}: not empty, and not made from other images; choose another folder")
    if folder.path.resolve().is_relative_to(out.resolve()):  # images would be overwritten by one another
        raise UserError(f"--out={out}: holds --images_from={folder.path}; choose another folder")
    found = [each for each in read_images(folder) if len(each.files) > 1]
    if not found:
        raise UserError(f"--images_from={folder.path}: has one image of each prompt; a pair needs at least 2")
    gathered = out / _GATHERED
    _refuse_other_origin(folder, out)
    processes.wait_for_all("origin checked")
    if processes.is_first():
        gathered.mkdir(parents=True, exist_ok=True)
        write_json(gathered / _ORIGIN, {"images_from": str(folder.path.resolve())})
        gather_images(found, gathered)
    processes.wait_for_all("images gathered")
    return _write_pairs(place_gathered(found, gathered), reward, out, pairing, originals=found)


def _refuse_other_origin(folder: ImageFolder, out: Path) -> None:
    """Refuses an output whose images are from another folder; an earlier version noted none.

    Raises:
      UserError: by the name of the other folder.
    """
    path = out / _GATHERED / _ORIGIN
    if path.is_file():
        fix = f"delete {out}, or choose another folder"
        origin = member(read_object(path, fix), "images_from", str, path, fix)
        if origin != str(folder.path.resolve()):
            raise UserError(f"--out={out}: holds pairs of --images_from={origin}; choose another folder")


def _write_pairs(
    images: Sequence[ImagesOfPrompt],
    reward: Reward,
    out: Path,
    pairing: Pairing,
    *,
    originals: Sequence[ImagesOfPrompt] | None = None,
) -> dict[str, float]:
    """Scores images in `out`, which may be copies, and writes pairs.jsonl; returns what `label` returns."""
    files, named = (
        [file for each in group for file in each.files] for group in (images, originals or images)
    )
    texts = [each.text for each in images for _ in each.files]
    found = score_files(files, texts, [reward], out / "scores", originals=named)[reward.name]
    scores = np.split(found, np.cumsum([len(each.files) for each in images])[:-1])
    choices = choose_pairs(scores, pairing.pairs, pairing.temperature)
    if not choices:
        raise UserError(f"reward {reward.name}: gave all images of a prompt the same score; no pair is left")
    rows = []
    for prompt, *both in choices:
        winner, loser = (images[prompt].files[image] for image in both)
        rows.append(
            {
                "caption": images[prompt].text,
                "winner": winner.relative_to(out).as_posix(),
                "loser": loser.relative_to(out).as_posix(),
                "key": f"{prompt}-{both[0]}-{both[1]}",
                reward.name: [float(scores[prompt][image]) for image in both],
            }
        )
    if processes.is_first():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(out / _PAIRS_FILE, "".join(lines))
    best_worst = pairing.pairs == "best_worst"
    compared = sum(1 if best_worst else math.comb(len(each.files), 2) for each in images)
    won, lost = (np.mean([row[reward.name][i] for row in rows]) for i in (0, 1))
    return {
        "images": len(files),
        "pairs": len(rows),
        "ties": compared - len(rows),
        "winners": float(won),
        "losers": float(lost),
    }
