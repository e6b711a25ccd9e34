"""Models against their base: the same prompts and seeds from each, rewards, win rates with intervals, a page.

    python -m dspo_jax.evaluate --base MODEL_DIR --model runs/mine --prompts parti=PartiPrompts.tsv \\
        --rewards compressibility,own.py:my_reward --out eval

What has been drawn and scored is kept: the same command, stopped anywhere, goes on; more models, rewards or
seeds add to it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console

from dspo_jax import cli, distributed, sharding
from dspo_jax.drawing_flags import define_drawing_flags, read_drawing_flags
from dspo_jax.evaluation import BASE, Evaluation, assess
from dspo_jax.evaluation_report import print_report, write_report
from dspo_jax.image_folders import ImageFolder, Images, find_images
from dspo_jax.image_sampler import Drawing, Job
from dspo_jax.locks import is_empty
from dspo_jax.pipeline import load_pipeline
from dspo_jax.prompt_sets import SETS, PromptSet, read_prompt_set
from dspo_jax.rewards import load_reward
from dspo_jax.sample import sample
from dspo_jax.sample_folder import SETTINGS, place_images
from dspo_jax.scores import score_files

# What is kept in the output folder: images drawn, their scores, the pictures that edits start from.
_IMAGES, _SCORES, _PROMPT_IMAGES = "images", "scores", "prompt_images"

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
    _check(models, out, seeds, draws)
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
    if distributed.is_first():
        write_report(evaluation, out)
    return evaluation


def _check(models: Mapping[str, Source], out: Path, seeds: int, draws: int) -> None:
    if seeds < 1:
        raise ValueError(f"--seeds={seeds}: must be at least 1")
    if draws < seeds:
        raise ValueError(f"--base_seeds={draws}: must be at least --seeds={seeds}")
    if not models:
        raise ValueError("nothing to compare with the base; give --model or --images")
    for label in models:
        if label == BASE:
            raise ValueError(f"--model: {label!r} is what the base is called; name it: --model=NAME=DIR")
        if not label or label.startswith(".") or set(label) & set("/\\"):
            raise ValueError(f"--model: {label!r} cannot be a folder's name; name it: --model=NAME=DIR")
    _check_out(out)


def _check_out(out: Path) -> None:
    """Refuses a folder with other things in it than an evaluation."""
    marks = (f"{_IMAGES}/*/{SETTINGS}", f"{_SCORES}/*.jsonl", f"{_PROMPT_IMAGES}/*")
    ours = any(any(out.glob(mark)) for mark in marks)
    if not (ours or is_empty(out)):
        raise ValueError(f"--out={out}: not empty, and not made by this command; choose another folder")


def check_rewards(names: Sequence[str], reward_dir: str | Path) -> dict[str, str]:
    """The version of each reward by the name that tables use; refuses what `load_reward` refuses."""
    versions: dict[str, str] = {}
    for name in names:
        called, version = _load_version(name, reward_dir)
        if called in versions:
            raise ValueError(f"--rewards={','.join(names)}: two are called {called!r}; rename one")
        versions[called] = version
    if not versions:
        raise ValueError("--rewards: none given")
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


def read_options(settings: Any) -> dict[str, Any]:
    """The arguments of `evaluate` that the command's flags stand for.

    Raises:
      ValueError: a flag that is refused.
      OSError: a file that is missing.
    """
    if bool(settings.base) == bool(settings.base_images):
        raise ValueError("--base or --base_images: give one of them")
    models: dict[str, Source] = {}
    for flag, texts in (("model", settings.model), ("images", settings.images)):
        for text in texts:
            label, path = _parse_named(text)
            if label in models:
                raise ValueError(f"--{flag}={text}: two are called {label!r}; name it: --{flag}=NAME=DIR")
            models[label] = path if flag == "model" else ImageFolder(Path(path), settings.allow_outside)
    out = Path(settings.out)
    _check(models, out, settings.seeds, settings.base_seeds or settings.seeds)
    outside = settings.allow_outside
    prompts = read_prompt_set(settings.prompts, out / _PROMPT_IMAGES, allow_outside=outside)
    options = read_drawing_flags(settings, prompts.prompts)
    return {
        "base": settings.base or ImageFolder(Path(settings.base_images), outside),
        "models": models,
        "out": out,
        "rewards": settings.rewards,
        "reward_dir": settings.reward_dir,
        "seeds": settings.seeds,
        "base_seeds": settings.base_seeds,
        **options,
        "prompts": PromptSet(prompts.name, tuple(options["prompts"])),
    }


def _parse_named(text: str) -> tuple[str, str]:
    """(label, path) of `DIR` or `NAME=DIR`."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return Path(text).name or Path(text).resolve().name, text
    return name, path


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    sharding.use_cpu_cores()
    distributed.initialize_from_flags()
    with distributed.claim(Path(flags.FLAGS.out)):
        options = read_options(flags.FLAGS)
        evaluation = evaluate(**options)
    if distributed.is_first():
        print_report(evaluation, Console())
        print(options["out"] / "index.html")


if __name__ == "__main__":
    flags.DEFINE_string("base", None, "What is compared with: a diffusers folder or a training workdir.")
    flags.DEFINE_multi_string("model", [], "Such a folder, or NAME=DIR; may be repeated.")
    flags.DEFINE_string("base_images", None, "In place of --base, a folder of images made elsewhere.")
    flags.DEFINE_multi_string("images", [], "In place of --model, the same; may be repeated.")
    flags.DEFINE_string(
        "prompts",
        None,
        f"NAME=FILE, FOLDER or HUB_ID of a published set ({', '.join(SETS)}), or a file as sample takes it.",
        required=True,
    )
    flags.DEFINE_list(
        "rewards", None, "Rewards, separated by commas; FILE.py:FUNCTION is your own.", required=True
    )
    flags.DEFINE_string("reward_dir", "rewards", "Folder with the weights of each reward under its name.")
    flags.DEFINE_integer("seeds", 5, "Images of each prompt, with seeds 0, 1, ...")
    flags.DEFINE_integer("base_seeds", None, "More images of the base, for rejection sampling.")
    flags.DEFINE_string("out", None, "Folder for images, scores and reports.", required=True)
    define_drawing_flags()
    distributed.define_flags()
    cli.run(main)
