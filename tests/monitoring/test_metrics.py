"""Metrics on disk and at W&B, the progress line and the interval."""

import io
import math
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from fake_time import FakeTime
from PIL import Image
from rich.console import Console
from tables import each_row

from dspo_jax.monitoring.curves import draw_curves
from dspo_jax.monitoring.metrics import MetricsWriter, read_metrics, read_validations
from dspo_jax.monitoring.progress import Progress
from dspo_jax.training.validation_scalars import binomial_interval


def test_one_line_a_step_with_exact_floats(tmp_path):
    loss = np.float32(math.log(2))
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.asarray(loss), "accuracy": np.float64(0.5), "count": 3})
        writer.write(2, {"loss": float("nan")})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert {key: first[key] for key in ("step", "loss", "accuracy", "count")} == {
        "step": 1,
        "loss": float(loss),
        "accuracy": 0.5,
        "count": 3.0,
    }
    assert isinstance(first["count"], float)
    assert 0 <= first["wall_seconds"] <= second["wall_seconds"]
    assert math.isnan(second["loss"])
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_line_is_on_disk_before_close(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1.0]
    writer.close()


def test_validations_are_found_among_the_other_lines(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"validation/margin": 0.0, "validation/winner_error": 2.0})
        writer.write(5, {"loss": 1.0})
        writer.write(5, {"validation/margin": 0.5})
    assert read_validations(tmp_path / "metrics.jsonl") == {
        0: {"margin": 0.0, "winner_error": 2.0},
        5: {"margin": 0.5},
    }


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as writer:
        for step in range(6):  # step 0 holds the validation before training
            writer.write(step, {"loss": float(step)})
    before = read_metrics(path)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    with MetricsWriter(tmp_path, step=3) as writer:
        writer.write(4, {"loss": 40.0})
    records = read_metrics(path)
    assert records[:4] == before[:4]
    assert [(record["step"], record["loss"]) for record in records[4:]] == [(4, 40.0)]
    assert records[4]["wall_seconds"] >= before[3]["wall_seconds"]


