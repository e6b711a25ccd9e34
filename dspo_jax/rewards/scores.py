"""Scores of image files, kept beside them so that nothing is scored twice."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.files import name_write_errors
from dspo_jax.images.decode import decode_image
from dspo_jax.images.image_files import BadRow
from dspo_jax.monitoring.progress import Progress
from dspo_jax.parallel import processes
from dspo_jax.rewards import Reward

_CHUNK = 256  # images that are read at a time, and lost when the process is killed


def score_files(
    files: Sequence[Path],
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    cache: Path,
    *,
    originals: Sequence[Path] | None = None,
) -> dict[str, np.ndarray]:
    """Scores of N image files: reward's name -> [N] float32.

    Each process scores a part of the images, with its own devices; all return all scores.

    Args:
      files: the images.
      prompts: of each.
      rewards: with different names.
      cache: folder for what has been scored, a line each; a file that has changed, or another version of a
        reward or of its treatment of transparency, is scored anew.
      originals: where `files` are copies, what they are copies of, which messages name.

    Raises:
      UserError: an image that cannot be read, or scores that are refused.
    """
    cache.mkdir(parents=True, exist_ok=True)
    names = [_identify(file) for file in files]
    mine = range(jax.process_index(), len(files), jax.process_count())
    for reward in rewards:
        known = _read(cache, reward)
        missing = [i for i in mine if (names[i], prompts[i]) not in known]
        out = cache / f"{reward.name}.{jax.process_index()}.jsonl"
        with (
            Progress(reward.name, len(mine), len(mine) - len(missing), active=processes.is_first()) as bar,
            name_write_errors(out),
            out.open("a", encoding="utf-8") as lines,  # `_read` passes over half a line
        ):
            if out.stat().st_size:
                lines.write("\n")  # ends a line that was cut short
            for start in range(0, len(missing), _CHUNK):
                part = missing[start : start + _CHUNK]
                images = [read_image((originals or files)[i], keep_alpha=reward.reads_alpha) for i in part]
                scores = reward.score(images, [prompts[i] for i in part])
                for i, score in zip(part, scores.tolist(), strict=True):
                    row = {"file": names[i], "prompt": prompts[i], **_how(reward), "score": score}
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                lines.flush()
                bar.update(len(mine) - len(missing) + start + len(part))
    processes.wait_for_all("scores")
    found: Mapping[str, Mapping[tuple[str, str], float]] = {r.name: _read(cache, r) for r in rewards}
    return {
        name: np.array([known[key] for key in zip(names, prompts, strict=True)], np.float32)
        for name, known in found.items()
    }


def read_image(file: Path, *, keep_alpha: bool = False) -> np.ndarray:
    """Reads a picture [H, W, 3] uint8, transparency over white; or [H, W, 4] if transparency is kept.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return np.asarray(decode_image(file, keep_alpha=keep_alpha))
    except BadRow as problem:
        raise UserError(f"{file}: {problem}") from problem


def _how(reward: Reward) -> dict[str, object]:
    """Identifies a kept score. Rows without `reads_alpha` are scores of images laid over white."""
    return {"version": reward.version, "reads_alpha": reward.reads_alpha}


def _identify(file: Path) -> str:
    status = os.stat(file)
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"


def _read(cache: Path, reward: Reward) -> dict[tuple[str, str], float]:
    """Reads kept scores: (file, prompt) -> score; lines that were cut short or are not scores are skipped."""
    known = {}
    for part in sorted(cache.glob(f"{reward.name}.*.jsonl")):
        for line in part.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
                if {"reads_alpha": False, **row}.items() >= _how(reward).items():
                    known[row["file"], row["prompt"]] = float(row["score"])
            except (ValueError, RecursionError, TypeError, KeyError):
                continue
    return known
