"""`python -m dspo_jax.train` on the model's own images, killed anywhere: the run that was not disturbed."""

import json
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from processes import finish, last_step, log_of, start_training, wait_until
from tiny_run import read_reproducible, saved_steps

from dspo_jax.weights.checkpoints import is_array_metadata

# A reward that kills its process as it is asked for the KILL_AT-th time, once WAIT_FOR is there.
REWARD = """
import os
import signal
import time

asked = 0

def deadly(images, prompts):
    global asked
    asked += 1
    if asked == int(os.environ["KILL_AT"]):
        while not os.path.exists(os.environ["WAIT_FOR"]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return [image.mean() + len(prompt) for image, prompt in zip(images, prompts, strict=True)]
"""
SETTINGS = {
    "data.path": "",
    "stream.prompts": ["a cat", "a blue car", "two green trees"],
    "stream.num_inference_steps": 3,
    "stream.batch_size": 4,
    "stream.images": 2,
    "stream.updates": 2,
    "batch_size": 4,
    "steps": 8,
    "log_every": 1,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 0,
    "checkpoint.every": 4,
    "samples.every": 0,
    "validation.every": 0,
}
KINDS = {
    "trajectories": {
        "stream.kind": "trajectories",
        "advantages.of": "prompt",
        "advantages.min_count": 4,
        "advantages.buffer_size": 6,
        "ema_decay": 0.9,
    },
    "own_pairs": {
        "stream.kind": "own_pairs",
        "objective.name": "diffusion_dpo",
        "reference.every": 2,
        "reference.decay": 0.5,
    },
}
# A run first tries the reward once. Images are scored in parts of 4, while the next part is drawn: a round of
# "trajectories" has 2 parts, one of "own_pairs" 4, and 2 updates follow each. The process is killed in the
# second round, while a part is drawn; then between the last part of the third round and its updates, as soon
# as the checkpoint of step 4 is there; and, gone on with from there, in the fourth round.
KILLED = {"trajectories": [(4, 0), (7, 4), (4, 4)], "own_pairs": [(7, 0), (13, 4), (6, 4)]}


def run_command(workdir, changes, kill_at=0, wait_for=0):
    """Runs the command to its end, or until it is killed at a call of the reward; returns its exit status."""
    file = workdir.parent / "mine.py"
    file.write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILL_AT", str(kill_at))
        patch.setenv("WAIT_FOR", str(workdir / "checkpoints" / str(wait_for)) if wait_for else "/")
        changes = {"rewards.train": f"{file}:deadly"} | changes
        started = start_training(workdir, changes, processes=1, devices=1)
    return finish(started, timeout=600)[0]


def read_checkpoint(workdir, step):
    """Every array of a checkpoint by name, and the position of the stream with its statistics."""
    folder = workdir / "checkpoints" / str(step)
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder / "state").tree
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree, is_leaf=is_array_metadata
    )
    with ocp.Checkpointer(handler) as reader:
        state = reader.restore(folder / "state", args=ocp.args.PyTreeRestore(tree, restore_args=as_numpy))
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
    return arrays, json.loads((folder / "extra" / "metadata").read_text())["data"]


def assert_same_run(workdir, undisturbed):
    assert read_reproducible(workdir) == read_reproducible(undisturbed)
    steps = saved_steps(workdir)
    assert steps == saved_steps(undisturbed)
    (ours, position), (theirs, expected) = (
        read_checkpoint(each, steps[-1]) for each in (workdir, undisturbed)
    )
    assert position == expected
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    return ours, json.loads(position)


@pytest.mark.slow
def test_killed_at_any_step_of_a_run_by_reward_gradients(shallow_model, tmp_path):
    """An update draws its images itself: a kill is inside one, or between two."""
    changes = SETTINGS | {
        "model": str(shallow_model),
        "stream.kind": "prompts",
        "stream.updates": 1,
        "rewards.train": "colourfulness",
        "reward_gradient.name": "alignprop",
        "steps": 120,
        "checkpoint.every": 30,
    }
    workdir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    assert run_command(undisturbed, changes) == 0, log_of(undisturbed, 0).read_text()
    for reached in (
        lambda: last_step(workdir) >= 10,
        lambda: 30 in saved_steps(workdir),
        lambda: last_step(workdir) >= 75,
    ):
        started = start_training(workdir, changes, processes=1, devices=1)
        wait_until(started, reached)
        started[0].kill()
        assert finish(started) == [-signal.SIGKILL]
        assert last_step(workdir) < 120
    assert run_command(workdir, changes) == 0, log_of(workdir, 0).read_text()
    _, position = assert_same_run(workdir, undisturbed)
    assert position == {"next_batch": 120}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_a_rollout_before_an_update_and_after_one(kind, shallow_model, tmp_path):
    changes = SETTINGS | KINDS[kind] | {"model": str(shallow_model)}
    workdir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    assert run_command(undisturbed, changes) == 0, log_of(undisturbed, 0).read_text()
    reached = []
    for kill_at, wait_for in KILLED[kind]:
        assert run_command(workdir, changes, kill_at, wait_for) == -signal.SIGKILL
        reached.append((last_step(workdir), saved_steps(workdir)))
    print("killed after", reached)
    assert run_command(workdir, changes) == 0, log_of(workdir, 0).read_text()
    arrays, position = assert_same_run(workdir, undisturbed)
    assert [saved for _, saved in reached] == [[], [4], [4]]
    assert all(0 < step < 8 for step, _ in reached)
    if kind == "trajectories":
        assert {len(rewards) for rewards in position["statistics"].values()} == {6}
    assert any("reference" in name for name in arrays) == (kind == "own_pairs")


@pytest.mark.ci
def test_killed_between_a_rollout_and_its_update(shallow_model, tmp_path):
    """The third round is drawn twice, and counts once towards the statistics of its prompts."""
    changes = SETTINGS | KINDS["trajectories"] | {"model": str(shallow_model)}
    workdir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    assert run_command(undisturbed, changes) == 0, log_of(undisturbed, 0).read_text()
    assert run_command(workdir, changes, 7, 4) == -signal.SIGKILL
    assert run_command(workdir, changes) == 0, log_of(workdir, 0).read_text()
    assert_same_run(workdir, undisturbed)
