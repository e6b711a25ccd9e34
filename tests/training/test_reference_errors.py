"""Stored errors of the reference: the same run as with the reference, its resuming, and refusals."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from dense_task import make_batch, make_reference, make_state, make_task
from model_folders import UNET_FILE, edit
from tables import each_row
from tiny_run import make_config, read_reproducible

from dspo_jax.data import loader
from dspo_jax.data.datasets import read_datasets
from dspo_jax.errors import UserError
from dspo_jax.training.describe import describe_run
from dspo_jax.training.reference_errors import of_reference_and_data
from dspo_jax.training.run import train
from dspo_jax.training.start import make_state as start_state
from dspo_jax.training.start import prepare
from dspo_jax.training.step import train_step
from dspo_jax.training.streams import open_stream

# 24 examples in batches of 16: epochs end inside of batches, and the last batch of the errors is short. The
# draws come round in the fifth batch.
CHANGES = {
    **{"reference.draws": 2, "objective.name": "diffusion_dpo", "objective.beta": 50.0},
    **{"batch_size": 16, "steps": 6, "checkpoint.every": 3},
}


class RunningTheReference:
    """The batches of a run without the stored errors."""

    def __init__(self, experiment, reference):
        self.stream, self.drawn = open_stream(experiment, reference), []

    def next(self, params):
        batch = dict(self.stream.next(params))
        del batch["reference_error"]
        self.drawn.append(np.asarray(batch["index"]))
        return batch

    def __getattr__(self, name):
        return getattr(self.stream, name)


@pytest.fixture(scope="module")
def stored_run(shallow_model, tiny_pairs, tmp_path_factory):
    """A workdir whose run has ended."""
    workdir = tmp_path_factory.mktemp("run") / "stored"
    train(make_config(shallow_model, tiny_pairs, CHANGES), workdir)
    return workdir


def test_a_step_with_stored_errors_is_the_step_that_runs_the_reference():
    for name in ("diffusion_dpo", "sdpo", "diffusion_rpo"):
        task, key, batch = make_task(name, beta=10.0), jax.random.key(0), make_batch()
        reference = make_reference(task, seed=1)
        errors = task.loss.reference_error(task, reference, batch, key)
        expected_state, expected = train_step(make_state(task), reference, batch, key)
        without = {"text_encoder": reference["text_encoder"]}
        state, metrics = train_step(make_state(task), without, batch | {"reference_error": errors}, key)
        assert expected.pop("deviation") > 0
        assert metrics.keys() == expected.keys()
        for found, wanted in zip(
            jax.tree.leaves((metrics, state.params)),
            jax.tree.leaves((expected, expected_state.params)),
            strict=True,
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_an_example_has_its_draws_in_turn(shallow_model, tiny_pairs):
    """Epoch by epoch, whatever its place in the epoch."""
    experiment = prepare(make_config(shallow_model, tiny_pairs, CHANGES))
    errors = np.arange(2 * 24 * 2, dtype=np.float32).reshape(2, 24, 2)
    stream = open_stream(dataclasses.replace(experiment, reference_errors=errors), {})
    batches = [stream.next({}) for _ in range(6)]
    stream.close()
    index = np.concatenate([batch["index"] for batch in batches]).reshape(4, 24)
    for epoch, drawn in enumerate(index):
        np.testing.assert_array_equal(np.sort(drawn), 24 * (epoch % 2) + np.arange(24))
    found = np.concatenate([batch["reference_error"] for batch in batches])
    np.testing.assert_array_equal(found, errors.reshape(48, 2)[index.reshape(-1)])
    # And a row is what is stored there.
    in_order = loader.eval_batches(read_datasets(tiny_pairs), batch_size=24, split="train")
    stored = next(in_order)["moments"]
    in_order.close()
    np.testing.assert_array_equal(batches[0]["moments"], stored[index.reshape(-1)[:16]])


@pytest.mark.slow
def test_metrics_are_those_of_a_run_that_runs_the_reference(stored_run, shallow_model, tiny_pairs, tmp_path):
    streams = []

    def make_stream(experiment, reference):
        streams.append(RunningTheReference(experiment, reference))
        return streams[-1]

    train(make_config(shallow_model, tiny_pairs, CHANGES), tmp_path / "run", make_stream=make_stream)
    (stream,) = streams
    assert np.unique(np.concatenate(stream.drawn)).size == 48
    ours, theirs = read_reproducible(stored_run), read_reproducible(tmp_path / "run")
    assert len(ours) == len(theirs) == 6
    for record, expected in zip(ours, theirs, strict=True):
        expected.pop("deviation")
        if record["step"] == 1:  # the sign of a margin that is nothing but rounding
            del record["implicit_accuracy"], expected["implicit_accuracy"]
        assert record == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_killed_while_storing_and_while_training(stored_run, shallow_model, tiny_pairs, tmp_path):
    """The errors go on with the first batch that is not whole; the run with its checkpoint."""
    config = make_config(shallow_model, tiny_pairs, CHANGES)
    workdir = shutil.copytree(stored_run, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6")
    whole = np.load(stored_run / "reference_errors.npy")
    assert whole.shape == (2, 24, 2)
    assert np.unique(whole).size == whole.size
    partial = np.lib.format.open_memmap(workdir / "reference_errors.npy", "r+")
    partial[1, 17:] = np.nan
    partial[:, :16] += 1  # is not computed again
    partial.flush()
    train(config, workdir)
    again = np.load(workdir / "reference_errors.npy")
    np.testing.assert_array_equal(again[:, 16:], whole[:, 16:])
    np.testing.assert_array_equal(again[:, :16], whole[:, :16] + 1)
    # With the right errors the run ends as it did.
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.copy(stored_run / "reference_errors.npy", workdir)
    train(config, workdir)
    assert read_reproducible(workdir) == read_reproducible(stored_run)
    (workdir / "reference_errors.npy").write_bytes(b"x" * 40)
    with pytest.raises(UserError, match=r"reference_errors\.npy: not a whole .*; delete it"):
        train(config, workdir)
    np.save(workdir / "reference_errors.npy", whole[:, :1])  # NumPy would repeat it
    with pytest.raises(
        UserError, match=r"damaged \(float32 \(2, 1, 2\) in place of float32 \(2, 24, 2\)\); d"
    ):
        train(config, workdir)
    for damaged, what in (
        (np.int32(whole), r"int32 \(2, 24, 2\) in pl"),
        (-whole, "holds numbers that are no sq"),
    ):
        np.save(workdir / "reference_errors.npy", damaged)
        with pytest.raises(UserError, match=rf"damaged \({what}.*; delete it"):
            train(config, workdir)
    # Of another reference they are made anew.
    (workdir / "reference_errors.json").write_text("{}")
    shutil.rmtree(workdir / "checkpoints" / "6")
    np.save(workdir / "reference_errors.npy", np.zeros_like(whole))
    train(config, workdir)
    np.testing.assert_array_equal(np.load(workdir / "reference_errors.npy"), whole)


def test_another_reference_or_other_data_are_another_run(shallow_model, tiny_pairs, tmp_path):
    experiment = prepare(make_config(shallow_model, tiny_pairs, CHANGES))
    pinned = experiment.pins()
    assert pinned["reference.draws"].startswith("a reference and data of the digest ")
    other = shutil.copytree(shallow_model, tmp_path / "other")
    edit(
        other / UNET_FILE,
        lambda tensors: tensors.update({name: array + 1 for name, array in tensors.items()}),
    )
    assert prepare(make_config(other, tiny_pairs, CHANGES)).pins() != pinned
    fewer = [
        dataclasses.replace(dataset, manifest=dataset.manifest | {"created": "later"})
        for dataset in experiment.datasets
    ]
    digests = {of_reference_and_data(experiment.task, data) for data in (experiment.datasets, fewer)}
    assert len(digests) == 2


@each_row(
    ("changes", "message"),
    [
        (
            {"objective.name": "dspo", "objective.beta": None},
            r"config\.reference\.draws = 2: 'dspo' reads the reference's pred",
        ),
        ({"objective.name": "diffusion_dpo_l2"}, "'diffusion_dpo_l2' reads the reference's predictions"),
        ({"objective.name": "sft", "objective.beta": None}, "'sft' reads .* or no reference"),
        ({"objective.anchor_weight": 0.5}, r"config\.objective\.anchor_weight = 0\.5 reads"),
        ({"reference.every": 5}, r"reference that moves .*config\.reference\.every = 5"),
        (
            {"lora.rank": 2, "lora.dropout": 0.1},
            r"repeat what is dropped, too \(config\.lora\.dropout = 0\.1",
        ),
        ({"data.weights": (1.0,)}, r"epochs in which every example comes once, .*config\.data\.weights"),
        ({"reference.draws": -1}, r"config\.reference\.draws = -1"),
    ],
)
def test_refusals(changes, message, shallow_model, tiny_pairs):
    with pytest.raises(UserError, match=message):
        prepare(make_config(shallow_model, tiny_pairs, CHANGES | changes))


def test_a_run_too_short_to_save_time_is_warned_of(shallow_model, tiny_pairs):
    for steps, warned in ((3, True), (4, False)):
        experiment = prepare(make_config(shallow_model, tiny_pairs, CHANGES | {"steps": steps}))
        state, reference = start_state(experiment.task, experiment.mesh, abstract=True)
        said = [line for line in describe_run(experiment, state, reference) if "draws" in line]
        assert said[0] == (
            "each example has 2 draws of noise, which come round; the reference's errors of all 48 are "
            "stored before the first step"
        )
        assert [line.startswith("warning: config.reference.draws = 2: ") for line in said[1:]] == [
            True
        ] * warned
