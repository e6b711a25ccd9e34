"""How commands fail: a toy command, run as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tables import each_row

COMMAND = """
import logging
logging.basicConfig()  # as orbax does when it is imported
from absl import flags
from dspo_jax import cli

cli.define_config("A recipe.")
flags.DEFINE_enum("only", None, ["a", "b"], "One.")
flags.DEFINE_list("listed", None, "Several.")
flags.DEFINE_multi_string("many", None, "Several, too.")


def main(argv):
    config = flags.FLAGS.config
    print(config.objective.name, config.batch_size, config.flip)
    if config.batch_size == 6:
        from pathlib import Path
        from dspo_jax import files
        files.refuse_existing(Path("toy.py"))
    if config.batch_size == 7:
        from dspo_jax.errors import UserError
        raise UserError("seven is refused,\\n  wherever it was")
    if config.batch_size == 8:
        open("absent/file")
    if config.batch_size == 9:
        raise RuntimeError("a bug")
    if config.batch_size == 10:
        raise KeyboardInterrupt
    if config.batch_size == 11:
        import jax
        jax.jit(lambda: jax.numpy.zeros(2**50)).lower().compile()()
    if config.batch_size == 12:
        from rich.console import Console
        Console().print("a table")
        Console(stderr=True).print("a bar")
        print("more" * 10000, flush=True)
        open("finished", "w").close()
    if config.batch_size == 14:
        int("fourteen")
    if config.batch_size == 13:
        from absl import logging as absl_logging
        absl_logging.info("said once")
    if config.batch_size == 15:
        raise OSError("of a library's own wording")


cli.run(main)
"""

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({"objective": {"name": "dspo", "beta": 5000.0}, "batch_size": 4, "flip": True})
"""

ABSENT = "--config=absent.py: no such file (python -m dspo_jax list: all recipes)"

OWN_RECIPE = """
from configs import emoji_dspo


def get_config(name):
    config = emoji_dspo.get_config()
    config.objective.name, config.flip = name, True
    return config
"""


