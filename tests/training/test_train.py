"""The loop around the step: stopping and resuming anywhere, and every refusal before the first step."""

import dataclasses
import itertools
import json
import logging
import signal
from functools import partial

import numpy as np
import pytest
from tiny_run import begin, make_config, read_reproducible, saved_steps

from dspo_jax.data import loader
from dspo_jax.data.datasets import read_datasets
from dspo_jax.monitoring.metrics import read_metrics
from dspo_jax.training import run
from dspo_jax.training.validation import Validator
from dspo_jax.weights.checkpoints import Checkpoints


class FakeStep:
    """Takes the place of the compiled step: notes the examples it is given, and can be interrupted."""

    def __init__(self):
        self.seen: list[list[int]] = []
        self.interrupt: dict[int, signal.Signals | Exception] = {}
        self.bad: set[int] = set()  # examples whose update is skipped

    def compile(self, state):
        del state
        return self

    def __call__(self, state, reference, batch, key):
        del reference, key
        step = int(state.step) + 1
        event = self.interrupt.pop(step, None)
        if isinstance(event, Exception):
            raise event
        if event is not None:
            signal.raise_signal(event)
        self.seen.append(np.asarray(batch["index"]).tolist())
        health = state.health
        in_a_row = health.skipped_in_a_row + 1 if self.bad & set(self.seen[-1]) else 0 * health.skipped
        health = health._replace(skipped_in_a_row=in_a_row)
        state = dataclasses.replace(state, step=state.step + 1, health=health)
        return state, {
            "loss": np.float32(step),
            "first_token_sum": np.asarray(batch["tokens"]).sum(),
            "skipped_in_a_row": in_a_row,
        }


@pytest.fixture
def fake_step():
    return FakeStep()


@pytest.fixture
def train(fake_step):
    """`run.train` with the fake step."""
    return partial(run.train, make_step=fake_step.compile, count_flops=lambda *given: None)


@pytest.fixture
def config(shallow_model, tiny_pairs):
    return make_config(shallow_model, tiny_pairs, {"steps": 12, "checkpoint.every": 4})


def test_a_run_writes_its_config_metrics_and_checkpoints(config, train, fake_step, tmp_path):
    config.log_every = 5
    assert train(config, tmp_path / "run").step == 12
    config.stream.sampler = "ddim"  # what None means for this model
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == json.loads(config.to_json())
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(5, 5), (10, 10), (12, 12)]
    assert saved_steps(tmp_path / "run") == [4, 8, 12]
    assert (tmp_path / "run" / "tensorboard").is_dir()
    assert fake_step.seen == np.arange(12 * 8).reshape(12, 8).tolist()


def test_what_is_said_before_the_first_step(config, train, tmp_path, caplog):
    config.steps = 1
    with caplog.at_level(logging.INFO, logger="absl"):
        train(config, tmp_path / "run")
    said = caplog.text
    assert "dspo: " in said
    assert "learning rate 0.001 for 8 examples a step, which is 0.000125 an example" in said
    assert "reward_scale = 0.001 (mean, with 1/2) over 64 values an image is 0.001 (mean, with 1/2)" in said
    assert "dspo: the preference term's coefficient s * G is at most score_weight = 0.001" in said


def test_a_finished_run_does_nothing_and_can_be_prolonged(config, train, fake_step, tmp_path):
    train(config, tmp_path / "run")
    assert train(config, tmp_path / "run").step == 12
    assert len(fake_step.seen) == 12
    config.steps = 14
    assert train(config, tmp_path / "run").step == 14
    assert fake_step.seen[12:] == np.arange(12 * 8, 14 * 8).reshape(2, 8).tolist()


@pytest.mark.ci
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_saves_and_the_data_goes_on_at_the_next_unseen_example(
    config, train, fake_step, tmp_path, number
):
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    train(config, undisturbed)
    expected, fake_step.seen = fake_step.seen, []
    handler = signal.getsignal(number)

    fake_step.interrupt = {6: number}
    assert train(config, stopped).step == 6
    assert saved_steps(stopped) == [4, 6]
    assert signal.getsignal(number) is handler
    assert train(config, stopped).step == 12
    assert fake_step.seen == expected
    assert read_reproducible(stopped) == read_reproducible(undisturbed)


