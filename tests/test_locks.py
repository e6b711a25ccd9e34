"""One command at a time on an output; a lock ends with its process, and is no litter."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
from tables import each_row

from dspo_jax import locks
from dspo_jax.errors import UserError

ROOT = Path(__file__).parents[1]

HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from dspo_jax import locks

share = tuple(map(int, sys.argv[2].split("/"))) if sys.argv[2] else None
with locks.claim(Path(sys.argv[1]), share):
    left_behind = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
    worker = os.fork()
    if worker == 0:
        os.close(1)
        time.sleep(600)
        os._exit(0)
    print(left_behind.pid, worker, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Starts a process that claims a folder and has two children; returns it, and ends all of them."""
    started, children = [], []

    def start(folder, share=""):
        command = [sys.executable, "-c", HOLD, str(folder), share]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        children.extend(map(int, process.stdout.readline().split()))
        return process

    yield start
    for child in children:
        os.kill(child, signal.SIGKILL)
    for process in started:
        process.kill()
        process.communicate()


def test_another_process_is_refused_and_told_who_has_the_folder(tmp_path, hold):
    folder = tmp_path / "out"
    process = hold(folder)
    message = (
        rf"{folder}: in use by process {process.pid} \(.*\) on \S+ since 2\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
        r"\S+; let it end, or end it, or choose another name"
    )
    with pytest.raises(ValueError, match=message), locks.claim(folder):
        pass
    with locks.claim(tmp_path / "another"):
        pass
    process.communicate()  # it ends by itself
    with locks.claim(folder):
        assert locks.is_empty(folder)


def test_after_sigkill_the_same_command_goes_on_at_once_though_children_live(tmp_path, hold):
    process = hold(tmp_path)
    process.kill()
    process.wait()
    assert (tmp_path / ".lock").exists()  # which no one holds
    with locks.claim(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_shares_of_one_work_go_together_and_with_nothing_else(tmp_path, hold):
    process = hold(tmp_path, "0/4")
    with locks.claim(tmp_path, (1, 4)):
        pass
    for share in ((0, 4), (1, 3), None):
        with in_use_by(process), locks.claim(tmp_path, share):
            pass
    process.communicate()
    process = hold(tmp_path)
    with in_use_by(process), locks.claim(tmp_path, (0, 4)):
        pass


def in_use_by(process):
    return pytest.raises(ValueError, match=f"in use by process {process.pid}")


def test_a_killed_share_is_in_nobodys_way(tmp_path, hold):
    process = hold(tmp_path, "0/4")
    process.kill()
    process.wait()
    with locks.claim(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())


def test_a_process_may_claim_twice_and_keeps_the_folder_until_the_first_claim_ends(tmp_path):
    with locks.claim(tmp_path):
        with locks.claim(tmp_path / "." / "x" / ".."):
            pass
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_refused_command_leaves_no_folder(tmp_path):
    def refuse():
        with locks.claim(tmp_path / "runs" / "mine"):
            assert (tmp_path / "runs" / "mine").is_dir()
            raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        refuse()
    assert not list(tmp_path.iterdir())
    with locks.claim(tmp_path / "runs" / "mine"):
        (tmp_path / "runs" / "mine" / "result").touch()
    assert [file.name for file in (tmp_path / "runs" / "mine").iterdir()] == ["result"]


def test_a_file_is_reserved_beside_it(tmp_path):
    with locks.reserve(tmp_path / "new" / "model"):
        assert [file.name for file in (tmp_path / "new").iterdir()] == [".model.lock"]
        other = filelock.FileLock(tmp_path / "new" / ".model.lock")
        with pytest.raises(filelock.Timeout):
            other.acquire(blocking=False)
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with (
        pytest.raises(NotADirectoryError, match="out: exists and is not a folder"),
        locks.claim(tmp_path / "out"),
    ):
        pass


@each_row("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_worked_on(tmp_path, monkeypatch, caplog, number):
    failing_flock(monkeypatch, number)
    with locks.claim(tmp_path):
        pass
    [record] = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: on a file system without locks ({os.strerror(number)}): start no other command on it "
        "while this one runs"
    )


def test_a_lock_that_cannot_be_had_for_other_reasons_is_an_error(tmp_path, monkeypatch):
    failing_flock(monkeypatch, errno.EIO)
    message = f"{tmp_path}/.lock: cannot be locked: {os.strerror(errno.EIO)}"
    with pytest.raises(OSError, match=message), locks.claim(tmp_path):
        pass
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a read-only folder: the first write says so
    with locks.claim(tmp_path):
        pass


def failing_flock(monkeypatch, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)


def test_an_output_without_a_name_is_refused():
    for path in (Path("/"), Path("")):
        with pytest.raises(UserError, match="is no name for a new file or folder"), locks.reserve(path):
            pass
