"""Losses against NumPy in float64 and finite differences, and the properties that each must have."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import objectives_numpy
import pytest
from objective_cases import CASES, OBJECTIVES, SHAPE, STRONG, WITH_REWARD, as_predictions, make_arrays
from tables import each_row

from dspo_jax.objectives import Predictions, get_objective
from dspo_jax.schedules.variance_preserving import Schedule

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
LN2 = np.float32(np.log(2))
VARIANTS = [
    (case, *options)
    for case, *options in itertools.product(
        CASES, ("mean", "sum"), ("none", "paper"), ("epsilon", "v_prediction")
    )
    # Min-SNR is a time weight of its own; without one the kind of prediction changes nothing.
    if ("paper" not in options if case.endswith("min_snr") else options[1:] != ["none", "v_prediction"])
]


@pytest.fixture(scope="module")
def arrays():
    return make_arrays()


def with_defaults(name, given, **options):
    """The hyperparameters in full, DSPO's two scales resolved: what the NumPy version takes."""
    filled = get_objective(name, **given, **options).hyperparameters
    if "lam" in filled:
        lam, gamma = filled["lam"], filled["gamma"]
        derived = {"reward_scale": lam, "score_weight": lam * gamma}
        filled = filled | {key: value for key, value in derived.items() if filled.get(key, 0) is None}
    return filled


@each_row(("case", "reduction", "time_weight", "prediction_type"), VARIANTS)
def test_matches_numpy_in_float64(case, reduction, time_weight, prediction_type, arrays):
    name, given = CASES[case]
    options = {"reduction": reduction, "time_weight": time_weight}
    schedule = Schedule.scaled_linear(prediction_type=prediction_type)
    loss, metrics = get_objective(name, **given, **options)(as_predictions(arrays), schedule)
    expected_loss, expected_metrics = objectives_numpy.evaluate(
        name, arrays, BETAS, prediction_type, **with_defaults(name, given, **options)
    )
    # The absolute part is for (1 - sigmoid z)^2 of a pair that is ranked rightly, where float32 rounds z.
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-4, atol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for key, expected in expected_metrics.items():
        assert metrics[key].shape == (SHAPE[0],)
        assert metrics[key].dtype == jnp.float32
        np.testing.assert_allclose(metrics[key], expected, rtol=2e-4, atol=1e-6, err_msg=key)


@pytest.mark.ci
@each_row(("case", "reduction", "time_weight", "prediction_type"), VARIANTS)
def test_gradient_matches_finite_differences(case, reduction, time_weight, prediction_type, arrays):
    name, given = CASES[case]
    options = {"reduction": reduction, "time_weight": time_weight}
    schedule = Schedule.scaled_linear(prediction_type=prediction_type)
    objective = get_objective(name, **given, **options)
    predictions = as_predictions(arrays)
    cotangent = np.array([1.0, -2.0, 0.5, 3.0], np.float32)  # tells the examples apart

    def weighted_loss(policy):
        return objective(dataclasses.replace(predictions, policy=policy), schedule)[0] @ cotangent

    hyperparameters = with_defaults(name, given, **options)

    def loss_float64(policy):
        moved = arrays | {"policy": policy}
        return objectives_numpy.evaluate(
            name, moved, BETAS, prediction_type, held=arrays["policy"], **hyperparameters
        )[0]

    gradient = np.asarray(jax.grad(weighted_loss)(predictions.policy), np.float64)
    scale = np.sqrt((gradient**2).sum((1, 2, 3, 4)))
    scale = np.maximum(scale, 1e-3 * scale.max())  # a label of 1/2 leaves some objectives without gradient
    for direction in np.random.default_rng(1).normal(size=(3, *SHAPE)):
        ahead, behind = (loss_float64(arrays["policy"] + sign * 1e-5 * direction) for sign in (1, -1))
        expected = cotangent * (ahead - behind) / 2e-5
        actual = (gradient * direction).sum((1, 2, 3, 4))
        if name == "diffusion_rpo":  # an example has a part in the losses of the others
            expected, actual = expected.sum(keepdims=True), actual.sum(keepdims=True)
        np.testing.assert_allclose(actual / scale, expected / scale, rtol=2e-3, atol=1e-3)