OPTIONAL = """
from ml_collections import ConfigDict, config_dict


def get_config():
    config = ConfigDict({"objective": {"name": "dspo"}, "batch_size": 4, "flip": True})
    config.objective.lam = config_dict.placeholder(float)
    config.objective.lam = 0.5
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    (folder / "command.py").write_text(COMMAND)
    (folder / "toy.py").write_text(CONFIG)
    (folder / "optional.py").write_text(OPTIONAL)
    (folder / "raises.py").write_text('def get_config():\n    raise ValueError("config.a = 3: too large")\n')
    (folder / "binary.txt").write_bytes(b"\xff\xfe")
    (folder / "flags.txt").write_text("--config=toy.py\n--only=a\n")
    (folder / "broken.py").write_text('def get_config():\n    return {}["absent"]\n')
    return folder


@pytest.fixture
def run(folder):
    def run(*arguments):
        root = str(Path(__file__).parents[1])
        return subprocess.run(
            [sys.executable, "command.py", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
        )

    return run


def test_flags_reach_the_command(run):
    result = run(
        "--config=toy.py", "--config.objective.name=sft", "--noconfig.flip", "--config.batch_size", "5"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "sft 5 False\n", "")


def test_flags_of_several_values_repeat_and_others_take_the_place_of_a_files(run):
    result = run("--flagfile=flags.txt", "--only=b", "--many=a", "--many=b")
    assert (result.returncode, result.stderr) == (0, "")


def test_what_a_new_name_drops_is_said(run):
    result = run("--config=optional.py", "--config.objective.name=sft", "--config.batch_size=5")
    assert (result.returncode, result.stdout) == (0, "sft 5 True\n")
    said = "config.objective.name = 'sft': dropped what the recipe sets for 'dspo': lam = 0.5\n"
    assert result.stderr.endswith(said)


@pytest.mark.ci
@each_row(
    ("arguments", "message"),
    [
        (
            ["--config=toy.py", "--config.flip=None"],
            "--config.flip=None: needs a value; without the option it is the recipe's",
        ),
        (
            ["--config=toy.py", "--config.objectve.name=x"],
            "--config.objectve.name: unknown key 'objectve'; did you mean --config.objective.name? "
            "(config has: batch_size, flip, objective)",
        ),
        (
            ["--config", "toy.py", "--config.objective.nme", "x"],
            "--config.objective.nme: unknown key 'nme'; did you mean --config.objective.name? "
            "(config.objective has: beta, name)",
        ),
        (
            ["--config=toy.py", "--config.beta=1"],
            "--config.beta: unknown key 'beta'; did you mean --config.objective.beta? "
            "(config has: batch_size, flip, objective)",
        ),
        (
            ["--config=toy.py", "--config.zzz=1"],
            "--config.zzz: unknown key 'zzz' (config has: batch_size, flip, objective)",
        ),
        (
            ["--config=toy.py", "--config.batch_size.x=1"],
            "--config.batch_size.x: config.batch_size is a single value (4), it has no key 'x'",
        ),
        (
            ["--config=toy.py", "--config.batch_size=many"],
            "--config.batch_size=many: must be a whole number",
        ),
        (["--config=toy.py", "--config.objective.beta=x"], "--config.objective.beta=x: must be a number"),
        (["--config=toy.py", "--config.flip=x"], "--config.flip=x: must be true or false"),
        (["--config=toy.py", "--only=x"], "--only=x: must be one of a|b"),
        (["--config=toy.py", "--only"], "--only: needs a value"),
        (
            ["--config=toy.py", "--confg=x"],
            "--confg: unknown flag; did you mean --config? (--help lists all)",
        ),
        (["--config=toy.py", "--zzzzz=x"], "--zzzzz: unknown flag (--help lists all)"),
        (["--config=toy.py", "--only=a", "-only", "b"], "--only is given twice; give it once"),
        (
            ["--listed=a", "--config=toy.py", "--listed=b"],
            "--listed is given twice; give it once, or several values separated by commas",
        ),
        (
            ["--config=toy.py", "--config", "toy.py", "--config.flip=0"],
            "--config is given twice; give it once",
        ),
        (
            ["--config.flip=false"],
            "--config.flip: changes a key of a recipe; name the recipe before it with --config=FILE",
        ),
        (["--config.flip=0", "--config=toy.py"], "--config.flip=0: must stand behind --config"),
        (["--flagfile=absent.txt"], "--flagfile=absent.txt: No such file or directory"),
        (["--flagfile"], "--flagfile: needs a value, the name of a file"),
        (
            ["--flagfile=binary.txt"],
            "--flagfile: holds no text ('utf-8' codec can't decode byte 0xff in position 0: invalid start "
            "byte); write a flag in each line, as on the command line",
        ),
        (["--config=absent.py"], ABSENT),
        (
            ["--config=absent.py", "--config.batch_size=1"],
            ABSENT,
        ),
        (["--config=raises.py"], "ValueError: config.a = 3: too large"),
        (
            ["--config=toy.py:paper"],
            "--config=toy.py:paper: the recipe has no variants; leave out the colon and what follows",
        ),
        (
            ["--config", "toy.py:paper", "--config.batch_size=1"],
            "toy.py:paper: the recipe has no variants; leave out the colon and what follows",
        ),
        (
            ["--config=toy.py", "batch_size=3"],
            "unexpected argument 'batch_size=3'; options are written --name=value",
        ),
    ],
)
def test_a_bad_command_line_is_one_line(run, arguments, message):
    result = run(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {message}\n")


@each_row(
    "option",
    [
        ["--config=configs/emoji_dspo.py"],
        ["--config", "configs/emoji_dspo.py"],
        ["--config=emoji_dspo"],
        ["--config", "emoji_dspo"],
    ],
)
def test_a_recipe_that_is_not_in_this_folder_is_that_of_the_package(run, folder, option):
    (folder / "emoji_dspo").mkdir(exist_ok=True)  # a workdir of that name is no recipe
    assert (
        "--config.bach_size: unknown key 'bach_size'; did you mean --config.batch_size?"
        in run(*option, "--config.bach_size=3").stderr
    )


def test_a_recipe_of_ones_own_comes_before_that_of_the_package_and_can_build_on_it(run, folder):
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "sd15_dspo.py").write_text(OWN_RECIPE)
    result = run("--config=configs/sd15_dspo.py:sft")
    (folder / "configs" / "sd15_dspo.py").unlink()
    assert (result.returncode, result.stdout, result.stderr) == (0, "sft 32 True\n", "")


@each_row(
    ("batch_size", "message"),
    [
        (6, "--out=toy.py: exists already; choose another name or delete it"),
        (7, "seven is refused, wherever it was"),
        (15, "of a library's own wording (OSError from command.py; --verbosity=1 shows the traceback)"),
        (8, "absent/file: No such file or directory"),
        (
            11,
            "the device's memory does not suffice: RESOURCE_EXHAUSTED: Out of memory allocating "
            f"{2**52} bytes.; take fewer examples at a time (--config.batch_size, --batch_size), in "
            "training see docs/troubleshooting.md, Devices and memory",
        ),
    ],
)
def test_an_error_a_user_can_fix_is_one_line(run, batch_size, message):
    result = run("--config=toy.py", f"--config.batch_size={batch_size}")
    assert (result.returncode, result.stderr) == (2, f"error: {message}\n")


def test_lines_are_logged_once(run):
    """Also where a library's import has set up logging of its own."""
    assert run("--config=toy.py", "--config.batch_size=13").stderr.count("said once") == 1


def test_verbosity_shows_the_traceback_of_a_user_error(run):
    result = run("--config=toy.py", "--config.batch_size=8", "--verbosity=1")
    assert result.returncode == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: absent/file: No such file or directory\n")


@each_row(
    ("arguments", "last_line"),
    [
        (["--config=toy.py", "--config.batch_size=9"], "RuntimeError: a bug"),
        (
            ["--config=toy.py", "--config.batch_size=14"],
            "ValueError: invalid literal for int() with base 10: 'fourteen'",
        ),
        (["--config=broken.py"], "KeyError: 'absent'"),
    ],
)
def test_a_bug_keeps_its_traceback(run, arguments, last_line):
    result = run(*arguments)
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.strip().splitlines()[-1] == last_line


def test_interrupting_exits_as_shells_expect(run):
    result = run("--config=toy.py", "--config.batch_size=10")
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


@each_row("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@each_row(("batch_size", "status"), [(5, 0), (12, 0), (7, 2)])
def test_a_reader_that_is_gone_stops_no_command(folder, batch_size, status, unbuffered):
    """As `command | head` and `command 2>&1 | head` leave it: the pipe has no other end."""
    (folder / "finished").unlink(missing_ok=True)
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": write, "stderr": write if batch_size != 5 else subprocess.PIPE}
    result = subprocess.run(
        [sys.executable, "command.py", "--config=toy.py", f"--config.batch_size={batch_size}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUNBUFFERED": unbuffered},
        **streams,
    )
    os.close(write)
    assert result.returncode == status
    assert not result.stderr
    assert (folder / "finished").exists() == (batch_size == 12)
