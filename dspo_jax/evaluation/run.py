"""Draws and scores what an evaluation lacks, compares the models, and writes the report."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.evaluation.image_folders import ImageFolder, Images, find_images
from dspo_jax.evaluation.prompt_sets import PromptSet
from dspo_jax.evaluation.report import write_report
from dspo_jax.evaluation.result import BASE, Evaluation, assess
from dspo_jax.locks import is_empty
from dspo_jax.parallel import processes
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.rewards import load_reward
from dspo_jax.rewards.scores import score_files
from dspo_jax.sampling.drawing import sample
from dspo_jax.sampling.folder import SETTINGS, place_images
from dspo_jax.sampling.image_sampler import Drawing, Job

# What is kept in the output folder: images drawn, their scores, the pictures that edits start from.
_IMAGES, _SCORES, PROMPT_IMAGES = "images", "scores", "prompt_images"


Source = str | Path | ImageFolder
"""A model that draws, or a folder of images that were drawn."""


def evaluate(
    base: Source,
    models: Mapping[str, Source],
    prompts: PromptSet,
    out: Path,
    *,
    rewards: Sequence[str],
    drawing: Drawing,
    seeds: int = 5,
    base_seeds: int | None = None,
    reward_dir: str | Path = "rewards",
    batch_size: int = 16,
    size: tuple[int, int] | None = None,
    compute_dtype: str | None = None,
    image_format: str = "png",
    vae_tile: int = 0,
    overwrite: bool = False,
) -> Evaluation:
    """Draws and scores what is missing, compares, and writes the tables, the figures and index.html.

    Several processes draw and score together; all return the same, the first writes.

    Args:
      base: what the models are compared with.
      models: label -> model.
      prompts: those with an image are edited.
      out: for images, scores and reports.
      rewards: names as `load_reward` takes them.
      drawing: how models draw; images in a folder are taken as they are.
      seeds: images of each prompt, with seeds from 0.
      base_seeds: images of the base, for rejection sampling; None is as many as of the models.
      reward_dir: folder with the weights of the rewards.
      batch_size, size, compute_dtype, image_format, vae_tile, overwrite: as `sample` has them.

    Raises:
      ValueError: what the user can mend: labels, rewards, images, `out`. Before anything is drawn, where it
        can be known by then.
      OSError: a model, an image or the weights of a reward are missing.
    """
    draws = seeds if base_seeds is None else base_seeds
    check_settings(models, out, seeds, draws)
    sources = {BASE: base, **models}
    counts = {label: draws if label == BASE else seeds for label in sources}
    images = {
        label: find_images(source, prompts.prompts, counts[label])
        for label, source in sources.items()
        if isinstance(source, ImageFolder)
    }
    # Each reward is loaded again when it scores: until then the memory is the models'.
    versions = check_rewards(rewards, reward_dir)
    steps = {
        label: load_pipeline(source).step
        for label, source in sources.items()
        if not isinstance(source, ImageFolder)
    }
    for label, step in steps.items():
        source, folder = str(sources[label]), out / _IMAGES / label
        jobs = [Job(p.text, i, seed) for i, p in enumerate(prompts.prompts) for seed in range(counts[label])]
        sample(
            {label: source},
            prompts.prompts,
            folder,
            seeds=range(counts[label]),
            drawing=drawing,
            batch_size=batch_size,
            size=size,
            compute_dtype=compute_dtype,
            image_format=image_format,
            vae_tile=vae_tile,
            overwrite=overwrite,
        )
        files = place_images(folder, [label], jobs, image_format)[label]
        by_prompt = np.array([files[job] for job in jobs]).reshape(len(prompts.prompts), -1).tolist()
        images[label] = Images(source, {**dataclasses.asdict(drawing), "size": size, "step": step}, by_prompt)
    images = {label: images[label] for label in sources}
    scores: dict[str, dict[str, np.ndarray]] = {label: {} for label in images}
    for name, called in zip(rewards, versions, strict=True):
        for label, of_model in _score(name, reward_dir, images, prompts, out / _SCORES).items():
            scores[label][called] = of_model
    evaluation = assess(prompts, images, versions, scores, seeds)
    if processes.is_first():
        write_report(evaluation, out)
    return evaluation


def check_settings(models: Mapping[str, Source], out: Path, seeds: int, draws: int) -> None:
    """Refuses names, numbers of seeds and an output folder that no evaluation can have."""
    if seeds < 1:
        raise UserError(f"--seeds={seeds}: must be at least 1")
    if draws < seeds:
        raise UserError(f"--base_seeds={draws}: must be at least --seeds={seeds}")
    if not models:
        raise UserError("nothing to compare with the base; give --model or --images")
    for label in models:
        if label == BASE:
            raise UserError(f"--model: {label!r} is what the base is called; name it: --model=NAME=DIR")
        if not label or label.startswith(".") or set(label) & set("/\\"):
            raise UserError(f"--model: {label!r} cannot be a folder's name; name it: --model=NAME=DIR")
    _check_out(out)


def _check_out(out: Path) -> None:
    """Refuses a folder with other things in it than an evaluation."""
    marks = (f"{_IMAGES}/*/{SETTINGS}", f"{_SCORES}/*.jsonl", f"{PROMPT_IMAGES}/*")
    ours = any(any(out.glob(mark)) for mark in marks)
    if not (ours or is_empty(out)):
        raise UserError(f"--out={out}: not empty, and not made by this command; choose another folder")


def check_rewards(names: Sequence[str], reward_dir: str | Path) -> dict[str, str]:
    """The version of each reward by the name that tables use; refuses what `load_reward` refuses."""
    versions: dict[str, str] = {}
    for name in names:
        called, version = _load_version(name, reward_dir)
        if called in versions:
            raise UserError(f"--rewards={','.join(names)}: two are called {called!r}; rename one")
        versions[called] = version
    if not versions:
        raise UserError("--rewards: none given")
    return versions


def _load_version(name: str, reward_dir: str | Path) -> tuple[str, str]:
    """A reward's name and version; when this returns, its weights are no longer in memory."""
    reward = load_reward(name, reward_dir)
    return reward.name, reward.version


def _score(
    name: str, reward_dir: str | Path, images: Mapping[str, Images], prompts: PromptSet, cache: Path
) -> dict[str, np.ndarray]:
    """Label -> scores [prompts, seeds]."""
    reward = load_reward(name, reward_dir)
    files = [file for of in images.values() for row in of.files for file in row]
    texts = [prompts.prompts[i].text for of in images.values() for i, row in enumerate(of.files) for _ in row]
    found = score_files(files, texts, [reward], cache)[reward.name]
    ends = np.cumsum([sum(map(len, of.files)) for of in images.values()])
    parts = [part.reshape(len(prompts.prompts), -1) for part in np.split(found, ends[:-1])]
    return dict(zip(images, parts, strict=True))
