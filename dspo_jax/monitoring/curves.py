"""Draws a run's metrics as one picture: losses, held-out accuracy, margins and drifts, by timestep."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dspo_jax.errors import UserError
from dspo_jax.files import whole
from dspo_jax.json_files import JsonObject
from dspo_jax.monitoring.metrics import VALIDATION_PREFIX, read_metrics

Records = Sequence[JsonObject]

_PLAIN, _WINNER, _LOSER = "tab:blue", "tab:green", "tab:red"
# A training curve of more points is drawn pale, under its mean over windows of a tenth of them.
_SMOOTHED_FROM, _WINDOWS = 20, 10


class _Panel(NamedTuple):
    """Curves over the steps: metric -> (label, colour); the level that means no difference; whether noisy."""

    title: str
    lines: Mapping[str, tuple[str, str]]
    level: float | None = None
    noisy: bool = False


_PANELS = (
    _Panel("training loss", {"loss": ("loss", _PLAIN)}, noisy=True),
    _Panel("gradient norm, before clipping", {"grad_norm": ("gradient norm", _PLAIN)}, noisy=True),
    _Panel(
        "held-out implicit accuracy",
        {VALIDATION_PREFIX + "implicit_accuracy": ("implicit accuracy", _PLAIN)},
        0.5,
    ),
    _Panel(
        "held-out margin: reward of the winner minus the loser's",
        {VALIDATION_PREFIX + "margin": ("margin", _PLAIN)},
        0.0,
    ),
)
_REWARD = re.compile(rf"{VALIDATION_PREFIX}reward_(.*)")
_WIN_RATE = re.compile(rf"{VALIDATION_PREFIX}win_rate_((?!.*_(low|high)$).*)")
_OF_IMAGES = {
    "diversity": "held-out: difference of two images of a prompt",
    "saturated": "held-out: share of pixels that are black or full",
    "prediction_drift": "held-out: squared difference from the reference's predictions",
}
_DRIFTS = _Panel(
    "held-out drift: error of the policy minus the reference's",
    {
        VALIDATION_PREFIX + "winner_drift": ("winners", _WINNER),
        VALIDATION_PREFIX + "loser_drift": ("losers", _LOSER),
    },
    0.0,
)
_ERRORS = _Panel(
    "held-out denoising error",
    {
        VALIDATION_PREFIX + "winner_error": ("winners", _WINNER),
        VALIDATION_PREFIX + "loser_error": ("losers", _LOSER),
    },
)
# The first of these scalars that a run has is drawn by timestep.
_BINNED = {
    "margin": "held-out margin by timestep",
    "winner_drift": "held-out drift of winners by timestep",
    "winner_error": "held-out denoising error of winners by timestep",
}


def draw_curves(metrics_jsonl: str | Path, png: str | Path, title: str | None = None) -> None:
    """Draws a run's `metrics.jsonl`; the picture appears whole or not at all.

    Args:
      metrics_jsonl: written by `MetricsWriter`; the run may still be going.
      png: the picture, 1200 pixels wide.
      title: above it; the name of the metrics' folder unless it is given.

    Raises:
      FileNotFoundError: there is no such metrics file.
      UserError: it holds nothing to draw, or a damaged line.
    """
    path, png = Path(metrics_jsonl), Path(png)
    figure = make_figure(read_metrics(path), title or path.parent.name)
    if not figure.axes:
        raise UserError(f"{path}: no metrics to draw yet")
    with whole(png) as partial:
        figure.savefig(partial, format="png")


def make_figure(records: Records, title: str) -> Figure:
    """Draws the figure of a run.

    Its panels: the training loss and the gradient's norm; held out, the implicit accuracy with its 95 %
    interval, the margin, the drifts (the errors where there is no reference), and the margin by timestep; of
    a run on the model's own images the reward, and held out the win rates, each reward, and what tells of
    images that only please the reward. Panels without data are left out.

    Args:
      records: from `read_metrics`.
      title: above it all.
    """
    names = {name for record in records for name in record}
    images = _DRIFTS if names & _DRIFTS.lines.keys() else _ERRORS
    panels: list[Callable[[Axes], None]] = [
        partial(_draw_steps, records=records, panel=panel)
        for panel in (*_PANELS, images, *_reward_panels(records))
        if names & panel.lines.keys()
    ]
    for name in _BINNED:
        profiles = _profiles(records, name)
        if profiles:
            panels.append(partial(_draw_timesteps, profiles=profiles, title=_BINNED[name]))
            break
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(12, 3.4 * rows + 0.4), dpi=100, layout="constrained")
    figure.suptitle(title, fontweight="bold")
    for number, draw in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, 2, number)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
    return figure


def _reward_panels(records: Records) -> list[_Panel]:
    """Returns the panels of a run on the model's own images, rewards in the order of its metrics."""
    names = list(dict.fromkeys(name for record in records for name in record))
    panels = [_Panel("reward of the images of an update", {"reward": ("reward", _PLAIN)}, noisy=True)]
    colours = [_PLAIN, _LOSER, _WINNER, *colormaps["tab10"].colors[4:]]  # type: ignore[attr-defined]
    rates = [(name, found[1]) for name in names if (found := _WIN_RATE.fullmatch(name))]
    if rates:
        lines = {
            name: (reward, colours[number % len(colours)]) for number, (name, reward) in enumerate(rates)
        }
        panels.append(_Panel("held-out win rate over the model at the start", lines, 0.5))
    for name in names:
        if found := _REWARD.fullmatch(name):
            panels.append(_Panel(f"held-out {found[1]}", {name: (found[1], _PLAIN)}))
    for name, title in _OF_IMAGES.items():
        panels.append(_Panel(title, {VALIDATION_PREFIX + name: (name.replace("_", " "), _PLAIN)}))
    return panels


