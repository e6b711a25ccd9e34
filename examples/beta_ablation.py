"""Ablation of beta: one run for each value, the same prompts from all runs, median rewards over beta.

    python -m examples.beta_ablation --config configs/emoji_diffusion_dpo.py --betas 500,2000,8000 \\
        --prompts examples/emoji/prompts.txt --rewards compressibility --out runs/beta

Diffusion-DPO's supplement shows it for PickScore and Pick-a-Pic's validation prompts (S5, Fig. S2): too small
a beta lets the model degenerate, too large a one holds it at the reference. Runs and evaluation are kept, so
that what was stopped goes on, and more betas may be added.
"""

import copy
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from dspo_jax import cli
from dspo_jax.errors import UserError
from dspo_jax.evaluation.prompt_sets import PromptSet, read_prompt_set
from dspo_jax.evaluation.result import BASE, Evaluation
from dspo_jax.evaluation.run import Comparison, check_rewards, evaluate
from dspo_jax.files import whole
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import use_cpu_cores
from dspo_jax.parallel.process_flags import define_process_flags
from dspo_jax.sampling.drawing_flags import define_drawing_flags
from dspo_jax.sampling.options import read_drawing_flags
from dspo_jax.training.run import train


def write_medians(evaluation: Evaluation, betas: Sequence[float], out: Path) -> None:
    """Writes beta.csv (reward, beta, median, quartiles; beta of the base is empty) and beta.png."""
    rewards = list(evaluation.rewards)
    figure = Figure(figsize=(5 * len(rewards), 4), layout="constrained")
    axes = figure.subplots(1, len(rewards), squeeze=False)[0]
    rows = []
    for axis, reward in zip(axes, rewards, strict=True):
        labels = [BASE, *(f"{beta:g}" for beta in betas)]
        quartiles = np.array([np.percentile(evaluation.scores[x][reward], (25, 50, 75)) for x in labels])
        rows += [
            [reward, "" if label == BASE else label, *map(float, three)]
            for label, three in zip(labels, quartiles, strict=True)
        ]
        axis.plot(betas, quartiles[1:, 1], marker="o", label="median")
        axis.fill_between(betas, quartiles[1:, 0], quartiles[1:, 2], alpha=0.2, label="quartiles")
        axis.axhline(quartiles[0, 1], color="gray", linestyle="--", label="median of the base")
        axis.set(xscale="log", xlabel="beta", ylabel=reward)
        axis.set_xticks(betas, labels[1:])
        axis.minorticks_off()
        axis.legend()
    with whole(out / "beta.png") as partial:
        figure.savefig(partial, format="png", dpi=120)
    with whole(out / "beta.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["reward", "beta", "lower quartile", "median", "upper quartile"], *rows])


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    values = flags.FLAGS
    try:
        betas = sorted({float(text) for text in values.betas})
    except ValueError as error:
        raise UserError(f"--betas={','.join(values.betas)}: must be numbers, separated by commas") from error
    use_cpu_cores()
    processes.initialize_from_flags()
    out = Path(values.out)
    with processes.claim(out):
        ablate(values, betas, out)


def ablate(values: Any, betas: Sequence[float], out: Path) -> None:
    """Trains what is not there yet, evaluates it, and writes beta.csv and beta.png.

    Args:
      values: the command's flags.
      betas: of the runs.
      out: folder for everything.
    """
    found = read_prompt_set(values.prompts, out / "prompt_images")
    prompts, rendering = read_drawing_flags(values, found.prompts)
    check_rewards(values.rewards, values.reward_dir)  # not after hours of training
    models: dict[str, str | Path] = {}
    for beta in betas:
        config = copy.deepcopy(values.config)
        config.objective.beta = beta
        models[f"{beta:g}"] = workdir = out / f"run_{beta:g}"
        if not train(config, workdir).finished:
            print("stopped; the same command goes on from there")
            return
    evaluation = evaluate(
        Comparison(values.config.model, models, PromptSet(found.name, tuple(prompts)), values.num_seeds),
        out / "evaluation",
        rendering,
        rewards=values.rewards,
        reward_dir=values.reward_dir,
        overwrite=values.overwrite,
    )
    if processes.is_first():
        write_medians(evaluation, betas, out)
        print(out / "beta.png")


if __name__ == "__main__":
    cli.define_config("A recipe whose objective has a beta.")
    flags.DEFINE_list("betas", ["1000", "2000", "5000", "10000"], "Separated by commas.")
    flags.DEFINE_string("prompts", None, "As dspo_jax.evaluate takes them.")
    flags.DEFINE_list("rewards", None, "As dspo_jax.evaluate takes them.")
    flags.DEFINE_string("reward_dir", "rewards", "Folder with the weights of each reward under its name.")
    flags.DEFINE_integer("num_seeds", 1, "Images of each prompt.", lower_bound=1)
    flags.DEFINE_string("out", None, "Folder for runs, evaluation, beta.csv and beta.png.")
    define_drawing_flags()
    define_process_flags()
    cli.run(main, required=("config", "prompts", "rewards", "out"))