def test_being_asked_to_stop_again_does_not_cut_the_last_checkpoint_short(
    config, train, fake_step, tmp_path, monkeypatch
):
    monkeypatch.setattr(signal, "default_int_handler", lambda *given: pytest.fail("interrupted"))
    default = signal.signal(signal.SIGTERM, lambda *given: pytest.fail("ended"))
    close = Checkpoints.close

    def close_and_be_asked_again(checkpoints):
        signal.raise_signal(signal.SIGTERM)
        close(checkpoints)

    monkeypatch.setattr(Checkpoints, "close", close_and_be_asked_again)
    fake_step.interrupt = {3: signal.SIGTERM}
    try:
        assert train(config, tmp_path / "run").step == 3
    finally:
        signal.signal(signal.SIGTERM, default)
    assert saved_steps(tmp_path / "run")[-1] == 3


@pytest.mark.ci
def test_a_crash_goes_back_to_the_last_checkpoint(config, train, fake_step, tmp_path):
    undisturbed, crashed = tmp_path / "undisturbed", tmp_path / "crashed"
    train(config, undisturbed)
    expected, fake_step.seen = fake_step.seen, []

    fake_step.interrupt = {7: RuntimeError("the device is gone")}
    with pytest.raises(RuntimeError, match="the device is gone"):
        train(config, crashed)
    train(config, crashed)
    assert fake_step.seen == expected[:6] + expected[4:]  # steps 5 and 6 again
    assert read_reproducible(crashed) == read_reproducible(undisturbed)


def test_a_checkpoint_is_never_ahead_of_the_metrics(config, train, tmp_path, monkeypatch):
    """A run that is killed just after a checkpoint must have written the line of that step."""
    lines = []

    plain = Checkpoints.save

    def save(self, step, state, extra, score=None, wait=False):
        lines.append((step, read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]))
        plain(self, step, state, extra, score, wait)

    monkeypatch.setattr(Checkpoints, "save", save)
    train(config, tmp_path)
    assert lines == [(4, 4), (8, 8), (12, 12)]


def test_the_position_saved_with_a_checkpoint_gives_the_next_unseen_keys(
    config, train, tmp_path, monkeypatch
):
    positions = {}

    plain = Checkpoints.save

    def save(self, step, state, extra, score=None, wait=False):
        positions[step] = extra["data"]
        plain(self, step, state, extra, score, wait)

    monkeypatch.setattr(Checkpoints, "save", save)
    train(config, tmp_path)

    def keys(position, count):
        batches = loader.train_batches(read_datasets(config.data.path), batch_size=8, seed=0)
        if position is not None:
            batches.set_state(position)
        keys = [next(batches)["key"] for _ in range(count)]
        batches.close()
        return keys

    whole = keys(None, 12)
    assert sorted(itertools.chain(*whole[:3])) == sorted(f"train {i}" for i in range(24))  # an epoch
    assert keys(positions[4], 8) == whole[4:]
    assert keys(positions[8], 4) == whole[8:]


def test_a_checkpoint_folder_that_is_none_is_refused(config, train, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "holiday.jpg").touch()
    with pytest.raises(ValueError, match="not a checkpoint directory") as caught:
        train(config, tmp_path / "run")
    assert str(caught.value).startswith(f"{folder}: not a checkpoint directory: it holds 'holiday.jpg'")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 3}, "config.seed = 0, now it is 3"),
        ({"optimizer.learning_rate": 0.5}, "config.optimizer.learning_rate = 0.001, now it is 0.5"),
        ({"objective.name": "sft"}, "config.objective.name = 'dspo', now it is 'sft'"),
    ],
)
def test_resuming_with_another_config_is_refused(config, train, tmp_path, changes, named):
    begin(tmp_path, config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match="this run was started with") as caught:
        train(config, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'config.json'}: this run was started with {named}; "
        "resume with the same config or choose another --workdir "
        "(what may differ: checkpoint, epochs, log_every, mesh, offload, profile, remat, rewards.folder, "
        "rewards.images, rewards.prompts, rewards.validation, samples, steps, stream.batch_size, validation, "
        "wandb_project)"
    )


