"""Runs an evaluation: draws and scores missing images, compares the models, and writes the report."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from dspo_jax.errors import UserError
from dspo_jax.evaluation.image_folders import ImageFolder, Images, find_images
from dspo_jax.evaluation.people import Votes
from dspo_jax.evaluation.prompt_sets import PromptSet
from dspo_jax.evaluation.report import write_report
from dspo_jax.evaluation.result import BASE, Evaluation, assess
from dspo_jax.locks import is_empty
from dspo_jax.parallel import processes
from dspo_jax.pipelines.loading import Adapted
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.rewards import load_reward
from dspo_jax.rewards.scores import score_files
from dspo_jax.sampling.drawing import sample
from dspo_jax.sampling.folder import SETTINGS, place_images
from dspo_jax.sampling.image_sampler import ImageRequest
from dspo_jax.sampling.rendering import Rendering

# Folders in the output: images drawn, their scores, the pictures that edits start from.
_IMAGES, _SCORES, PROMPT_IMAGES = "images", "scores", "prompt_images"


ModelOrImages = str | Path | Adapted | ImageFolder
"""A model that draws, or a folder of images that were drawn."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Models, their base, and the images and votes that they are judged by.

    Attributes:
      base: the model or folder that the models are compared with.
      models: label -> model.
      prompts: to draw; an image of a prompt is edited.
      seeds: images of each prompt, with seeds from 0.
      base_seeds: images of the base, for rejection sampling; None is as many as of the models.
      votes: people's, by question, as `read_votes` gives them.
    """

    base: ModelOrImages
    models: Mapping[str, ModelOrImages]
    prompts: PromptSet
    seeds: int = 5
    base_seeds: int | None = None
    votes: Mapping[str, Votes] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses labels and numbers of seeds that no evaluation can have.

        Raises:
          UserError: by the flag of the command.
        """
        if self.seeds < 1:
            raise UserError(f"--num_seeds={self.seeds}: must be at least 1")
        if self.base_seeds is not None and self.base_seeds < self.seeds:
            raise UserError(f"--num_base_seeds={self.base_seeds}: must be at least --num_seeds={self.seeds}")
        if not self.models:
            raise UserError("nothing to compare with the base; give --model or --images")
        for label in self.models:
            if label == BASE:
                raise UserError(f"--model: {label!r} is what the base is called; name it: --model=NAME=DIR")
            if not label or label.startswith(".") or set(label) & set("/\\"):
                raise UserError(f"--model: {label!r} cannot be a folder's name; name it: --model=NAME=DIR")

    def count_seeds(self, label: str) -> int:
        """Returns images of each prompt by the base or a model."""
        return self.base_seeds if label == BASE and self.base_seeds is not None else self.seeds