def test_a_fresh_start_keeps_nothing(tmp_path):
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            writer.write(0, {"loss": 1.0})
            writer.write(1, {"loss": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(path)


GOOD = b'{"step": 1, "wall_seconds": 0.5, "loss": NaN, "margin": -Infinity}\n'


@each_row(
    ("line", "message"),
    [
        (b"7", "line 2: 7: must be an object with step, a whole number"),
        (b"null", "line 2: null: must be an object with step"),
        (b'["step", 1]', "line 2: .*: must be an object with step"),
        (b"NaN", "line 2: NaN: must be an object with step"),
        (b"{}", "line 2: {}: must be an object with step"),
        (b'{"step": "1"}', "line 2: .*: must be an object with step"),
        (b'{"step": 1.5}', "line 2: .*: must be an object with step"),
        (b'{"step": true}', "line 2: .*: must be an object with step"),
        (b'{"step": 1, "loss": "1.0"}', "line 2: loss = 1.0: must be a number"),
        (b'{"step": 1, "loss": null}', "line 2: loss = None: must be a number"),
        (b'{"step": 1, "loss": [1.0]}', r"line 2: loss = \[1.0\]: must be a number"),
        (b'{"step": 1, "loss": 1' + b"0" * 400 + b"}", "line 2: loss = 1000.*: must be a number"),
        (b'{"step": 1, "loss": 1' + b"0" * 5000 + b"}", r"line 2: not JSON"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b'{"step": 1, "\xff": 1}', "line 2: not JSON"),
        (b"\0" * 20, "line 2: not JSON"),
    ],
)
@each_row("read", [read_metrics, read_validations, lambda path: draw_curves(path, "no.png")])
def test_a_line_that_is_no_object_of_numbers_is_refused_by_every_reader(tmp_path, line, message, read):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, {message}") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@each_row("end", [b'{"step": 2, "lo', b"\0" * 20, b'{"step": 2, "caf\xc3', b"", b"{"])
def test_a_last_line_that_was_cut_short_is_left_out(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + end)
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"])
    assert record["margin"] == -math.inf
    draw_curves(path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()
    with MetricsWriter(tmp_path, step=1) as writer:
        writer.write(2, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_a_run_is_not_resumed_from_a_line_without_its_age(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: the line of step 1 has no wall_seconds"):
        MetricsWriter(tmp_path, step=1)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_tensorboard_holds_the_same_finite_numbers_the_config_and_pictures(tmp_path, caplog):
    from tensorboardX.proto.event_pb2 import Event

    Image.new("RGB", (3, 2), "red").save(tmp_path / "grid.png")
    with MetricsWriter(tmp_path, config={"optimizer": {"name": "adamw"}}) as writer:
        writer.write(7, {"loss": 0.25, "validation/margin": 0.5, "grad_norm": math.inf, "score": math.nan})
        writer.write_image(7, "samples", tmp_path / "grid.png")
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # TFRecord: length (8 bytes), its CRC (4), payload, its CRC (4)
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    text, *points, picture = [(event.step, value) for event in events for value in event.summary.value]
    assert text[1].tensor.string_val == [b"|key|value|\n|---|---|\n|optimizer.name|adamw|"]
    assert [(step, value.tag, value.simple_value) for step, value in points] == [
        (7, "train/loss", 0.25),
        (7, "validation/margin", 0.5),
    ]
    assert (picture[0], picture[1].tag, picture[1].image.width) == (7, "samples", 3)
    assert not caplog.records


def test_an_inactive_writer_leaves_the_files_alone(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with MetricsWriter(tmp_path, active=False, wandb_project="aligned") as writer:
        writer.write(1, {"loss": 2.0})
    with MetricsWriter(tmp_path / "other", active=False) as writer:
        writer.write(1, {"loss": 2.0})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "other").exists()


class FakeWandb(types.ModuleType):
    """Takes the place of the package wandb and notes what is done with it."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        return types.SimpleNamespace(
            id=arguments["id"] or "new-id",
            log=lambda values, step: self.calls.append(("log", values, step)),
            finish=lambda: self.calls.append(("finish",)),
        )


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    known = {"project": "aligned", "config": {"seed": 3}, "resume": "allow", "dir": str(tmp_path)}
    for step in (1, 2):
        with MetricsWriter(tmp_path, step - 1, wandb_project="aligned", config={"seed": 3}) as writer:
            writer.write(step, {"loss": np.float32(0.5)})
    assert fake.calls == [
        ("init", {**known, "id": None}),
        ("log", {"train/loss": 0.5}, 1),
        ("finish",),
        ("init", {**known, "id": "new-id"}),
        ("log", {"train/loss": 0.5}, 2),
        ("finish",),
    ]
    assert (tmp_path / "wandb_run_id").read_text() == "new-id\n"


def test_wandb_is_neither_loaded_nor_needed_without_a_project(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    MetricsWriter(tmp_path / "without").close()
    with pytest.raises(ValueError, match="wandb") as caught:
        MetricsWriter(tmp_path / "with", wandb_project="aligned")
    assert str(caught.value) == (
        "config.wandb_project = 'aligned': needs the package wandb: pip install 'dspo_jax[wandb]'"
    )


def test_writing_metrics_does_not_load_torch(tmp_path):
    code = (
        "import sys; from dspo_jax.monitoring.metrics import MetricsWriter;"
        "MetricsWriter(sys.argv[1]).close(); print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_progress_prints_plain_lines_without_a_terminal():
    time, output = FakeTime(), io.StringIO()
    with Progress(
        "train", total=100, done=40, every_seconds=10, console=Console(file=output), now=time
    ) as progress:
        for done in range(41, 101):
            time.seconds += 1
            progress.update(done, {"pairs/s": 12.3456, "loss": 0.693147})
        progress.update(100)  # the end is said once
    lines = output.getvalue().splitlines()
    assert lines[0] == "train 41/100 (41%)  eta -:--:--  pairs/s 12.35  loss 0.6931"
    assert lines[1] == "train 51/100 (51%)  eta 0:00:49  pairs/s 12.35  loss 0.6931"
    assert [line.split()[1] for line in lines] == [
        "41/100",
        "51/100",
        "61/100",
        "71/100",
        "81/100",
        "91/100",
        "100/100",
    ]
    assert lines[-1].split()[4] == "0:00:00"


def test_the_eta_leaves_out_what_was_compiled_and_counts_what_comes_again():
    time, output = FakeTime(), io.StringIO()
    with Progress("train", 10, every_seconds=0, console=Console(file=output), now=time) as progress:
        with progress.busy("compiling the step", once=True):
            time.seconds += 600
        progress.update(1)
        time.seconds += 2
        progress.update(2)
        with progress.busy("validating"):
            time.seconds += 60
        time.seconds += 2
        progress.update(3, {"loss": 0.5})
        with progress.busy("compiling the step", once=True):  # of another image size
            time.seconds += 600
        progress.update(4)
    assert output.getvalue().splitlines() == [
        "train 0/10 (0%)  compiling the step",
        "train 1/10 (10%)  eta -:--:--",
        "train 2/10 (20%)  eta 0:00:16",
        "train 2/10 (20%)  validating",
        "train 3/10 (30%)  eta 0:03:44  loss 0.5",  # 64 s for two steps
        "train 3/10 (30%)  compiling the step",
        "train 4/10 (40%)  eta 0:02:08",
    ]


@each_row("terminal", [False, True])
def test_what_the_first_step_waits_for_is_said_until_it_is_done(terminal):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120)
    with Progress("validate", 9, every_seconds=0, console=console, first="compiling") as progress:
        progress.update(0)
        before = output.tell()
        progress.update(4)
        progress.update(9)
    said = output.getvalue()
    assert "compiling" in said[:before]
    assert "compiling" not in said[before:]
    assert "9/9" in said[before:]


@each_row("terminal", [False, True])
def test_inactive_progress_shows_nothing(terminal):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal)
    with Progress("train", total=10, console=console, active=False) as progress:
        progress.update(10, {"loss": 0.5})
    assert output.getvalue() == ""


def test_progress_draws_a_bar_on_a_terminal():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with Progress("train", total=10, console=console) as progress:
        with progress.busy("validating"):
            pass
        progress.update(10, {"loss": 0.5})
    text = output.getvalue()
    assert "train: validating" in text
    assert "10/10" in text
    assert "loss 0.5" in text


@each_row(
    ("successes", "n", "expected"),
    [
        # for 0 of n the interval is [0, z^2 / (n + z^2)]
        (0, 10, (0.0, 0.2775328)),
        (5, 10, (0.2365931, 0.7634069)),
        (10, 10, (0.7224672, 1.0)),
        (0, 0, (0.0, 1.0)),
    ],
)
def test_wilson_interval(successes, n, expected):
    np.testing.assert_allclose(binomial_interval(successes, n), expected, atol=1e-6)


def test_wilson_interval_solves_its_equation():
    n, successes = 37, 20.5
    for p in binomial_interval(successes, n):
        np.testing.assert_allclose(
            (successes / n - p) ** 2, 1.959963984540054**2 * p * (1 - p) / n, rtol=1e-9
        )


@each_row(("successes", "n"), [(-1, 3), (4, 3)])
def test_wilson_interval_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match=rf"successes = {successes}: must lie between 0 and n = {n}"):
        binomial_interval(successes, n)