def test_a_run_that_failed_in_its_first_step_starts_with_another_config(config, train, fake_step, tmp_path):
    fake_step.interrupt = {1: RuntimeError("RESOURCE_EXHAUSTED: as of a batch that is too large")}
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        train(config, tmp_path / "run")
    config.seed = 3
    assert train(config, tmp_path / "run").step == 12
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3


def test_too_many_skipped_updates_stop_the_run_and_name_the_last_good_checkpoint(
    config, train, fake_step, tmp_path
):
    config.stability.max_skipped = 2
    fake_step.bad = set(range(5 * 8, 7 * 8)) | set(range(8 * 8, 11 * 8))  # two in a row, then three
    with pytest.raises(ValueError, match="updates in a row were skipped") as caught:
        train(config, tmp_path / "run")
    assert str(caught.value) == (
        "step 11: 3 updates in a row were skipped (config.stability.max_skipped = 2): their losses or "
        "gradients were not finite, or the loss a spike; the last good checkpoint is "
        f"{tmp_path}/run/checkpoints/8; lower config.optimizer.learning_rate, or go on from there past these "
        "examples with --config.stability.rollback=true"
    )
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["skipped_in_a_row"] == 3


def test_rolling_back_goes_on_from_the_checkpoint_with_later_examples(config, train, fake_step, tmp_path):
    config.stability.max_skipped = 2
    config.stability.rollback = True
    fake_step.bad = set(range(5 * 8, 8 * 8))
    assert train(config, tmp_path / "run").step == 12
    batches = np.arange(30 * 8).reshape(-1, 8).tolist()
    # On from step 4 with what had not been seen.
    assert fake_step.seen == batches[:16]
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(
        range(1, 13)
    )
    assert saved_steps(tmp_path / "run") == [4, 8, 12]


def test_a_run_rolls_back_past_the_checkpoints_that_skipped_updates_would_have_left(
    config, train, fake_step, tmp_path
):
    config.stability.max_skipped, config.stability.rollback, config.checkpoint.every = 2, True, 1
    fake_step.bad = set(range(5 * 8, 8 * 8)) | set(range(9 * 8, 11 * 8))  # three, and after them two
    assert train(config, tmp_path / "run").step == 12
    # Back to step 5, the last that was made; of the two only two are counted.
    assert fake_step.seen == np.arange(15 * 8).reshape(-1, 8).tolist()
    assert saved_steps(tmp_path / "run")[-1] == 12


def test_a_run_rolls_back_to_a_checkpoint_only_once(config, train, fake_step, tmp_path):
    config.stability.max_skipped = 2
    config.stability.rollback = True
    fake_step.bad = set(range(5 * 8, 100 * 8))
    with pytest.raises(ValueError, match=r"the last good checkpoint is .*checkpoints/4;"):
        train(config, tmp_path / "run")
    assert len(fake_step.seen) == 8 + 4


def test_the_best_model_by_held_out_pairs_is_saved_and_kept(config, train, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.75, 0.625, 0.5, 0.5, 0.5, 0.5])  # the model of step 5 is the best
    monkeypatch.setattr(
        Validator, "__call__", lambda *given: {"implicit_accuracy": next(accuracies), "winner_error": 1.0}
    )
    config.validation.every, config.checkpoint.every, config.checkpoint.max_to_keep = 5, 4, 1
    config.steps = 16
    train(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [5, 16]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000


def test_a_run_ends_where_validations_find_no_better_model(config, train, fake_step, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.75, 0.75, 0.625, 0.5])
    monkeypatch.setattr(
        Validator, "__call__", lambda *given: {"implicit_accuracy": next(accuracies), "winner_error": 1.0}
    )
    config.validation.every, config.validation.patience, config.steps = 2, 2, 100
    # Steps 4 and 6 were no better than step 2; the step that is then made is saved.
    assert train(config, tmp_path / "run") == (7, True, False, 4)  # of equals the later
    assert saved_steps(tmp_path / "run")[-1] == 7
    assert train(config, tmp_path / "run") == (7, True, False, 4)  # of equals the later
    assert len(fake_step.seen) == 7