@pytest.fixture(scope="module", params=[jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def at_the_reference(request):
    """Step 0: the policy predicts what the reference predicts, at a latent's size."""
    rng = np.random.default_rng(3)
    policy, target = (jnp.asarray(rng.normal(size=(3, 2, 16, 16, 4)), request.param) for _ in range(2))
    timesteps = jnp.array([[0, 0], [500, 20], [999, 999]])
    captions = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    return Predictions(policy, policy, target, timesteps, jnp.array([1.0, 0.8, 0.5]), captions=captions)


@pytest.mark.parametrize("time_weight", ["none", "paper"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
class TestStep0:
    def test_diffusion_dpo_is_exactly_ln2(self, reduction, time_weight, at_the_reference):
        objective = get_objective("diffusion_dpo", reduction=reduction, time_weight=time_weight)
        loss, metrics = jax.jit(objective)(at_the_reference, Schedule.scaled_linear())
        assert loss.dtype == jnp.float32
        np.testing.assert_array_equal(loss, np.full(3, LN2))
        np.testing.assert_array_equal(metrics["implicit_accuracy"], np.full(3, 0.5, np.float32))
        for key in ("margin", "winner_drift", "loser_drift", "deviation"):
            np.testing.assert_array_equal(metrics[key], np.zeros(3, np.float32))

    @pytest.mark.parametrize("name", ["dspo", "dspo_e"])
    def test_dspo_is_exactly_sft(self, reduction, time_weight, at_the_reference, name):
        options = {"reduction": reduction, "time_weight": time_weight}
        objectives = get_objective(name, lam=0.5, **options), get_objective("sft", **options)
        dspo, sft = (jax.jit(o)(at_the_reference, Schedule.scaled_linear())[0] for o in objectives)
        assert dspo.dtype == jnp.float32
        np.testing.assert_array_equal(dspo, sft)

    @pytest.mark.parametrize("name", ["dspo_ref", "diffusion_dpo_l2"])
    def test_there_is_no_gradient(self, reduction, time_weight, at_the_reference, name):
        objective = get_objective(name, reduction=reduction, time_weight=time_weight, **STRONG[name])

        def total(policy):
            predictions = dataclasses.replace(at_the_reference, policy=policy)
            loss, _ = objective(predictions, Schedule.scaled_linear())
            return loss.sum(), loss

        gradient, loss = jax.jit(jax.grad(total, has_aux=True))(at_the_reference.policy)
        np.testing.assert_array_equal(gradient.astype(jnp.float32), np.zeros(gradient.shape))
        np.testing.assert_array_equal(loss, np.full(3, 0 if name == "dspo_ref" else LN2))


@each_row(
    ("name", "given", "expected"),
    [
        ("sdpo", {}, [LN2, LN2, LN2]),
        ("ipo", {"beta": 0.8}, [0.625**2] * 3),
        ("kto", {}, [0.5, 0.5, 0.5]),
        # With p = 1, 0.8 and 0.5.
        ("dspo_sdxl", {}, [0.25, 0.3**2, 0.0]),
        ("hinge", {}, [1.0, 1.0, 1.0]),
        ("linear_dpo", {}, [0.0, 0.0, 0.0]),
        ("diffusion_rpo", {}, [LN2, LN2, LN2]),
        ("npo", {}, [LN2, LN2, LN2]),
        # p = 1/2, and so a = 1/2.
        ("alpha_dpo", {"alpha": 1 - 1e-7}, [(0.75 - 0.5**0.5) / 0.25] * 3),
        ("dmpo", {"alpha": 0.1}, [-np.log(2) - np.log(0.1 * 0.9) / 2] * 3),
    ],
)
def test_value_where_the_policy_is_the_reference(name, given, expected, at_the_reference):
    loss, _ = get_objective(name, **given)(at_the_reference, Schedule.scaled_linear())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_dspo_at_the_published_lambda_is_numerically_sft(arrays):
    def gradient(name):
        def total(policy):
            predictions = dataclasses.replace(as_predictions(arrays), policy=policy, preference=None)
            return get_objective(name)(predictions, Schedule.scaled_linear())[0].sum()

        return np.asarray(jax.grad(total)(as_predictions(arrays).policy), np.float64)

    dspo, sft = gradient("dspo"), gradient("sft")
    difference = np.linalg.norm(dspo - sft) / np.linalg.norm(sft)
    assert 1e-4 < difference < 1e-3
    assert np.vdot(dspo, sft) / np.linalg.norm(dspo) / np.linalg.norm(sft) > 1 - 1e-6


@each_row("time_weight", ["none", "paper"])
@each_row("name", WITH_REWARD)
def test_swapping_winner_and_loser_flips_the_margin(name, time_weight, arrays):
    objective = get_objective(name, time_weight=time_weight, **STRONG[name])
    schedule = Schedule.scaled_linear()
    swapped = {key: value[:, ::-1] if value.ndim > 1 else value for key, value in arrays.items()}
    _, one = objective(as_predictions(arrays), schedule)
    _, other = objective(as_predictions(swapped), schedule)
    assert np.all(np.asarray(one["margin"]) != 0)
    np.testing.assert_allclose(other["margin"], -one["margin"], rtol=1e-6)
    np.testing.assert_array_equal(other["implicit_accuracy"], 1 - one["implicit_accuracy"])
    for key in ("error", "drift"):
        np.testing.assert_allclose(other[f"winner_{key}"], one[f"loser_{key}"], rtol=1e-6)
    np.testing.assert_allclose(other["deviation"], one["deviation"], rtol=1e-6)


@each_row("name", OBJECTIVES)
def test_permuting_the_batch_permutes_losses_and_metrics(name, arrays):
    objective = get_objective(name, time_weight="paper", **STRONG[name])
    schedule = Schedule.scaled_linear()
    order = np.array([2, 0, 3, 1])
    loss, metrics = objective(as_predictions(arrays), schedule)
    permuted_loss, permuted = objective(
        as_predictions({key: a[order] for key, a in arrays.items()}), schedule
    )
    assert np.unique(loss).size == SHAPE[0]
    np.testing.assert_allclose(permuted_loss, loss[order], rtol=1e-5)
    for key, value in metrics.items():
        np.testing.assert_allclose(permuted[key], value[order], rtol=1e-5, err_msg=key)


def test_margin_keeps_its_precision_for_a_policy_that_has_barely_moved():
    """Subtracting two squared errors in float32 would leave a quarter of this margin to rounding."""
    rng = np.random.default_rng(0)
    reference, target, noise = rng.normal(size=(3, 2, 2, 32, 32, 4)).astype(np.float32)
    policy = reference + np.float32(1e-5) * noise
    arrays = [jnp.asarray(array) for array in (policy, reference, target)]
    predictions = Predictions(arrays[0], arrays[1], arrays[2], jnp.array([500, 500]))
    _, metrics = get_objective("diffusion_dpo")(predictions, Schedule.scaled_linear())
    squares = [((a.astype(np.float64) - target) ** 2).mean((2, 3, 4)) for a in (policy, reference)]
    drift = squares[0] - squares[1]
    np.testing.assert_allclose(metrics["margin"], -2500 * (drift[:, 0] - drift[:, 1]), rtol=1e-3)


@each_row("name", OBJECTIVES)
@each_row("dtype", [jnp.bfloat16, jnp.float16])
def test_computes_in_float32_whatever_the_inputs(name, dtype, arrays):
    low = as_predictions(arrays, dtype)
    objective, schedule = get_objective(name), Schedule.scaled_linear()
    cast = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == dtype else a, low)
    for result, expected in zip(
        jax.tree.leaves(objective(low, schedule)), jax.tree.leaves(objective(cast, schedule)), strict=True
    ):
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, expected)


@each_row("name", OBJECTIVES)
def test_no_gradient_into_reference_or_target(name, arrays):
    predictions = as_predictions(arrays)

    def total(reference, target):
        given = dataclasses.replace(predictions, reference=reference, target=target)
        loss, metrics = get_objective(name)(given, Schedule.scaled_linear())
        return loss.sum() + metrics["winner_drift"].sum()

    for gradient in jax.grad(total, (0, 1))(predictions.reference, predictions.target):
        np.testing.assert_array_equal(gradient, np.zeros(SHAPE))


def test_one_timestep_per_pair_is_the_same_timestep_for_both(arrays):
    schedule = Schedule.scaled_linear()
    for name in OBJECTIVES:
        objective = get_objective(name, time_weight="paper")
        shared = arrays["timesteps"][:, 0]
        one = objective(as_predictions(arrays | {"timesteps": shared}), schedule)
        two = objective(as_predictions(arrays | {"timesteps": np.stack([shared, shared], 1)}), schedule)
        jax.tree.map(np.testing.assert_array_equal, one, two)


@each_row("name", WITH_REWARD)
def test_no_preference_means_certainty(name, arrays):
    certain = as_predictions(arrays | {"preference": np.ones(SHAPE[0])})
    objective, schedule = get_objective(name, **STRONG[name]), Schedule.scaled_linear()
    unlabelled = dataclasses.replace(certain, preference=None)
    np.testing.assert_array_equal(objective(certain, schedule)[0], objective(unlabelled, schedule)[0])


def test_metrics_are_those_that_the_data_allow(arrays):
    schedule, pairs = Schedule.scaled_linear(), as_predictions(arrays)
    winners = as_predictions({k: a[:, :1] if a.ndim > 1 else a for k, a in arrays.items()})
    pair_metrics = {"winner_error", "loser_error"}
    drifts = {"winner_drift", "loser_drift", "deviation", "margin", "implicit_accuracy"}
    for name in ("ddpm", "sft"):
        objective = get_objective(name)

        def keys(predictions, objective=objective):
            return set(objective(predictions, schedule)[1])

        assert keys(pairs) == pair_metrics | drifts
        assert keys(dataclasses.replace(pairs, reference=None)) == pair_metrics
        assert keys(winners) == {"winner_error", "winner_drift", "deviation"}
        assert keys(dataclasses.replace(winners, reference=None)) == {"winner_error"}
    own = {"kto": {"baseline"}, "sdpo": {"loser_scale"}, "alpha_dpo": {"order"}}
    own |= {"diffusion_rpo": {"own_weight"}}
    for name in WITH_REWARD:
        assert set(get_objective(name)(pairs, schedule)[1]) == pair_metrics | drifts | own.get(name, set())
    alone = dataclasses.replace(pairs, reference=None)
    for name in ("mapo", "orpo"):
        assert set(get_objective(name)(alone, schedule)[1]) == pair_metrics | {"margin", "implicit_accuracy"}


@each_row("reduction", ["mean", "sum"])
@each_row("name", WITH_REWARD)
def test_a_stored_error_of_the_reference_stands_for_its_output(name, reduction, arrays):
    objective, schedule = get_objective(name, **STRONG[name], reduction=reduction), Schedule.scaled_linear()
    predictions = as_predictions(arrays)
    if not objective.compares_errors:
        return
    errors = np.square(arrays["reference"] - arrays["target"]).mean((2, 3, 4))
    stored = dataclasses.replace(
        predictions, reference=None, reference_error=jnp.asarray(errors, jnp.float32)
    )

    def total(policy, predictions):
        loss, metrics = objective(dataclasses.replace(predictions, policy=policy), schedule)
        return loss.sum(), (loss, metrics)

    evaluate = jax.grad(total, has_aux=True)
    gradient, (loss, metrics) = evaluate(predictions.policy, stored)
    expected_gradient, (expected, expected_metrics) = evaluate(predictions.policy, predictions)
    del expected_metrics["deviation"]
    assert metrics.keys() == expected_metrics.keys()
    for found, wanted in ((loss, expected), (gradient, expected_gradient)):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=2e-5, atol=2e-5, err_msg=key)


def test_which_objectives_compare_errors():
    found = {name for name in OBJECTIVES if get_objective(name).compares_errors}
    assert found == {
        *("diffusion_dpo", "sdpo", "ipo", "dmpo", "alpha_dpo", "hinge", "linear_dpo", "diffusion_rpo", "npo")
    }
    assert not get_objective("diffusion_dpo", anchor_weight=0.1).compares_errors


def test_diffusion_rpo_between_diffusion_dpo_and_equal_weights(arrays):
    """Alone, or where no other prompt is near, a pair is compared with itself only."""
    schedule, given = Schedule.scaled_linear(), {"beta": 3.0}
    pairs = as_predictions(arrays)
    dpo, _ = get_objective("diffusion_dpo", **given)(pairs, schedule)
    alone = jax.tree.map(lambda array: array[1:2], pairs)
    loss, _ = get_objective("diffusion_rpo", **given)(alone, schedule)
    np.testing.assert_allclose(loss, dpo[1:2], rtol=1e-6)
    far, metrics = get_objective("diffusion_rpo", temperature=1e-3, **given)(pairs, schedule)
    np.testing.assert_allclose(far, (dpo + 3 * LN2) / 4, rtol=1e-5)
    np.testing.assert_allclose(metrics["own_weight"], np.ones(4), rtol=1e-6)
    # As long as one another or not: it is the direction that counts.
    alike = dataclasses.replace(pairs, captions=jnp.arange(1.0, 5.0)[:, None] * jnp.ones((4, 5)))
    _, metrics = get_objective("diffusion_rpo", **given)(alike, schedule)
    np.testing.assert_allclose(metrics["own_weight"], np.full(4, 0.25), rtol=1e-6)


def test_single_images(arrays):
    schedule, pairs = Schedule.scaled_linear(), as_predictions(arrays)
    winners, losers = (
        as_predictions({k: a[:, i : i + 1] if a.ndim > 1 else a for k, a in arrays.items()}) for i in (0, 1)
    )
    ddpm, sft = get_objective("ddpm"), get_objective("sft")
    np.testing.assert_array_equal(sft(pairs, schedule)[0], sft(winners, schedule)[0])
    np.testing.assert_allclose(ddpm(winners, schedule)[0], sft(winners, schedule)[0], rtol=1e-6)
    halves = (ddpm(winners, schedule)[0] + ddpm(losers, schedule)[0]) / 2
    np.testing.assert_allclose(ddpm(pairs, schedule)[0], halves, rtol=1e-6)


@each_row("time_weight", ["none", "paper"])
def test_kto_on_single_images_matches_numpy(time_weight, arrays):
    """Where the preference is the probability that the image is liked."""
    single = {k: a[:, :1] if a.ndim > 1 else a for k, a in arrays.items()}
    single["preference"] = np.array([1.0, 0.0, 0.3, 0.8])
    options = {"beta": 1.5, "reduction": "mean", "time_weight": time_weight}
    loss, metrics = get_objective("kto", **options)(as_predictions(single), Schedule.scaled_linear())
    expected_loss, expected = objectives_numpy.evaluate("kto", single, BETAS, "epsilon", **options)
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-4)
    assert metrics.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(metrics[key], values, rtol=2e-4, atol=1e-6, err_msg=key)
