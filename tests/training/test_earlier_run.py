"""A run that an earlier version began is resumed, with its checkpoint, its shards and the same numbers."""

import json
import tarfile
from pathlib import Path

import pytest
from tiny_model import write_model
from tiny_run import make_config, make_shallow, read_reproducible

from dspo_jax.training.run import train

# Of version 0.1, before the training loop was given what it uses: the workdir `stopped` after 4 of 8 steps of
# DSPO on the `pairs` beside it, and the metrics of the same run undisturbed.
EARLIER = Path(__file__).parents[1] / "golden" / "earlier_run.tar.xz"


@pytest.mark.ci
def test_a_run_of_an_earlier_version_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    with tarfile.open(EARLIER) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # the run names its model and data by relative paths
    make_shallow(write_model(Path("tiny")))
    begun = json.loads(Path("stopped/config.json").read_text())
    config = make_config(Path("tiny"), Path("pairs"))
    config.update(begun)
    config.steps = 8
    assert train(config, Path("stopped")).step == 8
    whole = tmp_path / "whole"
    whole.mkdir()
    (tmp_path / "metrics_of_the_whole_run.jsonl").rename(whole / "metrics.jsonl")
    expected = read_reproducible(whole)
    # Step 4 was the last of the run as it was begun, and so was validated.
    records = [each for each in read_reproducible(Path("stopped")) if each["step"] != 4 or "loss" in each]
    assert len(records) == len(expected) == 8 + 4  # a line a step, and validations at 0, 3, 6 and 8
    # Between versions of JAX and kinds of CPU the last digits differ, of numbers of order 1.
    for record, of_whole in zip(records, expected, strict=True):
        record.pop("validation/num_pairs", None)  # not counted then
        assert record == pytest.approx(of_whole, rel=2e-5, abs=1e-6)
