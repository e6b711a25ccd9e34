"""An evaluation as figures: win rates as bars, rewards as boxes, rejection sampling as curves."""

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dspo_jax.evaluation.result import BASE, Evaluation
from dspo_jax.evaluation.tables import MARKS, count_images
from dspo_jax.evaluation.win_rates import Verdict

_WIDTH, _COLUMNS = 11.0, 3
_BASE_COLOUR = "lightgray"
# Of models: none is the blue or orange of a verdict.
_MODEL_COLOURS = ("C4", "C2", "C5", "C6", "C8", "C9")

COLOURS: dict[Verdict, str] = {"better": "#0072b2", "worse": "#b84a00", "undecided": "#707070"}
"""Colour of a verdict; blue and orange are told apart by the colour-blind too."""


def draw_figures(evaluation: Evaluation) -> dict[str, Figure]:
    """Draws all figures of an evaluation: name of the file without suffix -> figure, in reading order."""
    figures = {"win_rates": _draw_win_rates(evaluation)}
    if evaluation.seeds > 1:
        figures["wins_by_prompt"] = _draw_wins_by_prompt(evaluation)
    figures["rewards"] = _draw_rewards(evaluation)
    if any(evaluation.rejection.values()):
        figures["rejection"] = _draw_rejection(evaluation)
    return figures


def _colours(evaluation: Evaluation) -> dict[str, str]:
    models = {label: _MODEL_COLOURS[i % len(_MODEL_COLOURS)] for i, label in enumerate(evaluation.models)}
    return {BASE: _BASE_COLOUR, **models}


def _wrap(label: str) -> str:
    return textwrap.fill(textwrap.shorten(label, 60, placeholder=" ..."), 24)


def _draw_win_rates(evaluation: Evaluation) -> Figure:
    """Returns a bar for each reward and model: its colour is the verdict, its pale end the half of the ties.

    Fig. 2 of DSPO's paper, with intervals and ties.
    """
    models = evaluation.models
    judged = {label: evaluation.judged(label) for label in models}
    judges = evaluation.judges
    rows = [(name, label) for name in judges for label in models if name in judged[label]]
    found = [judged[label][name] for name, label in rows]
    places = np.arange(len(rows)) + 0.5 * np.array([judges.index(name) for name, _ in rows])  # gaps between
    figure = Figure(figsize=(_WIDTH, 1.6 + 0.42 * (places[-1] + 2)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    share = np.array([[each.share.low, each.share.value, each.share.high] for each in found]).T * 100
    won, tied, lost = np.array([[each.images_won, each.images_tied, each.images_lost] for each in found]).T
    solid = 100 * won / (won + tied + lost)
    colours = [COLOURS[each.verdict] for each in found]
    axes.barh(places, solid, color=colours)
    axes.barh(
        places,
        share[1] - solid,
        left=solid,
        color=colours,
        alpha=0.4,
        xerr=np.maximum(np.diff(share, axis=0), 0),  # rounding may put a bound beyond the mean
        error_kw={"elinewidth": 1.2, "capsize": 3, "ecolor": "0.25"},
    )
    for place, value, high, each in zip(places, share[1], share[2], found, strict=True):
        text = f"{value:.1f}  {MARKS[each.verdict]}  ({count_images(each)})"
        axes.text(max(high, 50) + 1, place, text, va="center", fontsize=9, color=COLOURS[each.verdict])
    axes.axvline(50, color="dimgray", linestyle="--", linewidth=1)
    one = len(models) == 1
    axes.set_yticks(places, [_wrap(name if one else f"{name}: {label}") for name, label in rows])
    axes.set_ylim(places[-1] + 1, -1)  # a single bar is no thicker than one of many
    axes.set_xlim(0, 150)  # the counts stand beside the longest bar
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("win rate over the base, %, with its 95 % interval; pale: half of the ties", loc="left")
    _tidy(axes, "x")
    handles = [Patch(color=COLOURS[verdict], label=mark) for verdict, mark in MARKS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def _draw_wins_by_prompt(evaluation: Evaluation) -> Figure:
    """Boxes of the share of its seeds that a prompt wins; Fig. S4 of Diffusion-DPO's supplement."""

    def draw(axes: Axes, name: str) -> None:
        base = evaluation.scores[BASE][name][:, : evaluation.seeds]
        shares = []
        for label in evaluation.models:
            scores = evaluation.scores[label][name]
            shares.append(100 * ((scores > base) + (scores == base) / 2).mean(axis=1))
        _draw_boxes(axes, evaluation, evaluation.models, shares)
        axes.axvline(50, color="dimgray", linestyle="--", linewidth=1)
        axes.set_xlim(-4, 104)

    title = "of the seeds of a prompt, the share that scores higher than the base, %"
    return _draw_panels(evaluation, draw, len(evaluation.models), title)


def _draw_rewards(evaluation: Evaluation) -> Figure:
    """Boxes of the rewards of all images."""

    def draw(axes: Axes, name: str) -> None:
        scores = [
            evaluation.scores[label][name][:, : evaluation.seeds].ravel() for label in evaluation.images
        ]
        _draw_boxes(axes, evaluation, list(evaluation.images), scores)

    return _draw_panels(evaluation, draw, len(evaluation.images), "rewards of all images")


def _draw_boxes(
    axes: Axes, evaluation: Evaluation, labels: Sequence[str], values: Sequence[np.ndarray]
) -> None:
    boxes = axes.boxplot(
        list(values),
        orientation="horizontal",
        patch_artist=True,
        widths=0.6,
        showmeans=True,
        meanprops={"marker": "D", "markersize": 4, "markerfacecolor": "white", "markeredgecolor": "black"},
        medianprops={"color": "black"},
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": "gray"},
    )
    colours = _colours(evaluation)
    for box, label in zip(boxes["boxes"], labels, strict=True):
        box.set_facecolor(colours[label])
    axes.set_yticks(range(1, len(labels) + 1), list(map(_wrap, labels)))
    axes.invert_yaxis()
    _tidy(axes, "x")


def _draw_panels(evaluation: Evaluation, draw: Callable[[Axes, str], None], boxes: int, title: str) -> Figure:
    """Returns a panel for each reward."""
    names = list(evaluation.rewards)
    columns = min(_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    height = 0.5 + rows * (0.9 + 0.45 * boxes)
    figure = Figure(figsize=(_WIDTH, height), dpi=100, layout="constrained")
    figure.suptitle(title)
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, number + 1)
        draw(axes, name)
        axes.set_title(_wrap(name), fontsize=11)
        axes.tick_params(labelleft=number % columns == 0)
    return figure


def _draw_rejection(evaluation: Evaluation) -> Figure:
    """Draws the best of n of the base against one of the model; Fig. S5 of Diffusion-DPO's supplement."""
    colours = _colours(evaluation)

    def draw(axes: Axes, name: str) -> None:
        for label in evaluation.models:
            curve = 100 * evaluation.rejection[label][name].win_rate
            draws = np.arange(1, len(curve) + 1)
            axes.plot(draws, curve, color=colours[label], label=_wrap(label), marker=".", markersize=3)
        axes.axhline(50, color="dimgray", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= draws[-1]]
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.minorticks_off()
        axes.set_ylim(0, 101)
        axes.set_yticks(range(0, 101, 25))
        axes.set_xlabel("draws of the base")
        _tidy(axes, "both")

    figure = _draw_panels(evaluation, draw, 4, "the best of several draws of the base beats the model, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    return figure


def _tidy(axes: Axes, grid: Literal["x", "both"]) -> None:
    axes.grid(alpha=0.25, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
