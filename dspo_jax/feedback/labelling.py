"""Preference pairs from a model's own images, ordered by a reward."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.files import write_text
from dspo_jax.parallel import processes
from dspo_jax.rewards import Reward
from dspo_jax.rewards.scores import score_files
from dspo_jax.sampling.drawing import sample
from dspo_jax.sampling.folder import SETTINGS, place_images
from dspo_jax.sampling.image_sampler import Drawing, Job
from dspo_jax.sampling.prompts import Prompt

PAIRS = ("best_worst", "all")


# Evaluations count their seeds from 0: no image that a model is judged by begins with noise it trained on.
_FIRST_SEED = 1000


class Choice(NamedTuple):
    """One comparison: by number the prompt, its image that won, and the one that lost."""

    prompt: int
    winner: int
    loser: int


def choose_pairs(
    scores: np.ndarray, pairs: str = "best_worst", temperature: float = 0.0, seed: int = 0
) -> list[Choice]:
    """Which images are compared, and which of them win; images with equal scores are never compared.

    Args:
      scores: [prompts, images of each].
      pairs: "best_worst" compares a prompt's best with its worst; "all" every two of its images.
      temperature: 0: the higher score wins. Above it the winner is drawn, as the noisy judgements of the
        Bradley-Terry model are: P(a wins) = sigmoid((score of a - score of b) / temperature).
      seed: of that draw.
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


def label(
    model: str | Path,
    prompts: Sequence[Prompt],
    reward: Reward,
    out: Path,
    *,
    images_per_prompt: int = 4,
    pairs: str = "best_worst",
    temperature: float = 0.0,
    drawing: Drawing,
    batch_size: int,
    image_format: str = "png",
    **how: Any,
) -> dict[str, float]:
    """Draws, scores and orders images; writes out/pairs.jsonl, which the source `folder` reads.

    Args:
      model: draws the images.
      prompts: what of.
      reward: what orders them.
      out: gets images/, scores/ and pairs.jsonl.
      images_per_prompt: their seeds begin at 1000; those of evaluations at 0.
      pairs, temperature: see `choose_pairs`.
      drawing, batch_size, image_format, how: see `drawing.sample`.

    Returns:
      What was done: images; pairs; ties, comparisons that were left out because the scores are equal; winners
      and losers, the mean score of the images that won and that lost.

    Raises:
      ValueError: a setting that is refused, or no two images of a prompt with different scores.
    """
    if images_per_prompt < 2:
        raise UserError(f"--images={images_per_prompt}: a pair needs at least 2 images of a prompt")
    if temperature < 0:
        raise UserError(f"--temperature={temperature:g}: must not be negative")
    name, images, path = str(model), out / "images", out / "pairs.jsonl"
    if path.exists() and not (images / SETTINGS).is_file():
        raise UserError(f"--out={out}: has a pairs.jsonl of others in it; choose another folder")
    seeds = range(_FIRST_SEED, _FIRST_SEED + images_per_prompt)
    sample(
        {name: model},
        prompts,
        images,
        seeds=seeds,
        drawing=drawing,
        batch_size=batch_size,
        image_format=image_format,
        **how,
    )
    jobs = [Job(prompt.text, i, seed) for i, prompt in enumerate(prompts) for seed in seeds]
    placed = place_images(images, [name], jobs, image_format)[name]
    files = [placed[job] for job in jobs]
    scores = score_files(files, [job.prompt for job in jobs], [reward], out / "scores")[reward.name]
    scores = scores.reshape(len(prompts), images_per_prompt)
    choices = choose_pairs(scores, pairs, temperature)
    if not choices:
        raise UserError(f"reward {reward.name}: gave all images of a prompt the same score; no pair is left")
    rows = []
    for prompt, *both in choices:
        winner, loser = (files[prompt * images_per_prompt + image] for image in both)
        rows.append(
            {
                "caption": prompts[prompt].text,
                "winner": winner.relative_to(out).as_posix(),
                "loser": loser.relative_to(out).as_posix(),
                "key": f"{prompt}-{both[0]}-{both[1]}",
                reward.name: [float(scores[prompt, image]) for image in both],
            }
        )
    if processes.is_first():
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    compared = len(prompts) * (1 if pairs == "best_worst" else math.comb(images_per_prompt, 2))
    won, lost = (np.mean([row[reward.name][i] for row in rows]) for i in (0, 1))
    return {
        "images": len(files),
        "pairs": len(rows),
        "ties": compared - len(rows),
        "winners": float(won),
        "losers": float(lost),
    }
