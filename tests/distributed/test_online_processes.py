"""Training on own images by two processes over loopback: one run, stopped between rounds, ended together."""

import json
import signal
from contextlib import closing

import jax
import numpy as np
import pytest
from processes import finish, last_step, log_of, start, start_training, wait_until
from tiny_run import make_config, read_reproducible, saved_steps

from dspo_jax.cli import EXIT_STOPPED
from dspo_jax.training.run import train
from dspo_jax.training.start import make_state, prepare
from dspo_jax.training.streams import open_stream

pytestmark = pytest.mark.slow

PROMPTS = ["a cat", "a dog", "a bird", "a red car"]
SETTINGS = {
    "stream.prompts": PROMPTS,
    "stream.num_inference_steps": 3,
    "stream.batch_size": 8,
    "stream.images": 2,
    "stream.updates": 2,
    "rewards.train": "colourfulness",
    "rewards.prompts": ["a horse"],
    "validation.every": 4,
    "batch_size": 8,
    "checkpoint.every": 4,
    "log_every": 1,
    "samples.every": 0,
    "optimizer.warmup_steps": 0,
    "advantages.of": "group",
}
KINDS = {
    "ddpo": {"stream.kind": "trajectories"},
    "draft": {"stream.kind": "prompts", "mesh.fsdp": 4, "mesh.data": 1},
    "dpo": {"stream.kind": "own_pairs", "objective.name": "diffusion_dpo"},
    "rwr": {"stream.kind": "own_pairs", "objective.name": "rwr"},
}


@pytest.fixture
def settings(shallow_model):
    return SETTINGS | {"model": str(shallow_model), "data.path": ""}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_the_run_of_one(kind, settings, tmp_path):
    changes = settings | KINDS[kind] | {"steps": 4}
    started = start_training(tmp_path / "two", changes, processes=2, devices=2)
    assert finish(started) == [0, 0], log_of(tmp_path / "two", 0).read_text()
    alone = {key: value for key, value in changes.items() if not key.startswith("mesh.")}
    train(make_config(changes["model"], "", alone), tmp_path / "one")
    ours, theirs = (read_reproducible(tmp_path / name) for name in ("two", "one"))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    # The images of the first update are those of the same noise; later ones come of other roundings.
    for name in ("reward", "loss", "validation/reward_colourfulness"):
        first = [next(record[name] for record in records if name in record) for records in (ours, theirs)]
        np.testing.assert_allclose(*first, rtol=1e-2, atol=1e-4)


SELF_PLAY = {
    "stream.kind": "self_play",
    "objective.name": "diffusion_dpo",
    "reference.every": 2,
    "validation.every": 0,
    "steps": 4,
}


def test_two_processes_play_against_one_reference(settings, tiny_pairs, tmp_path):
    changes = settings | SELF_PLAY | {"data.path": str(tiny_pairs)}
    started = start_training(tmp_path / "two", changes, processes=2, devices=2)
    assert finish(started) == [0, 0], log_of(tmp_path / "two", 0).read_text()
    train(make_config(changes["model"], tiny_pairs, changes), tmp_path / "one")
    ours, theirs = (
        [record["loser_error"] for record in read_reproducible(tmp_path / name) if "loss" in record]
        for name in ("two", "one")
    )
    assert len(ours) == 4
    np.testing.assert_allclose(ours, theirs, rtol=1e-2)


def test_two_processes_draw_the_losers_of_one(settings, tiny_pairs, tmp_path):
    changes = settings | SELF_PLAY | {"data.path": str(tiny_pairs)}
    given = {"model": changes["model"], "pairs": str(tiny_pairs), "changes": changes}
    (tmp_path / "given.json").write_text(json.dumps(given))
    flags = [f"--given={tmp_path}/given.json", f"--out={tmp_path}"]
    started = start("draw_losers", flags, tmp_path / "two", processes=2, devices=2)
    assert finish(started) == [0, 0], log_of(tmp_path / "two", 0).read_text()
    experiment = prepare(make_config(**given))
    _, reference = make_state(experiment.task, experiment.mesh)
    with closing(open_stream(experiment, reference)) as stream:
        for number in range(2):
            batch = jax.device_get(stream.next({}))
            parts = [np.load(tmp_path / f"{number}-{process}.npz") for process in range(2)]
            index, moments = (np.concatenate([part[name] for part in parts]) for name in ("index", "moments"))
            np.testing.assert_array_equal(index, batch["index"])
            np.testing.assert_array_equal(moments[:, 0], batch["moments"][:, 0])
            # The programs round differently: within two steps of float16, where images differ by far more.
            np.testing.assert_allclose(moments[:, 1], batch["moments"][:, 1], atol=4e-3, rtol=0)
            assert np.abs(np.diff(moments[:, 1].astype(np.float32), axis=0)).max(axis=(1, 2, 3)).min() > 0.1


def test_a_stop_that_is_asked_for_inside_a_round_waits_for_its_end(settings, tmp_path):
    changes = settings | KINDS["ddpo"] | {"steps": 200, "validation.every": 0, "rewards.prompts": []}
    started = start_training(tmp_path, changes, processes=2, devices=2)
    wait_until(started, lambda: last_step(tmp_path) >= 3)
    started[1].send_signal(signal.SIGTERM)
    assert finish(started) == [EXIT_STOPPED] * 2
    step = last_step(tmp_path)
    assert 3 <= step < 200
    assert step % 2 == 0
    assert saved_steps(tmp_path)[-1] == step


@pytest.mark.parametrize("of", ["train", "validation"])
def test_a_reward_that_fails_in_one_process_ends_both(of, settings, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax\n\nasked = 0\n\n\ndef fails(images, prompts):\n"
        "    global asked\n    asked += 1\n"  # the first time is the trial of the function
        "    if asked > 1 and jax.process_index() == 1:\n        raise RuntimeError('no score today')\n"
        "    return [0.5] * len(images)\n"
    )
    watched = {"rewards.validation": [f"{file}:fails"]}
    unwatched = {"rewards.train": f"{file}:fails", "validation.every": 0}
    changes = settings | KINDS["ddpo"] | {"steps": 4} | (unwatched if of == "train" else watched)
    started = start_training(tmp_path / "run", changes, processes=2, devices=2)
    assert 0 not in finish(started, timeout=200)
    assert "failed in another process" in log_of(tmp_path / "run", 0).read_text()
    assert "no score today" in log_of(tmp_path / "run", 1).read_text()
