"""Online methods on the emoji model, each to the same number of scored images: a figure and a table.

    python -m benchmarks.online --out docs/online.png

`draft_k` on colourfulness and `ddpo` on compressibility, each beside online Diffusion-DPO on the same reward.
The recipes are those of configs/; only lengths and rounds are changed. The reward that is not trained by is
watched on held-out prompts, whose images are not counted. The four took about 80 minutes of CPU time, beside
other work: by that some 40 on two cores, of which DDPO 26. A run that was stopped goes on where it was, and
one that is finished is only read.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure, SubFigure
from ml_collections import ConfigDict
from PIL import Image

from configs import emoji_ddpo, emoji_draft, emoji_online_dpo
from dspo_jax import cli
from dspo_jax.files import whole
from dspo_jax.images.contact_sheet import CELL, LINE
from dspo_jax.monitoring.metrics import read_metrics, read_validations

SCORED, BETWEEN = 768, 128  # images scored in a run, and from one validation to the next
REWARDS = ("colourfulness", "compressibility")


class Method(NamedTuple):
    """An online method: its recipe, and how it is drawn."""

    label: str
    recipe: ConfigDict
    colour: str
    marker: str


METHODS = {
    "draft_k": Method("DRaFT-1", emoji_draft.get_config(), "#0072b2", "o"),
    "ddpo": Method("DDPO", emoji_ddpo.get_config(), "#b84a00", "^"),
    "online_dpo": Method("online DPO", emoji_online_dpo.get_config(), "#707070", "s"),
}
RUNS = (
    ("draft_k", "colourfulness"),
    ("online_dpo", "colourfulness"),
    ("ddpo", "compressibility"),
    ("online_dpo", "compressibility"),
)


class Found(NamedTuple):
    """Result of a run, by the number of images that were scored until then.

    Attributes:
      scores: held-out scalars.
      pictures: of the base, at 0, and of the policy: images [H, W, 3] of the recipe's prompts.
      minutes: from the run's start to its end.
    """

    scores: Mapping[int, Mapping[str, float]]
    pictures: Mapping[int, Sequence[np.ndarray]]
    minutes: float

    def curve(self, name: str) -> list[float]:
        """Returns a scalar at every validation."""
        return [scores[name] for scores in self.scores.values()]


def images_of_an_update(config: ConfigDict) -> int:
    """Returns how many images are scored for one update."""
    return int(config.batch_size * (config.stream.images if config.stream.kind == "own_pairs" else 1))


def other(reward: str) -> str:
    """Returns the reward that is watched where `reward` is trained by."""
    return REWARDS[1 - REWARDS.index(reward)]


def make_config(method: str, reward: str) -> ConfigDict:
    """Returns the recipe of a method, changed for a reward and the number of scored images."""
    config = METHODS[method].recipe.copy_and_resolve_references()
    updates = BETWEEN // images_of_an_update(config)
    config.rewards.train, config.rewards.validation = reward, (other(reward),)
    config.steps = SCORED // images_of_an_update(config)
    config.validation.every = config.checkpoint.every = updates
    config.samples.every = 2 * updates
    if config.stream.kind == "own_pairs":
        config.stream.updates = updates  # a round from one validation to the next
    return config


def read(workdir: Path, config: ConfigDict) -> Found | None:
    """Reads a run; None where it has not reached its last step."""
    path, each = workdir / "metrics.jsonl", images_of_an_update(config)
    validations = read_validations(path) if path.is_file() else {}
    if config.steps not in validations:
        return None
    scores = {step * each: scalars for step, scalars in validations.items()}
    pictures: dict[int, Sequence[np.ndarray]] = {}
    for sheet in sorted(workdir.glob("samples/step_*.png")):
        step = int(sheet.stem.removeprefix("step_"))
        pictures[0], pictures[step * each] = cut(sheet, len(config.samples.prompts))
    return Found(scores, pictures, read_metrics(path)[-1]["wall_seconds"] / 60)


def cut(sheet: Path, rows: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cuts the images of a grid of samples out of it: those of the base, and those of the policy."""
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    # Two lines of headings; then in each row a line with its prompt, images, lines with their rewards and
    # a margin; and one at the end.
    margin = (pixels.shape[1] - 2 * CELL) // 4
    each = (pixels.shape[0] - 2 * LINE - margin) // rows
    tops = [3 * LINE + row * each for row in range(rows)]
    base, policy = (
        [pixels[top : top + CELL, left : left + CELL] for top in tops] for left in (margin, CELL + 3 * margin)
    )
    return base, policy


def win_rate(scores: Mapping[str, float], reward: str) -> str:
    """Returns a win rate with its interval, in per cent."""
    share, low, high = (100 * scores[f"win_rate_{reward}{end}"] for end in ("", "_low", "_high"))
    return f"{share:.0f} % [{low:.0f}, {high:.0f}]"


