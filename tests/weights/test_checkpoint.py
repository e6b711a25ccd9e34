"""Round trips of a sharded training state, and every way a checkpoint directory can be wrong."""

import dataclasses
import errno
import functools
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.parallel.rules import make_shardings
from dspo_jax.weights.checkpoints import Checkpoints, DamagedCheckpoint, find_best
from dspo_jax.weights.saved_params import restore_params, split_run


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "optimizer_state"], meta_fields=[]
)
@dataclasses.dataclass
class State:
    step: jax.Array
    params: dict
    optimizer_state: tuple


def make_state(seed=0, mesh_sizes=None):
    """A small sharded state: string keys that look like integers, bfloat16, empty optimizer states."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "unet": {
            "blocks": {
                "0": {
                    "kernel": jax.random.normal(keys[0], (8, 16)),
                    "bias": jax.random.normal(keys[1], (16,)),
                },
                "10": {"scale": jax.random.normal(keys[2], (4, 8), jnp.bfloat16)},
            }
        }
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = State(jnp.asarray(seed, jnp.int32), params, optimizer.init(params))
    mesh = make_mesh(mesh_sizes or {"data": 2, "fsdp": 4})
    return jax.device_put(state, make_shardings(state, mesh))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_bit_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def saved(tmp_path):
    """A directory with steps 1 and 2, whose states differ."""
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"position": step})
    return directory


def test_round_trip_keeps_every_bit_dtype_and_sharding(saved):
    state = make_state(2)
    with Checkpoints(saved) as checkpoints:
        restored, extra, step = checkpoints.restore(abstract(state))
    assert (extra, step) == ({"position": 2}, 2)
    assert isinstance(restored, State)
    assert_bit_identical(restored, state)
    assert jax.tree.map(lambda x: x.sharding.spec, restored) == jax.tree.map(lambda x: x.sharding.spec, state)
    assert restored.params["unet"]["blocks"]["0"]["kernel"].sharding.spec == P(None, "fsdp")


def test_restore_onto_another_mesh(saved):
    elsewhere = make_state(1, mesh_sizes={"data": 8})
    with Checkpoints(saved) as checkpoints:
        restored, _, step = checkpoints.restore(abstract(elsewhere), step=1)
    assert step == 1
    assert_bit_identical(restored, elsewhere)
    assert restored.params["unet"]["blocks"]["0"]["kernel"].sharding.spec == P()


def test_restore_params_gives_plain_nested_dicts_without_the_rest(saved):
    params, step = restore_params(saved)
    assert step == 2
    assert list(params["unet"]["blocks"]) == ["0", "10"]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert_bit_identical(params, make_state(2).params)
    assert_bit_identical(restore_params(saved, step=1, subtree="params")[0], make_state(1).params)


def test_donating_the_state_right_after_save_does_not_change_what_is_saved(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def increment(state):
        return jax.tree.map(lambda x: x + 1, state)

    state = {"params": {"big": jnp.zeros((1000, 1000)), "small": jnp.zeros(())}}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = increment(state)
    params, _ = restore_params(tmp_path / "checkpoints")
    assert set(np.unique(params["big"])) == {0.0}
    assert params["small"] == 0.0


def test_the_latest_step_is_one_that_is_complete(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": {"a": jnp.zeros((1000, 1000))}}, {})
        assert checkpoints.latest_step() == 1
        assert (tmp_path / "checkpoints" / "1").is_dir()


def test_only_the_newest_are_kept_and_a_saved_step_is_not_saved_again(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", max_to_keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 2, 3):
            checkpoints.save(step, {"params": {"a": jnp.full((2,), float(step))}}, {})
        checkpoints.save(3, {"params": {"a": jnp.zeros((2,))}}, {}, wait=True)
        assert checkpoints.latest_step() == 3
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    np.testing.assert_array_equal(restore_params(tmp_path / "checkpoints")[0]["a"], [3.0, 3.0])


def test_the_best_is_kept_beside_the_newest(tmp_path):
    state = {"params": {"a": jnp.zeros((2,))}}
    scores = {1: 0.5, 2: 0.7, 3: None, 4: 0.6, 5: float("nan")}
    with Checkpoints(tmp_path / "checkpoints", max_to_keep=2) as checkpoints:
        assert checkpoints.best() is None
        for step, score in scores.items():
            checkpoints.save(step, state, {}, score)
        assert checkpoints.best() == (2, 0.7)
        assert checkpoints.latest_step() == 5
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]
    with Checkpoints(tmp_path / "checkpoints", max_to_keep=2) as checkpoints:  # as a resumed run finds it
        assert checkpoints.best() == (2, 0.7)


def test_the_best_is_found_beside_a_run_that_goes_on(tmp_path):
    folder = tmp_path / "checkpoints"
    assert find_best(folder) is None
    with Checkpoints(folder) as checkpoints:
        for step, score in ((1, None), (2, 0.7), (4, 0.7), (5, 0.6)):
            checkpoints.save(step, {"params": {"w": jnp.ones(2)}}, {}, score, wait=True)
            assert find_best(folder) == {1: None, 2: (2, 0.7), 4: (4, 0.7), 5: (4, 0.7)}[step]
        unfinished = folder / "6.orbax-checkpoint-tmp"
        unfinished.mkdir()
        assert find_best(folder) == (4, 0.7)
        assert unfinished.is_dir()  # nothing is cleared, as another process may be writing it
    run, name = folder.parent, str(folder.parent)
    assert split_run(f"{name}@best") == (run, 4)
    assert split_run(f"{name}/@best") == (run, 4)
    assert split_run(f"{name}@2") == (run, 2)
    assert split_run(name) == split_run(run) == (run, None)
    assert split_run("someone/model@main") is None  # no run, so none of its steps
    assert split_run("@best") is None
    with pytest.raises(UserError, match="step 'latest': must be a whole number, or best"):
        split_run(f"{name}@latest")


def test_what_leaves_a_run_is_the_moving_average_where_there_is_one(tmp_path):
    state = {"params": {"unet": {"a": jnp.zeros((2,))}}, "ema": {"unet": {"a": jnp.ones((2,))}}}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
    np.testing.assert_array_equal(restore_params(tmp_path / "checkpoints")[0]["unet"]["a"], [1, 1])
    trained, _ = restore_params(tmp_path / "checkpoints", subtree="params")
    np.testing.assert_array_equal(trained["unet"]["a"], [0, 0])


def test_an_interrupted_save_is_ignored_and_cleared(saved):
    os.rename(saved / "2", saved / "2.orbax-checkpoint-tmp")
    assert restore_params(saved)[1] == 1
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(3, make_state(3), {})
    assert sorted(entry.name for entry in saved.iterdir()) == ["1", "3"]


def changed(change):
    state = abstract(make_state(2))
    blocks = state.params["unet"]["blocks"]
    change(blocks)
    return state


@each_row(
    ("change", "message"),
    [
        (
            lambda blocks: blocks["0"].update(bias=jax.ShapeDtypeStruct((8,), jnp.float32)),
            r"2: 'params\.unet\.blocks\.0\.bias' is float32\[16\] there and float32\[8\] in this run; resume",
        ),
        (
            lambda blocks: blocks["0"].update(bias=jax.ShapeDtypeStruct((16,), jnp.bfloat16)),
            r"is float32\[16\] there and bfloat16\[16\] in this run",
        ),
        (
            lambda blocks: blocks.pop("10"),
            r"checkpoint has 'params\.unet\.blocks\.10\.scale', which this run does not \(1 such arrays\)",
        ),
        (
            lambda blocks: blocks.update({"11": jax.ShapeDtypeStruct((1,), jnp.float32)}),
            r"this run needs 'params\.unet\.blocks\.11', which the checkpoint does not have",
        ),
    ],
)
def test_a_state_of_another_form_is_refused(saved, change, message):
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(changed(change))


def test_missing_steps_and_folders_are_named(saved, tmp_path):
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(FileNotFoundError, match=r"holds no step 7 \(it has: 1, 2\)"),
    ):
        checkpoints.restore(abstract(make_state()), step=7)
    with pytest.raises(FileNotFoundError, match=r"holds no step 7 \(it has: 1, 2\)"):
        restore_params(saved, step=7)
    with pytest.raises(FileNotFoundError, match="nowhere: no such checkpoint directory"):
        restore_params(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: holds no complete checkpoint"):
        restore_params(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"has no 'ema' \(it has: optimizer_state, params, step\)"):
        restore_params(saved, subtree="ema")


@each_row("open_directory", [Checkpoints, restore_params])
def test_a_directory_of_something_else_is_refused_untouched(tmp_path, open_directory):
    (tmp_path / "photo.jpg").write_bytes(b"not a checkpoint")
    with pytest.raises(
        ValueError, match=r"not a checkpoint directory: it holds 'photo\.jpg' and no step folders"
    ):
        open_directory(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"photo\.jpg: is a file, not a checkpoint directory"):
        open_directory(tmp_path / "photo.jpg")
    assert [entry.name for entry in tmp_path.iterdir()] == ["photo.jpg"]


# Orbax leaves a coroutine behind when reading an array fails.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)
@each_row("damaged", ["_METADATA", "manifest.ocdbt", "d", "extra"])
def test_a_damaged_checkpoint_is_one_clear_error(saved, damaged):
    step = saved / "2"
    if damaged == "extra":
        (step / "extra" / "metadata").unlink()
    elif damaged == "d":
        for file in (step / "state" / "d").iterdir():
            os.truncate(file, file.stat().st_size // 2)
    else:
        os.truncate(step / "state" / damaged, 10)
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(ValueError, match=r"2: damaged checkpoint: .*; move this folder away") as caught:
            checkpoints.restore(abstract(make_state()))
        assert "\n" not in str(caught.value)
        assert_bit_identical(checkpoints.restore(abstract(make_state()), step=1)[0], make_state(1))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)
def test_a_damaged_newest_checkpoint_is_passed_over_only_when_asked(saved, caplog):
    os.truncate(saved / "2" / "state" / "_METADATA", 10)
    (saved / "2.damaged").mkdir()  # an earlier one
    state = abstract(make_state())
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(DamagedCheckpoint, match=r"checkpoints/2: damaged checkpoint"):
            checkpoints.restore_newest(state, fallback=False)
        assert (saved / "2").is_dir()
        restored, extra, step = checkpoints.restore_newest(state, fallback=True)
        assert (step, extra) == (1, {"position": 1})
        assert_bit_identical(restored, make_state(1))
        assert "checkpoints/2: damaged checkpoint" in caplog.text
        checkpoints.save(2, make_state(2), {}, wait=True)  # the step is free again
    assert sorted(entry.name for entry in saved.iterdir()) == ["1", "2", "2.damaged", "2.damaged1"]
    assert restore_params(saved)[1] == 2


@each_row(
    "error",
    [RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), OSError(errno.ESTALE, "Stale file handle")],
    ids=["memory", "network"],
)
def test_what_says_nothing_of_a_checkpoint_does_not_set_it_aside(saved, monkeypatch, error):
    with Checkpoints(saved) as checkpoints:

        def restore(*given, **how):
            raise error

        monkeypatch.setattr(checkpoints._manager, "restore", restore)
        with pytest.raises(type(error), match=str(error.args[-1])):
            checkpoints.restore_newest(abstract(make_state()), fallback=True)
    assert sorted(entry.name for entry in saved.iterdir()) == ["1", "2"]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)
def test_the_only_checkpoint_is_never_given_up_and_another_config_is_not_damage(saved):
    other = changed(lambda blocks: blocks.update({"11": jax.ShapeDtypeStruct((1,), jnp.float32)}))
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(ValueError, match="which the checkpoint does not have"),
    ):
        checkpoints.restore_newest(other, fallback=True)
    assert (saved / "2").is_dir()
    shutil.rmtree(saved / "1")
    os.truncate(saved / "2" / "state" / "_METADATA", 10)
    with Checkpoints(saved) as checkpoints, pytest.raises(DamagedCheckpoint):
        checkpoints.restore_newest(abstract(make_state()), fallback=True)
    assert (saved / "2").is_dir()


def save_twice(directory, wait, limit=None):
    """Saves step 1, then a much larger step 2, with an optional limit on the size of a file in bytes."""
    big = {f"a{i}": jnp.asarray(np.random.default_rng(i).normal(size=100_000)) for i in range(50)}
    random = np.random.default_rng(0)
    with Checkpoints(directory, max_to_keep=1) as checkpoints:
        checkpoints.save(1, {"params": {"a": jnp.asarray(random.normal(size=10_000))}}, {}, wait=True)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        checkpoints.save(2, {"params": big}, {}, wait=wait)


def run_here(code, *args, within=()):
    """Runs code in a process of its own that finds this module and the project."""
    tests = Path(__file__).parent
    folders = [str(folder) for folder in (tests, tests.parent / "support", tests.parents[1])]
    paths = f"import sys; sys.path[:0] = {folders}; import test_checkpoint as t; "
    command = [*within, sys.executable, "-c", paths + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_background_write_that_fails_names_the_step_that_still_loads(tmp_path):
    directory = tmp_path / "checkpoints"
    result = run_here("t.save_twice(sys.argv[1], wait=False, limit=200_000)", directory)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"OSError: {directory}/2: checkpoint not saved: "), result.stderr
    assert last_line.endswith("; step 1 is complete and still loads")
    assert "Event loop is closed" not in result.stderr
    assert "never retrieved" not in result.stderr
    params, step = restore_params(directory)
    assert step == 1
    np.testing.assert_array_equal(
        params["a"], np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    )


def save_twice_and_say(directory, wait):
    """What `save_twice` raises, and the step that loads then."""
    try:
        save_twice(directory, wait)
    except OSError as error:
        print(f"{error}; loaded step {restore_params(directory)[1]}")


@pytest.mark.ci
@each_row("wait", [True, False])
def test_a_full_disk_is_said_in_plain_words(tmp_path, wait):
    # The small disk is seen by that process alone and gone with it, however it ends.
    within = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"', tmp_path]
    if not shutil.which("unshare") or subprocess.run([*within, "true"], capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    directory = tmp_path / "checkpoints"
    result = run_here(f"t.save_twice_and_say(sys.argv[1], {wait})", directory, within=within)
    assert result.stdout == (
        f"{directory}/2: checkpoint not saved: no space left on the disk; step 1 is complete and still "
        "loads; loaded step 1\n"
    ), result.stderr
    assert not directory.exists()


@each_row("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: a\nb")])
def test_errors_of_the_save_itself_are_worded_too(tmp_path, monkeypatch, error):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:

        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(
            OSError, match=r"5: checkpoint not saved: .*; there is no earlier checkpoint$"
        ) as caught:
            checkpoints.save(5, {"params": {"a": jnp.zeros((2,))}}, {})
        assert "\n" not in str(caught.value)
