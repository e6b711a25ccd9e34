"""Runs on several datasets and on images of several sizes: the step, held-out pairs, refusals."""

import dataclasses
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tiny_model import write_model, write_pairs
from tiny_run import make_config

from dspo_jax.conversion.model_card import make_card
from dspo_jax.data.datasets import read_datasets
from dspo_jax.monitoring.metrics import read_metrics
from dspo_jax.training.dry_run import dry_run
from dspo_jax.training.run import train
from dspo_jax.training.sample_grids import first_captions
from dspo_jax.training.step import compile_step

BUCKETS = ("16x16", "8x32")
SHAPES = {(8, 2, 4, 4, 8), (8, 2, 2, 8, 8)}


@pytest.fixture(scope="module")
def tall(tmp_path_factory, tiny_model) -> Path:
    """12 training and 5 validation pairs of each of two image sizes."""
    return write_pairs(
        tmp_path_factory.mktemp("tall") / "tall", tiny_model, train=12, validation=5, buckets=BUCKETS
    )


@pytest.mark.slow
def test_a_run_reads_all_of_its_datasets_and_image_sizes(shallow_model, tiny_pairs, tall, tmp_path):
    shapes = []

    def make_step(state):
        step = compile_step(state)

        def note(state, reference, batch, key):
            shapes.append(batch["moments"].shape)
            return step(state, reference, batch, key)

        return note

    watched = {"validation.every": 4, "validation.batch_size": 8, "validation.draws": 2}
    config = make_config(shallow_model, f"{tiny_pairs},{tall}", {**watched, "steps": 4})
    assert train(config, tmp_path / "run", make_step=make_step).step == 4
    # 36 of the 48 examples are square.
    assert sorted(shapes) == [(8, 2, 2, 8, 8)] + 3 * [(8, 2, 4, 4, 8)]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert np.isfinite([record["loss"] for record in records if "loss" in record]).all()
    validated = {r["step"]: r for r in records if "validation/implicit_accuracy" in r}
    assert sorted(validated) == [0, 4]
    assert validated[0]["validation/implicit_accuracy"] == 0.5  # nothing is decided yet, at either size
    # Wilson's interval at one half has the half width z / (2 sqrt(n + z^2)): all 16 held-out pairs.
    low = validated[0]["validation/implicit_accuracy_low"]
    assert low == pytest.approx(0.5 - 1.959964 / (2 * (16 + 1.959964**2) ** 0.5))
    card = make_card(tmp_path / "run", "base", shallow_model, 4)
    assert f"| name | {tiny_pairs.name} |" in card
    assert f"| name | {tall.name} |" in card


def test_compiling_for_another_image_size_is_not_training_time(shallow_model, tiny_pairs, tall, tmp_path):
    """A step that takes a second to compile, in a run whose steps take no time."""

    class Step:
        compiled: ClassVar[set[Any]] = set()

        def __call__(self, state, reference, batch, key):
            if batch["moments"].shape not in self.compiled:
                self.compiled.add(batch["moments"].shape)
                time.sleep(1)
            zero = np.float32(0)
            return dataclasses.replace(state, step=state.step + 1), {"loss": zero, "skipped_in_a_row": zero}

    config = make_config(shallow_model, f"{tiny_pairs},{tall}", {"steps": 8})
    train(config, tmp_path, make_step=lambda state: Step(), count_flops=lambda *given: None)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert Step.compiled == SHAPES
    assert all(record["pairs_per_second"] > 16 for record in records[1:])  # 8 pairs in less than half of it


def test_the_first_captions_of_two_image_sizes_are_those_of_the_first(tall):
    assert first_captions(read_datasets(tall), "validation", 3) == [f"validation {i}" for i in range(3)]


def test_a_dry_run_names_the_image_sizes_and_compiles_the_largest(shallow_model, tall):
    said = list(dry_run(make_config(shallow_model, tall)))
    assert "2 image sizes, and the step is compiled for each: 16x16 (12), 8x32 (12)" in said
    assert "batch: moments float16[8, 2, 4, 4, 8]" in said
    assert not any("holds examples twice" in line for line in said)


@pytest.mark.ci
def test_a_dry_run_warns_of_image_sizes_with_less_than_a_batch(shallow_model, tall):
    said = list(dry_run(make_config(shallow_model, tall, {"batch_size": 16})))
    assert "warning: a batch holds examples twice where a size has fewer than it: 16x16, 8x32" in said


def test_a_dry_run_names_the_share_and_the_epochs_of_each_dataset(shallow_model, tiny_pairs, tall):
    config = make_config(shallow_model, f"{tiny_pairs},{tall}", {"data.weights": (1, 3), "steps": 12})
    said = list(dry_run(config))
    assert f"of them 24 from {tiny_pairs}, 0.25 of what is drawn: 1 epochs" in said
    assert f"of them 24 from {tall}, 0.75 of what is drawn: 3 epochs" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.weights": (1.0,)}, r"config\.data\.weights = \(1\.0,\): must be 2 positive number\(s\)"),
        ({"data.weights": (1.0, -1.0)}, r"config\.data\.weights = \(1\.0, -1\.0\): must be 2 positive"),
        (
            {"data.curriculum_groups": 2},
            r"config\.data\.curriculum_groups = 2: needs a score of each image, and {pairs} has none",
        ),
        ({"data.split": "tset"}, "{pairs}: config.data.split = 'tset': unknown"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_is_refused(
    shallow_model, tiny_pairs, tall, tmp_path, changes, message
):
    config = make_config(shallow_model, f"{tiny_pairs},{tall}", changes)
    with pytest.raises(ValueError, match="^" + message.format(pairs=tiny_pairs)):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_dataset_of_another_model_is_refused(shallow_model, tiny_pairs, tmp_path):
    other = write_pairs(tmp_path / "pairs", write_model(tmp_path / "other", seed=7), train=2, validation=2)
    with pytest.raises(ValueError, match=rf"^{tiny_pairs}, {other}: model\.vae_sha256 = .* must agree"):
        train(make_config(shallow_model, f"{tiny_pairs},{other}"), tmp_path / "run")
