"""`python -m dspo_jax.train` as two processes over loopback: the same run, stopped and killed anywhere."""

import random
import shutil
import signal

import numpy as np
import pytest
from processes import finish, last_step, log_of, start_training, wait_until
from tiny_run import make_config, read_reproducible, saved_steps

from dspo_jax.cli import EXIT_STOPPED
from dspo_jax.training.run import train

pytestmark = pytest.mark.ci


SETTINGS = {
    "objective.reward_scale": 10.0,
    "objective.score_weight": 1.0,
    "optimizer.eps": 1e-4,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 0,
    "batch_size": 8,
    "log_every": 1,
    "validation.every": 10,
    "validation.draws": 2,
    "validation.batch_size": 8,
    "samples.every": 0,
    "ema_decay": 0.9,
}


@pytest.fixture(scope="module")
def settings(shallow_model, tiny_pairs):
    return SETTINGS | {"model": str(shallow_model), "data.path": str(tiny_pairs)}


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    """A run of 60 steps by two processes of two devices each."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    started = start_training(workdir, settings | SPLIT, processes=2, devices=2)
    assert finish(started) == [0, 0], log_of(workdir, 0).read_text()
    return workdir


SPLIT = {"steps": 60, "checkpoint.every": 7, "mesh.data": 2, "mesh.fsdp": 2}


def assert_same_to_rounding(workdir, expected):
    ours, theirs = read_reproducible(workdir), read_reproducible(expected)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for name, rtol in (("loss", 1e-5), ("validation/winner_error", 1e-5)):
        values = [[record[name] for record in records if name in record] for records in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=rtol)
        assert len(values[0]) > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "accumulation": 2},
        {"lora.rank": 4, "mesh.dcn.data": 2, "mesh.fsdp": 4},
        # The devices of both processes hold each layer together, and both read the whole batch.
        {"mesh.data": 1, "mesh.tensor": 8},
        # Each reads its part of the stored errors.
        {
            **{"reference.draws": 3, "mesh.fsdp": 2, "objective.name": "diffusion_dpo"},
            **{"objective.reward_scale": None, "objective.score_weight": None, "objective.beta": 2.0},
        },
    ],
    ids=lambda changes: " ".join(changes),
)
def test_two_processes_of_four_devices_make_the_run_of_one(settings, tmp_path, changes):
    steps = {"steps": 20, "checkpoint.every": 20}
    started = start_training(tmp_path / "two", settings | steps | changes, processes=2, devices=4)
    assert finish(started) == [0, 0], log_of(tmp_path / "two", 0).read_text()
    kept = {key: value for key, value in changes.items() if not key.startswith("mesh.")}
    elsewhere = {"mesh.data": 4, "mesh.tensor": 2}
    train(
        make_config(settings["model"], settings["data.path"], settings | steps | kept | elsewhere),
        tmp_path / "one",
    )
    assert_same_to_rounding(tmp_path / "two", tmp_path / "one")
    assert log_of(tmp_path / "two", 1).read_text().count("learning rate") == 0  # one process speaks


def kill_and_resume(settings, workdir, at, number, victims=(0, 1), timeout=300):
    """Starts or resumes a run and sends its processes a signal at a step; returns their exit statuses."""
    started = start_training(
        workdir, settings | SPLIT, processes=2, devices=2, more=["--heartbeat_timeout=10"]
    )
    wait_until(started, lambda: last_step(workdir) >= at)
    for victim in victims:
        started[victim].send_signal(number)
    return finish(started, timeout)


@pytest.fixture(scope="module")
def stopped(settings, tmp_path_factory):
    """A run of which one process was asked to stop."""
    workdir = tmp_path_factory.mktemp("runs") / "stopped"
    assert kill_and_resume(settings, workdir, 5, signal.SIGTERM, victims=(1,)) == [EXIT_STOPPED] * 2
    return workdir


@pytest.mark.slow
def test_one_process_is_asked_to_stop_and_one_goes_on_for_both(settings, undisturbed, stopped, tmp_path):
    """Both have saved the same step; and one process with eight devices is as good as two with two."""
    step = last_step(stopped)
    assert 5 <= step < 60
    assert saved_steps(stopped)[-1] == step
    workdir = shutil.copytree(stopped, tmp_path / "one")
    config = make_config(settings["model"], settings["data.path"], settings | SPLIT | {"mesh.data": 4})
    assert train(config, workdir).step == 60
    assert_same_to_rounding(workdir, undisturbed)


@pytest.mark.slow
def test_stopped_killed_and_bereaved_two_processes_give_the_same_metrics_bit_for_bit(
    settings, undisturbed, stopped, tmp_path
):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    # One dies, and the other ends by itself within the heartbeat's timeout, and says that it failed.
    at = last_step(workdir) + 9
    statuses = kill_and_resume(settings, workdir, at, signal.SIGKILL, victims=(1,), timeout=60)
    assert statuses[0] not in (0, -signal.SIGKILL)
    assert statuses[1] == -signal.SIGKILL
    log = log_of(workdir, 0).read_text()
    assert "error: another process of this run was lost, or" in log or "another task died" in log
    assert last_step(workdir) < 60

    started = start_training(workdir, settings | SPLIT, processes=2, devices=2)
    assert finish(started) == [0, 0], log_of(workdir, 0).read_text()
    assert read_reproducible(workdir) == read_reproducible(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"lora.rank": 4}], ids=["full", "lora"])
def test_killed_at_five_random_steps_two_processes_give_the_same_metrics(settings, tmp_path, kind):
    settings, workdir, undisturbed = settings | kind, tmp_path / "run", tmp_path / "undisturbed"
    started = start_training(undisturbed, settings | SPLIT, processes=2, devices=2)
    assert finish(started) == [0, 0], log_of(undisturbed, 0).read_text()
    steps = sorted(random.sample(range(1, 58), 5))
    print("killed at steps", steps)
    for step in steps:
        assert kill_and_resume(settings, workdir, step, signal.SIGKILL) == [-9, -9]
    started = start_training(workdir, settings | SPLIT, processes=2, devices=2)
    assert finish(started) == [0, 0], log_of(workdir, 0).read_text()
    assert read_reproducible(workdir) == read_reproducible(undisturbed)


@pytest.mark.slow
def test_when_the_first_process_dies_the_other_stops(settings, tmp_path):
    statuses = kill_and_resume(settings, tmp_path / "run", 8, signal.SIGKILL, victims=(0,), timeout=60)
    assert statuses[0] == -signal.SIGKILL
    assert statuses[1] not in (0, -signal.SIGKILL)


def test_processes_that_do_not_find_one_another_say_so(settings, tmp_path):
    started = start_training(tmp_path / "run", settings, processes=1, devices=1, more=["--num_processes=2"])
    assert finish(started) == [2]
    assert (
        "error: --coordinator_address is not set: several processes need"
        in log_of(tmp_path / "run", 0).read_text()
    )
