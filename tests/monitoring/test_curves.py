"""The picture of a run: which panels it has, what is in them, and that it is a picture."""

import math

import numpy as np
import pytest
from PIL import Image
from tables import each_row

from dspo_jax.monitoring.curves import draw_curves, make_figure
from dspo_jax.monitoring.metrics import VALIDATION_PREFIX, MetricsWriter

BINS = (166, 500, 833)


def training(steps):
    return [{"step": step, "loss": 1 / step, "grad_norm": 2.0, "pairs_per_second": 3.0} for step in steps]


def validation(step, *, reference=True, images=("winner", "loser")):
    scores = {f"{image}_error": 0.1 for image in images}
    scores |= {
        f"{image}_{'drift' if reference else 'error'}_t{t}": t * step for image in images for t in BINS
    }
    if reference:
        scores |= {f"{image}_drift": -0.01 * step for image in images}
    if reference and len(images) == 2:
        scores |= {"margin": 0.1 * step, **{f"margin_t{t}": t * step for t in BINS}}
        scores |= {"implicit_accuracy": 0.6, "implicit_accuracy_low": 0.5, "implicit_accuracy_high": 0.7}
    return {"step": step, **{VALIDATION_PREFIX + name: value for name, value in scores.items()}}


def panels(figure):
    """Title -> label -> (x, y) of the curves that a legend names."""
    return {
        axes.get_title(): {
            line.get_label(): tuple(np.asarray(line.get_data(), float).tolist())
            for line in axes.lines
            if not line.get_label().startswith("_")
        }
        for axes in figure.axes
    }


def test_the_panels_of_a_run_with_a_reference():
    records = [validation(0), *training([1, 2]), validation(2), *training([3]), validation(4), validation(6)]
    figure = make_figure(records, "run")
    assert panels(figure) == {
        "training loss": {"loss": ([1, 2, 3], [1, 1 / 2, 1 / 3])},
        "gradient norm, before clipping": {"gradient norm": ([1, 2, 3], [2, 2, 2])},
        "held-out implicit accuracy": {"implicit accuracy": ([0, 2, 4, 6], [0.6] * 4)},
        "held-out margin: reward of the winner minus the loser's": {
            "margin": ([0, 2, 4, 6], pytest.approx([0, 0.2, 0.4, 0.6]))
        },
        "held-out drift: error of the policy minus the reference's": {
            "winners": ([0, 2, 4, 6], pytest.approx([0, -0.02, -0.04, -0.06])),
            "losers": ([0, 2, 4, 6], pytest.approx([0, -0.02, -0.04, -0.06])),
        },
        "held-out margin by timestep": {
            f"step {step}": (list(BINS), [step * t for t in BINS]) for step in (0, 4, 6)
        },
    }
    accuracy = figure.axes[2]
    (band,) = accuracy.collections
    assert {y for _, y in band.get_paths()[0].vertices} == {0.5, 0.7}
    assert [line.get_ydata()[0] for line in accuracy.lines if line.get_linestyle() == "--"] == [0.5]


def test_the_panels_of_a_run_without_a_reference():
    records = [validation(0, reference=False), *training([1, 2]), validation(2, reference=False)]
    figure = panels(make_figure(records, "run"))
    assert list(figure) == [
        "training loss",
        "gradient norm, before clipping",
        "held-out denoising error",
        "held-out denoising error of winners by timestep",
    ]
    assert set(figure["held-out denoising error"]) == {"winners", "losers"}


def test_single_images_have_no_losers():
    figure = panels(make_figure([validation(step, images=("winner",)) for step in (0, 2)], "run"))
    assert {title: set(lines) for title, lines in figure.items()} == {
        "held-out drift: error of the policy minus the reference's": {"winners"},
        "held-out drift of winners by timestep": {"step 0", "step 2"},
    }


def test_what_is_not_finite_is_counted_and_leaves_a_gap():
    records = training(range(1, 7))
    records[2]["loss"], records[5]["loss"] = math.inf, math.nan
    figure = make_figure(records, "run")
    (lines,) = [
        lines
        for title, lines in panels(figure).items()
        if title == "training loss: loss not finite at 2 of 6 points"
    ]
    np.testing.assert_array_equal(lines["loss"][1], [1, 1 / 2, math.nan, 1 / 4, 1 / 5, math.nan])
    figure.canvas.draw()
    assert figure.axes[0].get_xlim()[1] > 6


def test_a_long_noisy_curve_is_drawn_with_its_mean():
    records = training(range(1, 401))
    for record in records:
        record["loss"] = record["step"] % 2
    (label,) = panels(make_figure(records, "run"))["training loss"]
    assert label == "loss, mean of 40 points"
    steps, mean = panels(make_figure(records, "run"))["training loss"][label]
    assert (steps[0], steps[-1]) == (40, 400)
    np.testing.assert_allclose(mean, 0.5)


@each_row(
    "records",
    [
        training([1]),
        [validation(0)],
        [validation(0, reference=False)],
        [{"step": 1, "loss": math.nan}],
        [validation(0), *training(range(1, 301)), validation(300)],
    ],
)
def test_the_picture_is_written(tmp_path, records):
    with MetricsWriter(tmp_path / "run") as writer:
        for record in records:
            writer.write(record["step"], {name: record[name] for name in record if name != "step"})
    png = tmp_path / "curves.png"
    draw_curves(tmp_path / "run" / "metrics.jsonl", png)
    with Image.open(png) as image:
        image.load()
        assert (image.format, image.width) == ("PNG", 1200)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "run"]


def test_without_metrics_there_is_no_picture(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "wall_seconds": 2.0, "pairs_per_second": 3.0}\n')
    with pytest.raises(ValueError, match="no metrics to draw yet") as caught:
        draw_curves(path, tmp_path / "curves.png")
    assert str(caught.value) == f"{path}: no metrics to draw yet"
    with pytest.raises(FileNotFoundError):
        draw_curves(tmp_path / "absent.jsonl", tmp_path / "curves.png")