def markdown(results: Mapping[tuple[str, str], Found]) -> str:
    """Returns the table: the start and the end of every run."""
    rows = [
        "| run | images scored | trained reward | wins | the other reward | wins | diversity | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (method, reward), found in results.items():
        points = list(found.scores.items())
        for scored, scores in (points[0], points[-1]):
            name = f"{METHODS[method].label} on {reward}" if scored else "the model at the start"
            cells = [f"{name}", f"{scored:,}"]
            for each in (reward, other(reward)):
                cells.append(f"{scores[f'reward_{each}']:.4g}")
                cells.append(win_rate(scores, each) if scored else "")
            cells.append(f"{scores['diversity']:.3f}")
            cells.append(f"{found.minutes:.0f}" if scored else "")
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(results: Mapping[tuple[str, str], Found]) -> Figure:
    """Draws the figure: the course of every run, what became of all else meanwhile, and pictures."""
    figure = Figure(figsize=(9, 10.5), dpi=100, layout="constrained")
    parts: np.ndarray = figure.subfigures(3, 1, height_ratios=(7, 7, 6))  # type: ignore[assignment]
    *above, below = parts
    for part, reward in zip(above, REWARDS, strict=True):
        _draw_curves(part, reward, {name: found for name, found in results.items() if name[1] == reward})
    _draw_pictures(below, results)
    return figure


def _draw_curves(figure: SubFigure, reward: str, results: Mapping[tuple[str, str], Found]) -> None:
    course, held_out, diversity = figure.subplot_mosaic("ab;ac").values()
    held_out.sharex(diversity)
    for (method, _), found in results.items():
        label, _, colour, marker = METHODS[method]
        rewards, watched = found.curve(f"reward_{reward}"), found.curve(f"reward_{other(reward)}")
        label += f", {win_rate(list(found.scores.values())[-1], reward)}"
        course.plot(list(found.scores), rewards, color=colour, marker=marker, label=label)
        course.axhline(rewards[0], color=colour, linestyle="--", linewidth=1)
        for axes, values in ((held_out, watched), (diversity, found.curve("diversity"))):
            axes.plot(rewards, values, color=colour, marker=marker, markersize=5)
            axes.plot(rewards[0], values[0], "o", color="black", markersize=7, zorder=3)
    course.set(xlabel="images scored in training; dashed: the base", ylabel=f"{reward}, held-out prompts")
    course.set_title(f"trained by {reward}", fontweight="bold", fontsize=11)
    course.legend(title="wins over the base at the end", alignment="left", frameon=False, fontsize=9)
    held_out.set_ylabel(other(reward))
    held_out.set_title("what was not trained; black: the base", fontsize=11)
    held_out.tick_params(labelbottom=False)
    diversity.set(xlabel=f"{reward}, held-out prompts", ylabel="diversity")
    diversity.locator_params(axis="x", nbins=5)
    for axes in (course, held_out, diversity):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def _draw_pictures(figure: SubFigure, results: Mapping[tuple[str, str], Found]) -> None:
    columns = {"the base": next(iter(results.values())).pictures[0]}
    for (method, reward), found in results.items():
        shown = [scored for scored in found.pictures if scored == SCORED or (method == "draft_k" and scored)]
        for scored in shown:
            columns[f"{METHODS[method].label},\n{reward},\n{scored} images"] = found.pictures[scored]
    prompts = METHODS["draft_k"].recipe.samples.prompts
    axes = figure.subplots(len(prompts), len(columns))
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture)
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].spines[:].set_visible(False)
    for row, prompt in enumerate(prompts):
        label = textwrap.fill(prompt, 12)
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)


def main(argv: Sequence[str]) -> int:
    """Runs what is not finished, prints the table and draws the figure; returns the exit status."""
    from dspo_jax.parallel.mesh import use_cpu_cores
    from dspo_jax.training.run import train

    del argv
    use_cpu_cores(2)
    results = {}
    for method, reward in RUNS:
        config = make_config(method, reward)
        workdir = Path(flags.FLAGS.workdir) / f"{method}_{reward}"
        if read(workdir, config) is None:
            train(config, workdir)
        found = read(workdir, config)
        if found is None:
            print("stopped; the same command goes on from there")
            return cli.EXIT_STOPPED
        results[method, reward] = found
    print(markdown(results))
    out = Path(flags.FLAGS.out)
    drawn = io.BytesIO()
    draw(results).savefig(drawn, format="png")
    with whole(out, shared=True) as partial, Image.open(drawn) as image:  # a quarter of the bytes
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(partial, "png", optimize=True)
    print(f"drew {out}")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The PNG to draw.", required=True)
    flags.DEFINE_string("workdir", "runs/online", "Folder for the runs.")
    cli.run(main)
