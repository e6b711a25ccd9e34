"""Files and folders appear when they are whole: a disk that fills up leaves what was there, and no litter."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tables import each_row

from dspo_jax import files, json_files, locks
from dspo_jax.hub_cache import hide_folders

ROOT = Path(__file__).parents[1]

WRITE_ON_A_SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from dspo_jax import files

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails with an error instead
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
files.write_json(Path(sys.argv[1]), "x" * 100)
files.write_json(Path(sys.argv[1]), "y" * 5000)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "settings.json"
    result = subprocess.run(
        [sys.executable, "-c", WRITE_ON_A_SMALL_DISK, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert f"NotWritten: {path}: not written: {os.strerror(errno.EFBIG)}" in result.stderr
    assert path.read_text() == f'"{"x" * 100}"\n'
    assert names(tmp_path) == ["settings.json"]


def test_a_text_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_space_is_said_in_plain_words_with_the_files_name(tmp_path):
    path = tmp_path / "a" / "table.csv"

    def write():
        with files.whole(path) as partial:
            partial.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(files.NotWritten, match=f"^{path}: not written: no space left on the disk$"):
        write()
    assert names(tmp_path / "a") == []


def test_what_a_killed_process_left_is_taken_up(tmp_path):
    path = tmp_path / "image.png"
    with files.whole(path) as partial:
        (tmp_path / partial.name).write_text("cut sh")
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["image.png"]


def test_several_processes_may_write_a_shared_file(tmp_path):
    path = tmp_path / "facts.json"
    with files.whole(path, shared=True) as one, files.whole(path, shared=True) as other:
        one.write_text("a" * 10)
        other.write_text("b" * 10)
        assert one != other
    assert path.read_text() == "a" * 10
    assert names(tmp_path) == ["facts.json"]


def test_a_link_goes_on_to_point_to_its_file(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    files.write_text(tmp_path / "link", "content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "content"


def test_a_device_is_written_to_as_it_is(tmp_path):
    files.write_text(Path(os.devnull), "content")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    read = []
    reader.start()
    files.write_text(pipe, "content")
    reader.join(timeout=10)
    assert read == ["content"]
    assert names(tmp_path) == ["pipe"]


@each_row(
    ("content", "message"),
    [
        ("", "empty, as a full disk leaves a file"),
        (" \n", "empty, as a full disk leaves a file"),
        ('{"steps": 2', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_the_remedy(tmp_path, content, message):
    path = tmp_path / "settings.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"^{path}: {message}.*; delete it$"):
        json_files.read_object(path, "delete it")
    files.write_json(path, {"steps": 2})
    assert json_files.read_object(path, "delete it") == {"steps": 2}


@each_row("folder", [True, False])
def test_an_output_appears_when_it_is_whole(tmp_path, folder):
    out, left = tmp_path / "new" / "model", tmp_path / "new" / ".model.partial"
    left.mkdir(parents=True)
    (left / "old").touch()
    with files.appear(out) as partial:
        assert partial == left
        assert not partial.exists()
        if folder:
            partial.mkdir()
        (partial / "weights" if folder else partial).write_text("content")
        assert not out.exists()
    assert (out / "weights" if folder else out).read_text() == "content"
    assert names(out.parent) == ["model"]
    with pytest.raises(ValueError, match=f"^--out={out}: exists already"), files.appear(out):
        pass


def test_an_output_that_fails_leaves_nothing(tmp_path):
    def write():
        with files.appear(tmp_path / "new" / "model") as partial:
            partial.mkdir()
            (partial / "weights").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert names(tmp_path) == []


def test_two_do_not_write_one_output(tmp_path, monkeypatch):
    out = tmp_path / "model"
    with files.appear(out) as partial:
        partial.write_text("first")
        monkeypatch.setattr(locks, "_held", {})  # as in another process
        with pytest.raises(ValueError, match=f"{out}: in use by process {os.getpid()}"), files.appear(out):
            pass
        assert partial.read_text() == "first"
    assert out.read_text() == "first"


def test_what_leaves_this_machine_has_no_absolute_path_in_it():
    cached = "/cache/hub/models--org--name/snapshots/12ab"
    config = {
        "model": "/home/me/models/fine",
        "data": {"path": "/home/me/a, /home/me/b,c/d", "weights": [1, 2.5]},
        "samples": {"prompts": ["/imagine a/b"]},
        "bases": (cached, "org/name", "runs/mine", None, "a prompt, with a comma", True),
    }
    assert hide_folders(config) == {
        "model": "fine",
        "data": {"path": "a,b,c/d", "weights": [1, 2.5]},
        "samples": {"prompts": ["/imagine a/b"]},
        "bases": ["org/name", "org/name", "runs/mine", None, "a prompt, with a comma", True],
    }
