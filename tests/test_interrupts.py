"""Ctrl-C at any moment of a command: one line, its exit status, no traceback."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tables import each_row
from test_packaging import COMMANDS

from dspo_jax.interrupts import EXIT_INTERRUPTED, interruptible, stop_requests

ROOT = Path(__file__).parents[1]

# By its first argument: what main does, or the library around it.
COMMAND = """
import sys, time, weakref
from dspo_jax import cli, interrupts

def sleep():
    print("here", flush=True)
    time.sleep(60)

def wrap():
    try:
        sleep()
    except KeyboardInterrupt as error:
        raise RuntimeError("as a library may word it") from error

def lose():
    class Lost:
        def __del__(self):
            sleep()
    Lost()
    time.sleep(60)

def hang():
    try:
        sleep()
    finally:
        sleep()

def exit():
    import atexit
    atexit.register(print, "the interpreter's own way out")
    sleep()

def claim():
    from pathlib import Path
    from dspo_jax import locks
    with locks.claim(Path(sys.argv[0]).parent):
        hang()

def finish():
    pass

def main(argv):
    globals()[argv[1]]()

if sys.argv[1] == "early":
    interrupts.end_at_once()
    sleep()
cli.run(main, operand="WHAT")
"""


def start(*arguments, **options):
    """In a group of its own, which a terminal's Ctrl-C reaches as a whole."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


def has_begun_to_import(process):
    """NumPy's compiled part is mapped: after this package's own first lines, seconds before the end."""
    try:
        return "_multiarray_umath" in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


# What a command must be given before it imports what takes seconds; OUT is a folder of the test.
GIVEN = {
    "dspo_jax.convert": ["import", "--model=absent", "--out=OUT/new"],
    "dspo_jax.data.inspect": ["OUT"],
    "dspo_jax.data.label": ["--model=absent", "--prompts=a", "--reward=pickscore", "--out=OUT"],
    "dspo_jax.encode": ["--config=configs/encode/folder.py", "--out=OUT"],
    "dspo_jax.evaluate": ["--base=absent", "--prompts=a", "--rewards=pickscore", "--out=OUT"],
    "dspo_jax.list": [],
    "dspo_jax.plan": ["--config=configs/sd15_dspo.py"],
    "dspo_jax.rewards.convert": ["--reward=pickscore", "--weights=absent", "--out=OUT/new"],
    "dspo_jax.sample": ["--model=absent", "--prompts=a", "--out=OUT"],
    "dspo_jax.train": ["--config=configs/sd15_dspo.py", "--workdir=OUT"],
    "dspo_jax.validate": ["--model=absent", "--data=absent"],
    "examples.emoji.demo": [],
}


def interrupt_while_it_imports(module, seconds, out):
    """The exit status, or None where it ended before, and what it said."""
    process = start("-m", module, *(word.replace("OUT", str(out)) for word in GIVEN[module]))
    while not has_begun_to_import(process) and process.poll() is None:
        time.sleep(0.005)
    time.sleep(seconds)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    return process.wait(60), *process.communicate()


@pytest.mark.ci
@each_row(
    ("module", "seconds"), [("dspo_jax.train", 0.0), ("dspo_jax.train", 0.3), ("examples.emoji.demo", 0.1)]
)
def test_a_command_that_imports_ends_with_one_line(module, seconds, tmp_path):
    status, output, errors = interrupt_while_it_imports(module, seconds, tmp_path)
    assert (status, output, errors) == (EXIT_INTERRUPTED, "", "interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_ends_with_one_line_whenever_it_is_interrupted(module, tmp_path):
    delays = random.Random(0)
    interrupted = 0
    for _ in range(6):
        status, output, errors = interrupt_while_it_imports(module, delays.uniform(0, 1.5), tmp_path)
        assert "Traceback" not in errors
        # It was through, or all but: Python takes its handlers back before it is gone.
        through = status in (0, 2) or (status == -signal.SIGINT and errors.startswith("error: "))
        if not through:
            assert (status, errors) == (EXIT_INTERRUPTED, "interrupted\n")
            assert output == "" or module == "dspo_jax.list"
            interrupted += 1
    assert interrupted


@each_row("what", ["early", "sleep", "wrap", "lose", "exit"])
def test_an_interrupt_is_one_line_wherever_it_arrives(what, tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    process = start(tmp_path / "command.py", what)
    assert process.stdout.readline() == "here\n"
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (EXIT_INTERRUPTED, "", "interrupted\n")


@pytest.mark.parametrize("what", ["hang", "claim"])
def test_a_second_interrupt_ends_what_cleans_up_and_leaves_no_lock(what, tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    process = start(tmp_path / "command.py", what)
    for _ in range(2):
        assert process.stdout.readline() == "here\n"
        os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (EXIT_INTERRUPTED, "interrupted\n")
    assert not (tmp_path / ".lock").exists()


def test_an_interrupt_that_is_ignored_stays_so(tmp_path):
    """As a shell starts what runs in the background of a script."""
    (tmp_path / "command.py").write_text(COMMAND.replace("time.sleep(60)", "time.sleep(0.5)"))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = start(tmp_path / "command.py", "sleep")
    signal.signal(signal.SIGINT, handler)
    assert process.stdout.readline() == "here\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_an_error_of_ones_own_passes_through():
    with pytest.raises(ValueError, match="a bug"), interruptible():
        raise ValueError("a bug")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGINT, "stopping after this step; once more to stop without saving\n"),
        (signal.SIGTERM, "stopping after this step\n"),
        (signal.SIGHUP, "stopping after this step\n"),
    ],
)
def test_a_stop_is_announced_while_the_step_runs(number, message, capfd):
    before = []

    def ask_and_listen():
        time.sleep(0.05)
        os.kill(os.getpid(), number)
        said = ""
        while not said and not finished.is_set():
            said = capfd.readouterr().err
            time.sleep(0.005)
        before.append((said, stop_requested()))

    finished = threading.Event()
    with stop_requests() as stop_requested:
        listener = threading.Thread(target=ask_and_listen)
        listener.start()
        # A step: compiled code, in which Python's handlers do not run.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
        finished.set()
        listener.join()
        assert stop_requested()
    assert before == [(message, False)]


def test_a_second_ctrl_c_interrupts():
    with stop_requests() as stop_requested:
        signal.raise_signal(signal.SIGINT)
        assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_a_run_that_ignores_a_signal_goes_on_and_can_be_asked_by_sigterm(ignored):
    handler = signal.signal(ignored, signal.SIG_IGN)
    try:
        with stop_requests() as stop_requested:
            signal.raise_signal(ignored)
            assert not stop_requested()
            signal.raise_signal(signal.SIGTERM)
            assert stop_requested()
            signal.raise_signal(ignored) if ignored == signal.SIGHUP else None
        assert signal.getsignal(ignored) is signal.SIG_IGN
    finally:
        signal.signal(ignored, handler)