def evaluate(
    comparison: Comparison,
    out: Path,
    rendering: Rendering,
    *,
    rewards: Sequence[str],
    reward_dir: str | Path = "rewards",
    overwrite: bool = False,
    single_file: bool = False,
) -> Evaluation:
    """Draws and scores what is missing, compares, and writes the tables, the figures and index.html.

    Several processes draw and score together; all return the same, the first writes.

    Args:
      comparison: what is compared.
      out: for images, scores and reports.
      rendering: how models draw; images in a folder are taken as they are.
      rewards: names as `load_reward` takes them.
      reward_dir: folder with the weights of the rewards.
      overwrite: whether images of other settings that are in `out` may be deleted.
      single_file: whether index.html holds all its pictures itself.

    Raises:
      UserError: what the user can mend: rewards, images, `out`. Before anything is drawn, where it can be
        known by then.
      OSError: a model, an image or the weights of a reward are missing.
    """
    check_out(out)
    prompts = comparison.prompts
    origins = {BASE: comparison.base, **comparison.models}
    images = {
        label: find_images(origin, prompts.prompts, comparison.count_seeds(label))
        for label, origin in origins.items()
        if isinstance(origin, ImageFolder)
    }
    # Each reward is loaded again when it scores: until then the memory is the models'.
    versions = check_rewards(rewards, reward_dir)
    models = {label: origin for label, origin in origins.items() if not isinstance(origin, ImageFolder)}
    pipes = {label: rendering.drawing.load(model) for label, model in models.items()}
    for line in differences_of_text(pipes):
        logging.warning("%s", line)
    for label, pipe in pipes.items():
        model, folder = models[label], out / _IMAGES / label
        seeds = range(comparison.count_seeds(label))
        sample({label: model}, prompts.prompts, folder, rendering, seeds=seeds, overwrite=overwrite)
        requests = [ImageRequest(p.text, i, seed) for i, p in enumerate(prompts.prompts) for seed in seeds]
        files = place_images(folder, [label], requests, rendering.image_format)[label]
        by_prompt = np.array([files[each] for each in requests]).reshape(len(prompts.prompts), -1).tolist()
        drawing = rendering.drawing.suited_to(pipe)
        how = {**dataclasses.asdict(drawing), "size": rendering.size, "step": pipe.step}
        how |= pipe.text
        images[label] = Images(str(model), how, by_prompt)
    images = {label: images[label] for label in origins}
    scores: dict[str, dict[str, np.ndarray]] = {label: {} for label in images}
    for name, called in zip(rewards, versions, strict=True):
        for label, of_model in _score(name, reward_dir, images, prompts, out / _SCORES).items():
            scores[label][called] = of_model
    evaluation = assess(prompts, images, versions, scores, comparison.seeds, comparison.votes)
    if processes.is_first():
        write_report(evaluation, out, single_file=single_file)
    return evaluation


def differences_of_text(pipes: Mapping[str, Pipeline]) -> list[str]:
    """Says how models of the base's kind read prompts otherwise than the base: a folder does not record it.

    Args:
      pipes: label -> model, the base among them unless its images are there already.
    """
    base = pipes.get(BASE)
    if base is None:
        return []
    return [
        f"{label} reads prompts with {key} = {getattr(pipe, key)}, and the base with {getattr(base, key)}: "
        f"win rates would count that, too; give --{key}={getattr(pipe, key)} if the base was trained so"
        for label, pipe in pipes.items()
        if pipe.family == base.family
        for key in ("max_chunks", "clip_skip", "max_sequence_length")
        if getattr(pipe, key) != getattr(base, key)
    ]


def check_out(out: Path) -> None:
    """Refuses a folder with other things in it than an evaluation.

    Raises:
      UserError: it is not empty, and no evaluation wrote it.
    """
    marks = (f"{_IMAGES}/*/{SETTINGS}", f"{_SCORES}/*.jsonl", f"{PROMPT_IMAGES}/*")
    ours = any(any(out.glob(mark)) for mark in marks)
    if not (ours or is_empty(out)):
        raise UserError(f"--out={out}: not empty, and not made by this command; choose another folder")


def check_rewards(names: Sequence[str], reward_dir: str | Path) -> dict[str, str]:
    """Returns the version of each reward by the name that tables use; refuses what `load_reward` refuses."""
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
    """Returns a reward's name and version; when this returns, its weights are no longer in memory."""
    reward = load_reward(name, reward_dir)
    return reward.name, reward.version


def _score(
    name: str, reward_dir: str | Path, images: Mapping[str, Images], prompts: PromptSet, cache: Path
) -> dict[str, np.ndarray]:
    """Scores the images of every label: label -> scores [prompts, seeds]."""
    reward = load_reward(name, reward_dir)
    files = [file for of in images.values() for row in of.files for file in row]
    texts = [prompts.prompts[i].text for of in images.values() for i, row in enumerate(of.files) for _ in row]
    found = score_files(files, texts, [reward], cache)[reward.name]
    ends = np.cumsum([sum(map(len, of.files)) for of in images.values()])
    parts = [part.reshape(len(prompts.prompts), -1) for part in np.split(found, ends[:-1])]
    return dict(zip(images, parts, strict=True))