@pytest.mark.ci
def test_a_run_that_is_killed_after_its_last_validation_ends_with_the_same_step(
    config, train, fake_step, tmp_path, monkeypatch
):
    accuracies = iter([0.5, 0.75, 0.75, 0.625])
    monkeypatch.setattr(
        Validator, "__call__", lambda *given: {"implicit_accuracy": next(accuracies), "winner_error": 1.0}
    )
    config.validation.every, config.validation.patience, config.steps = 2, 2, 100
    config.checkpoint.every, fake_step.interrupt = 2, {7: RuntimeError("killed")}
    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "run")
    assert train(config, tmp_path / "run") == (7, True, False, 4)


def test_a_run_of_epochs_is_as_long_as_its_data(config, train, tmp_path, caplog):
    config.epochs, config.optimizer.warmup_steps = 2.0, 1000  # of 24 examples, 8 a step
    with caplog.at_level(logging.WARNING, "absl"):
        assert train(config, tmp_path / "two")[:2] == (6, True)
    assert "config.optimizer.warmup_steps = 1000: the run has 6 steps, and never reaches" in caplog.text


@pytest.mark.ci
def test_resuming_from_a_damaged_checkpoint_is_asked_for_by_the_config(config, train, fake_step, tmp_path):
    train(config, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "12" / "extra" / "metadata").unlink()
    with pytest.raises(ValueError, match=r"checkpoints/12: damaged checkpoint"):
        train(config, tmp_path / "run")
    config.checkpoint.fallback = True
    assert train(config, tmp_path / "run").step == 12
    assert len(fake_step.seen) == 16


@pytest.mark.slow
def test_pictures_are_drawn_beside_the_base_and_do_not_change_the_run(shallow_model, tiny_pairs, tmp_path):
    """The real step: two runs of three steps, one with samples, a profile and validation."""
    changes = {"steps": 3, "ema_decay": 0.9}
    run.train(make_config(shallow_model, tiny_pairs, changes), tmp_path / "plain")
    watched = {
        "samples.every": 2,
        "samples.num_inference_steps": 2,
        "samples.prompts": ("a", "b"),
        "validation.every": 2,
        "validation.batch_size": 8,
        "profile.start": 0,
        "profile.steps": 1,
    }
    run.train(make_config(shallow_model, tiny_pairs, changes | watched), tmp_path / "watched")
    names = {path.name for path in (tmp_path / "watched" / "samples").iterdir()}
    assert names == {"step_000002.png", "step_000003.png"}
    assert any((tmp_path / "watched" / "profile").rglob("*.pb"))
    plain, with_validation = read_reproducible(tmp_path / "plain"), read_reproducible(tmp_path / "watched")
    assert [record for record in with_validation if "loss" in record] == plain
    record = read_metrics(tmp_path / "plain" / "metrics.jsonl")[-1]
    assert record["examples_seen"] == 24
    assert record["host_memory_peak_gib"] > 0.1
    assert 0 <= record["data_wait"] <= 1
    assert record["tflops_per_device"] > 0


def test_no_step_waits_for_the_checkpoint_that_is_being_written(config, train, tmp_path, monkeypatch):
    waits, wait = [], Checkpoints.wait
    monkeypatch.setattr(Checkpoints, "latest_step", lambda self: waits.append("asked") or None)
    monkeypatch.setattr(Checkpoints, "wait", lambda self: wait(self))
    train(config, tmp_path)
    assert waits == ["asked"]  # once, to resume
