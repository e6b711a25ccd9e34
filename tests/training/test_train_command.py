"""`python -m dspo_jax.train` as a user runs it: stopped, interrupted, killed, and started again."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import last_step
from tiny_run import read_reproducible, saved_steps

from dspo_jax.cli import EXIT_STOPPED
from dspo_jax.monitoring.metrics import read_metrics

pytestmark = pytest.mark.ci


ROOT = Path(__file__).parents[2]
STEPS = 100


@pytest.fixture(scope="module")
def command(shallow_model, tiny_pairs):
    """Starts the command, on one device, with TensorFlow and torch not to be had."""
    changes = {
        "model": shallow_model,
        "data.path": tiny_pairs,
        "steps": STEPS,
        "batch_size": 4,
        "log_every": 1,
        "objective.reward_scale": 10.0,
        "objective.score_weight": 1.0,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 0,
        "checkpoint.every": 10,
        "validation.every": 40,
        "validation.draws": 2,
        "validation.batch_size": 6,
    }
    module = ["-m", "blocked_imports", "dspo_jax.train"]
    flags = ["--config=configs/common.py", *(f"--config.{key}={value}" for key, value in changes.items())]

    def start(workdir, *more, before=(), **how):
        return subprocess.Popen(
            [*before, sys.executable, *module, *flags, f"--workdir={workdir}", *more],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT / "tests" / "support")},
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
        )

    return start


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    process = command(workdir)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert errors.count(", held-out implicit accuracy ") == 4  # steps 0, 40, 80, 100
    return workdir, output


def stop_when(process, reached, number):
    """Sends a signal as soon as `reached()`; returns the exit status."""
    while not reached():
        if process.poll() is not None:
            pytest.fail(f"ended before it could be stopped: {process.communicate()[1]}")
        time.sleep(0.002)
    process.send_signal(number)
    output, errors = process.communicate()
    if process.returncode == EXIT_STOPPED:
        assert output.splitlines()[-1].startswith("stopped: after step ")
        assert "\nstopping after this step" in errors
    return process.returncode


def test_stopped_interrupted_and_killed_the_command_gives_the_same_metrics(command, undisturbed, tmp_path):
    workdir = tmp_path / "run"

    assert stop_when(command(workdir), lambda: last_step(workdir) >= 8, signal.SIGTERM) == EXIT_STOPPED
    stopped = last_step(workdir)
    assert 8 <= stopped < STEPS
    assert saved_steps(workdir)[-1] == stopped

    assert (
        stop_when(command(workdir), lambda: last_step(workdir) >= stopped + 8, signal.SIGINT) == EXIT_STOPPED
    )
    interrupted = last_step(workdir)
    assert stopped + 8 <= interrupted < STEPS
    assert saved_steps(workdir)[-1] == interrupted

    def beyond_a_checkpoint():
        return interrupted < saved_steps(workdir)[-1] < last_step(workdir)

    assert stop_when(command(workdir), beyond_a_checkpoint, signal.SIGKILL) == -signal.SIGKILL
    assert last_step(workdir) < STEPS

    process = command(workdir)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    said = output.replace(str(workdir), str(undisturbed[0]))
    assert said.splitlines()[1:] == undisturbed[1].splitlines()[1:]  # before and after, of the whole run
    records = read_reproducible(workdir)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if "validation/margin" in record] == [0, 40, 80, STEPS]
    assert records == read_reproducible(undisturbed[0])


# Makes the terminal of its output that of this process and what it becomes: closed, it sends them SIGHUP.
TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_terminal_that_closes_ends_the_run_saved(command, tmp_path):
    workdir, (terminal, end) = tmp_path / "run", os.openpty()
    before = (sys.executable, "-c", TAKE_TERMINAL)
    process = command(workdir, before=before, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    reader = threading.Thread(target=_read_all, args=(terminal,), daemon=True)
    reader.start()
    while last_step(workdir) < 8:
        assert process.poll() is None
        time.sleep(0.01)
    os.close(terminal)
    assert process.wait(timeout=120) == EXIT_STOPPED
    assert saved_steps(workdir)[-1] == last_step(workdir) < STEPS


def _read_all(terminal):
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass


def test_the_command_reports_the_held_out_accuracy_before_and_after(undisturbed):
    workdir, output = undisturbed
    lines = output.splitlines()
    assert lines[0] == f"{workdir}: step {STEPS}"
    # Wilson's interval for three of the six pairs: at step 0 every one of them is a tie.
    assert lines[1] == "held-out implicit accuracy before: 0.500 [0.188, 0.812] of 6 pairs"
    assert lines[2].startswith("held-out implicit accuracy after: 0.")
    assert lines[-1].startswith(f"  or: python -m dspo_jax.convert export --run={workdir} ")
    first = read_metrics(workdir / "metrics.jsonl")[0]
    assert (first["step"], first["validation/margin"], first["validation/implicit_accuracy"]) == (0, 0, 0.5)
    assert first["validation/winner_drift"] == 0


def test_the_command_refuses_an_unknown_key_with_the_nearest_one(command, tmp_path):
    process = command(tmp_path / "run", "--config.bach_size=4")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.startswith(
        "error: --config.bach_size: unknown key 'bach_size'; did you mean --config.batch_size? (config has: "
    )
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()
