"""The validation scalars against NumPy, and that they do not depend on how the split is batched."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import random_params, write_pairs
from tiny_run import make_config

from dspo_jax.data.datasets import read_datasets
from dspo_jax.errors import UserError
from dspo_jax.monitoring.metrics import read_validations
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.schedules.rectified_flow import RectifiedFlow
from dspo_jax.schedules.variance_preserving import Schedule
from dspo_jax.training.run import train
from dspo_jax.training.validation import Validator, exhausted, judge, score
from dspo_jax.training.validation_scalars import (
    binomial_interval,
    format_accuracy,
    summarise,
    summarise_labelled,
)
from dspo_jax.training.watch_settings import ValidationSettings
from dspo_jax.weights.components import write_params

SCHEDULE = Schedule.scaled_linear()


INPUTS = ("tokens", "micro_conditioning")


def linear(params, noisy, timesteps, batch):
    """A network of one weight whose answer depends on everything it is given."""
    captions, sizes = batch["tokens"].sum((1, 2))[:, None], batch["micro_conditioning"].sum(2)
    shift = jnp.sin(timesteps + captions + sizes)[..., None, None, None]
    return params["w"] * noisy + shift


@pytest.fixture
def make_validator(tiny_pairs):
    def make(
        predict=linear,
        *,
        path=tiny_pairs,
        devices=1,
        batch_size=6,
        draws=3,
        split="validation",
        process=SCHEDULE,
    ):
        mesh = make_mesh({"data": devices}, jax.devices()[:devices])
        settings = ValidationSettings(every=1, split=split, batch_size=batch_size, draws=draws, patience=0)
        return Validator(predict, process, mesh, read_datasets(path), settings, inputs=INPUTS)

    return make


def test_a_policy_that_is_the_reference_has_margin_0_and_accuracy_one_half(make_validator):
    weights = {"w": jnp.float32(0.7)}
    scores = make_validator()(weights, weights)
    assert scores["winner_error"] > 0
    assert scores["loser_error"] > 0
    # Timesteps are the midpoints of three bins of 1000.
    for bin_ in ("", "_t166", "_t500", "_t833"):
        assert {scores[name + bin_] for name in ("winner_drift", "loser_drift", "margin")} == {0.0}
        assert scores["implicit_accuracy" + bin_] == 0.5


def test_a_policy_that_improves_on_winners_only_is_always_right(make_validator):
    def predict(params, noisy, timesteps, batch):
        return jnp.full(noisy.shape, 10.0).at[:, 0].set(params["winner"])

    scores = make_validator(predict)({"winner": jnp.float32(0)}, {"winner": jnp.float32(10)})
    assert scores["implicit_accuracy"] == 1
    assert scores["implicit_accuracy_low"] == pytest.approx(0.60966, abs=1e-5)  # Wilson's for 6 of 6
    assert scores["implicit_accuracy_high"] == pytest.approx(1)
    assert scores["loser_drift"] == 0
    assert scores["margin"] == pytest.approx(-scores["winner_drift"])
    assert scores["margin"] > 50


@pytest.mark.ci
@pytest.mark.parametrize(("devices", "batch_size"), [(1, 4), (1, 1), (2, 4), (4, 8)])
def test_neither_the_batch_size_nor_the_mesh_changes_the_scores(make_validator, devices, batch_size):
    params, reference = {"w": jnp.float32(0.7)}, {"w": jnp.float32(0.6)}
    expected = make_validator(batch_size=6)(params, reference)
    actual = make_validator(devices=devices, batch_size=batch_size)(params, reference)
    assert actual == pytest.approx(expected, rel=1e-6)


def test_images_of_two_sizes_are_judged_alike_for_any_batch_size(make_validator, tiny_model, tmp_path):
    params, reference = {"w": jnp.float32(0.7)}, {"w": jnp.float32(0.6)}
    tall = write_pairs(tmp_path / "tall", tiny_model, validation=5, buckets=("16x16", "8x32"))
    validator = make_validator(path=tall, batch_size=4)
    assert validator.num_examples == 10
    expected = make_validator(path=tall, batch_size=5)(params, reference)
    assert validator(params, reference) == pytest.approx(expected, rel=1e-6)


def test_every_call_draws_the_same_noise(make_validator):
    validator = make_validator()
    params, reference = {"w": jnp.float32(0.7)}, {"w": jnp.float32(0.6)}
    first = validator(params, reference)
    assert validator(params, reference) == first
    assert validator({"w": jnp.float32(0.8)}, reference) != first


def test_single_images_have_errors_and_no_margin(make_validator, tiny_model, tmp_path):
    params, reference = {"w": jnp.float32(0.7)}, {"w": jnp.float32(0.6)}
    singles = write_pairs(tmp_path / "singles", tiny_model, images=1)
    scores = make_validator(path=singles)(params, reference)
    assert set(scores) == {
        "winner_error",
        *(f"winner_drift{bin_}" for bin_ in ("", "_t166", "_t500", "_t833")),
    }


def test_without_a_reference_there_are_only_errors(make_validator):
    scores = make_validator()({"w": jnp.float32(0.7)}, None)
    assert set(scores) == {
        f"{image}_error{bin_}" for image in ("winner", "loser") for bin_ in ("", "_t166", "_t500", "_t833")
    }


def test_levels_of_rectified_flow_are_midpoints_between_image_and_noise(make_validator):
    """x_sigma / sigma differs from eps - x_0 by x_0 / sigma, whatever the noise."""

    def predict(params, noisy, levels, batch):
        return params["w"] * noisy / levels[..., None, None, None]

    scores = make_validator(predict, process=RectifiedFlow())({"w": jnp.float32(1)}, None)
    for image in ("winner", "loser"):
        errors = [scores[f"{image}_error_t{bin_}"] for bin_ in (166, 500, 833)]
        squares = np.array(errors) * np.array([1 / 6, 1 / 2, 5 / 6]) ** 2
        np.testing.assert_allclose(squares, squares[0], rtol=1e-4)
        assert squares[0] > 0


def test_summary_of_pairs_by_hand():
    # Two draws, three examples, (winner, loser).
    error = np.array([[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]], np.float32)
    drift = np.array([[[-1, 1], [2, -1], [0, 0]], [[-3, 0], [1, 2], [0, 0]]], np.float32)
    # Margins, loser minus winner: [2, -3, 0] at t = 250 and [3, 1, 0] at t = 750; means [2.5, -1, 0].
    scores = summarise(np.stack([error, drift]), np.array([250, 750]))
    low, high = scores.pop("implicit_accuracy_low"), scores.pop("implicit_accuracy_high")
    assert scores == pytest.approx(
        {
            "winner_error": 6,
            "loser_error": 7,
            "winner_drift": -1 / 6,
            "loser_drift": 1 / 3,
            "margin": 0.5,
            "implicit_accuracy": 0.5,  # right, wrong, tie
            "num_pairs": 3,
            "winner_drift_t250": 1 / 3,
            "loser_drift_t250": 0,
            "margin_t250": -1 / 3,
            "implicit_accuracy_t250": 0.5,
            "winner_drift_t750": -2 / 3,
            "loser_drift_t750": 2 / 3,
            "margin_t750": 4 / 3,
            "implicit_accuracy_t750": 5 / 6,
        }
    )
    # Wilson's for 1.5 of 3: centre 1/2, half width z / (2 sqrt(n + z^2)).
    assert (low, high) == pytest.approx((0.5 - 0.37467, 0.5 + 0.37467), abs=1e-5)


def test_summary_of_lists_by_hand():
    error = np.array([[[1, 2, 3], [4, 5, 6]]], float)
    drift = np.array([[[-1, 0, -2], [3, 1, 2]]], float)
    # By score: the second, the first, the third; and the third before two equal ones.
    scores = np.array([[2, 3, 1], [0, 0, 5]], np.float32)
    found = summarise(np.stack([error, drift]), np.array([500]), scores)
    low, high = found.pop("implicit_accuracy_low"), found.pop("implicit_accuracy_high")
    both = {
        "winner_drift": (0 + 2) / 2,
        "loser_drift": (-2 + 3) / 2,
        "margin": ((-2 - 0) + (3 - 2)) / 2,
        "implicit_accuracy": (0 / 3 + 1 / 2) / 2,  # rewards 1 0 2, all wrong; -3 -1 -2, one of two right
    }
    at_500 = {f"{name}_t500": value for name, value in both.items()}
    expected = {**both, **at_500, "winner_error": (2 + 6) / 2, "loser_error": (3 + 4) / 2, "num_lists": 2}
    assert found == pytest.approx(expected)
    assert (low, high) == binomial_interval(0.5, 2)
    assert summarise(np.stack([error, drift]), np.array([500]), np.zeros((2, 3)))["implicit_accuracy"] == 0.5


def test_summary_of_labelled_images_by_hand():
    """Against every pair of images, in float64."""
    draw = np.random.default_rng(3)
    error, drift = draw.standard_normal((2, 2, 7))
    drift[:, 4] = drift[:, 1]  # a tie
    liked = np.array([1, 1, 0, 0.25, 0, 0.75, 1])
    scores = summarise_labelled(np.stack([error, drift]), np.array([250, 750]), liked.astype(np.float32))

    def share(drifts):
        right = total = 0.0
        for i in range(7):
            for j in range(7):
                weight = liked[i] * (1 - liked[j]) * (i != j)
                total += weight
                right += weight * (0.5 if drifts[i] == drifts[j] else float(drifts[i] < drifts[j]))
        return right / total

    expected = {"num_images": 7}
    for end, errors, drifts in (
        ("", error.mean(0), drift.mean(0)),
        ("_t250", None, drift[0]),
        ("_t750", None, drift[1]),
    ):
        means = {
            name: np.average(drifts, weights=weights)
            for name, weights in (("winner", liked), ("loser", 1 - liked))
        }
        expected |= {f"{name}_drift{end}": mean for name, mean in means.items()}
        expected[f"margin{end}"] = means["loser"] - means["winner"]
        expected[f"implicit_accuracy{end}"] = share(drifts)
        if errors is not None:
            expected["winner_error"] = np.average(errors, weights=liked)
            expected["loser_error"] = np.average(errors, weights=1 - liked)
    assert scores == pytest.approx(expected)
    drift[0, 0] = np.nan  # liked, so that all its pairs are wrong
    found = summarise_labelled(np.stack([error, drift]), np.array([250, 750]), liked)
    assert found["implicit_accuracy"] < scores["implicit_accuracy"]
    assert score(found) == found["implicit_accuracy"]
    assert format_accuracy(scores) == f"{scores['implicit_accuracy']:.3f} of 7 images"


def test_a_margin_that_is_no_number_is_wrong():
    values = np.ones((2, 1, 4, 2), np.float32)
    values[1, 0, :, 0] = [0, np.nan, np.nan, 0]
    scores = summarise(values, np.array([500]))
    assert (scores["implicit_accuracy"], scores["implicit_accuracy_t500"]) == (0.5, 0.5)
    assert 0 < scores["implicit_accuracy_low"] < 0.5 < scores["implicit_accuracy_high"] < 1


def test_summary_without_a_reference_by_hand():
    error = np.array([[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]], np.float32)
    assert summarise(error[None], np.array([250, 750])) == {
        "winner_error": 6,
        "loser_error": 7,
        "winner_error_t250": 3,
        "loser_error_t250": 4,
        "winner_error_t750": 9,
        "loser_error_t750": 10,
    }


def test_a_split_that_is_not_there_is_refused(make_validator):
    with pytest.raises(UserError, match=r"split = 'valid': unknown; did you mean 'validation'\?"):
        make_validator(split="valid")


@pytest.mark.ci
def test_the_command_finds_what_the_run_found(shallow_model, tiny_pairs, tmp_path):
    changes = {"steps": 3, "validation.every": 3, "validation.draws": 2, "optimizer.learning_rate": 1e-2}
    train(make_config(shallow_model, tiny_pairs, changes), tmp_path / "run")
    expected = read_validations(tmp_path / "run" / "metrics.jsonl")[3]
    options = {"split": "validation", "draws": 2, "batch_size": 4, "compute_dtype": "float32"}
    scores = judge(tmp_path / "run", None, tiny_pairs, **options)
    assert abs(scores["margin"]) > 1e-4
    assert {name: expected[name] for name in scores} == pytest.approx(scores, rel=1e-3, abs=1e-6)

    # The other way round every reward has the other sign; a folder does not say what it was trained from.
    back = judge(shallow_model, tmp_path / "run", tiny_pairs, **options)
    assert back["margin"] == pytest.approx(-scores["margin"], rel=1e-3)
    with pytest.raises(ValueError, match="no training workdir; give --reference"):
        judge(shallow_model, None, tiny_pairs, **options)


def test_a_folder_is_judged_by_the_layer_that_it_was_trained_for(tiny_model, tmp_path):
    """An exported run has no record of it."""
    other = shutil.copytree(tiny_model, tmp_path / "other")
    encoder = load_pipeline(other).networks["text_encoder"]
    write_params(other / "text_encoder", encoder, random_params(encoder, np.random.default_rng(3)))
    pairs = write_pairs(tmp_path / "pairs", tiny_model, validation=4)
    options = {"split": "validation", "draws": 1, "batch_size": 4, "compute_dtype": "float32"}
    by_default, last, before = (
        judge(other, tiny_model, pairs, **options, text=text)["margin"]
        for text in (None, {"max_chunks": None, "clip_skip": 1}, {"clip_skip": 2})
    )
    assert by_default == last != before
    with pytest.raises(UserError, match=r"clip_skip = 9: must be from 1"):
        judge(other, tiny_model, pairs, **options, text={"clip_skip": 9})


def test_the_command_names_the_flag_of_a_split_that_is_not_there(shallow_model, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", shallow_model, train=2, validation=None)
    options = {"draws": 1, "batch_size": 4, "compute_dtype": "float32"}
    with pytest.raises(
        ValueError, match=r"pairs: --split = 'validation': unknown \(allowed: train\); choose"
    ):
        judge(shallow_model, shallow_model, pairs, split="validation", **options)


def test_the_command_refuses_single_images_and_another_model(shallow_model, tiny_model, tmp_path):
    options = {"split": "validation", "draws": 1, "batch_size": 4, "compute_dtype": "float32"}
    singles = write_pairs(tmp_path / "singles", shallow_model, validation=2, images=1)
    with pytest.raises(ValueError, match=r"singles: holds single images; implicit accuracy is of pairs"):
        judge(shallow_model, shallow_model, singles, **options)
    pairs = write_pairs(tmp_path / "pairs", shallow_model, validation=2)
    with pytest.raises(ValueError, match="its denoiser is another one than that of"):
        judge(shallow_model, tiny_model, pairs, **options)


def test_of_equal_accuracies_the_higher_margin_is_better_and_no_more_than_that():
    pairs = 10_000

    def of(accuracy, margin):
        return score({"implicit_accuracy": accuracy, "winner_error": 1.0, "margin": margin})

    rising = [of(0.5, -math.inf), of(0.5, 1e-6), of(0.5, 2e-6), of(0.5, 1e3), of(0.5 + 0.5 / pairs, -1e3)]
    assert rising[1:] == sorted(set(rising[1:]))
    assert of(0.5, math.nan) == rising[0] == 0.5
    assert not exhausted({0: of(0.5, 0.0), 10: of(0.75, 1e-4), 20: of(0.75, 1.01e-4)}, 1)
    assert exhausted({0: of(0.5, 0.0), 10: of(0.75, 1e-4), 20: of(0.75, 1e-4)}, 1)
    assert score({"winner_error": 0.25}) == -0.25


def test_a_run_is_exhausted_where_the_last_validations_bettered_nothing():
    scores = {0: 0.5, 10: 0.6, 20: 0.6, 30: 0.55}
    found = [exhausted(scores, patience) for patience in (-1, 0, 1, 2, 3, 4)]
    assert found == [False, False, True, True, False, False]
    assert exhausted({0: -0.1, 10: math.nan, 20: math.nan}, 2)
    assert not exhausted({0: math.nan, 10: -0.1}, 1)