def _draw_steps(axes: Axes, records: Records, panel: _Panel) -> None:
    title, colour = panel.title, "black"
    # The whole run in every panel, also where values at its end are not finite.
    axes.update_datalim([(records[0]["step"], 0), (records[-1]["step"], 0)], updatey=False)
    for name, (label, line_colour) in panel.lines.items():
        steps, values = _series(records, name)
        if not len(steps):
            continue
        lost = int(np.isnan(values).sum())
        if lost:
            title, colour = f"{title}: {label} not finite at {lost} of {len(values)} points", "red"
        if panel.noisy and len(steps) > _SMOOTHED_FROM:
            width = len(steps) // _WINDOWS
            axes.plot(steps, values, color=line_colour, alpha=0.3, linewidth=0.8)
            mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
            label = f"{label}, mean of {width} points"
            axes.plot(steps[width - 1 :], mean, color=line_colour, label=label)
        else:
            axes.plot(steps, values, color=line_colour, marker=".", label=label)
        band_steps, low = _series(records, f"{name}_low")
        if len(band_steps):
            _, high = _series(records, f"{name}_high")
            axes.fill_between(
                band_steps, low, high, color=line_colour, alpha=0.2, linewidth=0, label="95 % interval"
            )
    if panel.level is not None:
        axes.axhline(panel.level, color="dimgray", linestyle="--", linewidth=1)
    axes.set_title(title, color=colour, fontsize=11)
    axes.set_xlabel("step")
    _legend(axes)


def _draw_timesteps(axes: Axes, profiles: Mapping[int, Mapping[int, float]], title: str) -> None:
    steps = list(profiles)
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    for step, colour in zip(shown, colormaps["viridis"](np.linspace(0.85, 0.1, len(shown))), strict=True):
        timesteps = sorted(profiles[step])
        values = [profiles[step][timestep] for timestep in timesteps]
        axes.plot(timesteps, values, color=colour, marker="o", markersize=4, label=f"step {step}")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("timestep (more noise to the right)")
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Puts the legend under the panel, where it covers no curve."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=9)


def _series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps that have a metric, and its values, infinities as NaN."""
    points = [(record["step"], record[name]) for record in records if name in record]
    steps, values = np.asarray(points, float).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def _profiles(records: Records, name: str) -> dict[int, dict[int, float]]:
    """Reads a validation scalar that is given by timestep bin: step -> timestep -> value."""
    profiles: dict[int, dict[int, float]] = {}
    for record in records:
        for key, value in record.items():
            found = re.fullmatch(rf"{VALIDATION_PREFIX}{name}_t(\d+)", key)
            if found:
                profiles.setdefault(record["step"], {})[int(found[1])] = value
    return profiles
