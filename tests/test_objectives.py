"""Losses against NumPy in float64, finite differences and torch, and the properties that each must have."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import objectives_numpy
import pytest

from dspo_jax.objectives import Predictions, get_objective
from dspo_jax.schedule import Schedule

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
SHAPE = (4, 2, 3, 2, 2)  # B, P, h, w, C
LN2 = np.float32(np.log(2))
OBJECTIVES = ("ddpm", "sft", "diffusion_dpo", "dspo")
PAIRWISE = ("diffusion_dpo", "dspo")

# Every hyperparameter with a value at which it matters: the scales put the sigmoids where they bend.
CASES = {
    "ddpm": ("ddpm", {}),
    "sft": ("sft", {}),
    "diffusion_dpo": ("diffusion_dpo", {"beta": 3.0}),
    "dspo": ("dspo", {"lam": 0.7, "gamma": 1.5}),
    "dspo-detached": ("dspo", {"lam": 0.7, "gamma": 1.5, "detach": True}),
    "dspo-scales": ("dspo", {"reward_scale": 4.0, "score_weight": 0.6}),
}
OPTIONS = list(itertools.product(("mean", "sum"), ("none", "paper"), ("epsilon", "v_prediction")))


@pytest.fixture(scope="module")
def arrays():
    """Float64 arrays whose margins take both signs, and soft labels."""
    rng = np.random.default_rng(0)
    reference, target = rng.normal(size=(2, *SHAPE))
    return {
        "policy": reference + 0.5 * rng.normal(size=SHAPE),
        "reference": reference,
        "target": target,
        "timesteps": np.array([[1, 900], [40, 60], [500, 500], [999, 0]]),
        "preference": np.array([1.0, 0.9, 0.5, 0.7]),
    }


def as_predictions(arrays, dtype=jnp.float32):
    floats = {key: jnp.asarray(arrays[key], dtype) for key in ("policy", "reference", "target")}
    preference = jnp.asarray(arrays["preference"], jnp.float32)
    return Predictions(**floats, timesteps=jnp.asarray(arrays["timesteps"]), preference=preference)


def with_defaults(name, given, **options):
    """The hyperparameters in full, DSPO's two scales resolved: what the NumPy version takes."""
    filled = get_objective(name, **given, **options).hyperparameters
    if name == "dspo":
        lam, gamma = filled["lam"], filled["gamma"]
        derived = {"reward_scale": lam, "score_weight": lam * gamma}
        filled = filled | {key: value for key, value in derived.items() if filled[key] is None}
    return filled


@pytest.mark.parametrize(("reduction", "time_weight", "prediction_type"), OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_matches_numpy_in_float64(case, reduction, time_weight, prediction_type, arrays):
    name, given = CASES[case]
    options = {"reduction": reduction, "time_weight": time_weight}
    schedule = Schedule.scaled_linear(prediction_type=prediction_type)
    loss, metrics = get_objective(name, **given, **options)(as_predictions(arrays), schedule)
    expected_loss, expected_metrics = objectives_numpy.evaluate(
        name, arrays, BETAS, prediction_type, **with_defaults(name, given, **options)
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-4)
    assert metrics.keys() == expected_metrics.keys()
    for key, expected in expected_metrics.items():
        assert metrics[key].shape == (SHAPE[0],)
        assert metrics[key].dtype == jnp.float32
        np.testing.assert_allclose(metrics[key], expected, rtol=2e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(("reduction", "time_weight", "prediction_type"), OPTIONS)
@pytest.mark.parametrize("case", CASES)
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
    gate_policy = arrays["policy"] if hyperparameters.get("detach") else None

    def loss_float64(policy):
        moved = arrays | {"policy": policy}
        return objectives_numpy.evaluate(
            name, moved, BETAS, prediction_type, gate_policy=gate_policy, **hyperparameters
        )[0]

    # One value of every example is moved at a time: the loss of an example depends on that example alone.
    expected = np.zeros(SHAPE)
    for index in np.ndindex(SHAPE[1:]):
        step = np.zeros(SHAPE)
        step[:, *index] = 1e-5
        ahead, behind = (loss_float64(arrays["policy"] + d) for d in (step, -step))
        expected[:, *index] = cotangent * (ahead - behind) / 2e-5
    gradient = jax.grad(weighted_loss)(predictions.policy)
    scale = np.abs(expected).max((1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(gradient / scale, expected / scale, rtol=1e-3, atol=2e-4)


def released_diffusion_dpo(torch, policy, reference, target, beta):
    """The formula of SalesforceAIResearch/DiffusionDPO: winners first, then losers."""
    model_w, model_l = (policy - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    ref_w, ref_l = (reference - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    inside = -0.5 * beta * ((model_w - model_l) - (ref_w - ref_l))
    return -torch.nn.functional.logsigmoid(inside)


def released_dspo(torch, policy, reference, target, lam, detach):
    """The formula of huaishengzhu/DSPO for SD1.5, with gamma = 1."""
    model_w, model_l = (policy - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    ref_w, ref_l = (reference - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    gate = 1 - torch.sigmoid(-0.5 * lam * ((model_w - model_l) - (ref_w - ref_l)))
    gate = gate.detach() if detach else gate
    half = len(policy) // 2
    preferred = lam * gate[:, None, None, None] * (policy[:half] - reference[:half])
    return ((policy[:half] - target[:half]) - preferred).pow(2).mean(dim=[1, 2, 3])


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("sft", {}),
        ("diffusion_dpo", {"beta": 3.0}),
        ("diffusion_dpo", {}),
        ("dspo", {"lam": 0.8}),
        ("dspo", {"lam": 0.8, "detach": True}),
        ("dspo", {}),
    ],
)
def test_matches_torch_autograd_of_the_released_formula(name, given, arrays):
    torch = pytest.importorskip("torch")
    objective = get_objective(name, **given)
    predictions = dataclasses.replace(as_predictions(arrays), preference=None)

    def to_torch(array):  # [B, P, h, w, C] -> [winners; losers] in NCHW
        return torch.from_numpy(np.concatenate([array[:, 0], array[:, 1]]).transpose(0, 3, 1, 2).copy())

    policy, reference, target = (to_torch(arrays[key]) for key in ("policy", "reference", "target"))
    policy.requires_grad_()
    h = objective.hyperparameters
    if name == "sft":
        theirs = (policy - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)[0]
    elif name == "diffusion_dpo":
        theirs = released_diffusion_dpo(torch, policy, reference, target, h["beta"])
    else:
        theirs = released_dspo(torch, policy, reference, target, h["lam"], h["detach"])
    theirs.mean().backward()
    winners, losers = policy.grad.numpy().transpose(0, 2, 3, 1).reshape(2, SHAPE[0], *SHAPE[2:])

    def mean_loss(policy):
        return objective(dataclasses.replace(predictions, policy=policy), Schedule.scaled_linear())[0].mean()

    loss, gradient = jax.value_and_grad(mean_loss)(predictions.policy)
    np.testing.assert_allclose(loss, theirs.mean().item(), rtol=1e-5)
    expected = np.stack([winners, losers], 1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.fixture(scope="module", params=[jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def at_the_reference(request):
    """Step 0: the policy predicts what the reference predicts, at a latent's size."""
    rng = np.random.default_rng(3)
    policy, target = (jnp.asarray(rng.normal(size=(3, 2, 16, 16, 4)), request.param) for _ in range(2))
    timesteps = jnp.array([[0, 0], [500, 20], [999, 999]])
    return Predictions(policy, policy, target, timesteps, jnp.array([1.0, 0.8, 0.5]))


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

    def test_dspo_is_exactly_sft(self, reduction, time_weight, at_the_reference):
        options = {"reduction": reduction, "time_weight": time_weight}
        objectives = get_objective("dspo", lam=0.5, **options), get_objective("sft", **options)
        dspo, sft = (jax.jit(o)(at_the_reference, Schedule.scaled_linear())[0] for o in objectives)
        assert dspo.dtype == jnp.float32
        np.testing.assert_array_equal(dspo, sft)


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


@pytest.mark.parametrize("time_weight", ["none", "paper"])
@pytest.mark.parametrize("name", PAIRWISE)
def test_swapping_winner_and_loser_flips_the_margin(name, time_weight, arrays):
    objective, schedule = get_objective(name, time_weight=time_weight), Schedule.scaled_linear()
    swapped = {key: value[:, ::-1] if value.ndim > 1 else value for key, value in arrays.items()}
    _, one = objective(as_predictions(arrays), schedule)
    _, other = objective(as_predictions(swapped), schedule)
    assert np.all(np.asarray(one["margin"]) != 0)
    np.testing.assert_allclose(other["margin"], -one["margin"], rtol=1e-6)
    np.testing.assert_array_equal(other["implicit_accuracy"], 1 - one["implicit_accuracy"])
    for key in ("error", "drift"):
        np.testing.assert_allclose(other[f"winner_{key}"], one[f"loser_{key}"], rtol=1e-6)
    np.testing.assert_allclose(other["deviation"], one["deviation"], rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_permuting_the_batch_permutes_losses_and_metrics(name, arrays):
    objective, schedule = get_objective(name, time_weight="paper"), Schedule.scaled_linear()
    order = np.array([2, 0, 3, 1])
    loss, metrics = objective(as_predictions(arrays), schedule)
    permuted_loss, permuted = objective(
        as_predictions({key: a[order] for key, a in arrays.items()}), schedule
    )
    assert np.unique(loss).size == SHAPE[0]
    np.testing.assert_allclose(permuted_loss, loss[order], rtol=1e-6)
    for key, value in metrics.items():
        np.testing.assert_allclose(permuted[key], value[order], rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("preference", [None, np.array([0.6, 0.6])])
@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("diffusion_dpo", {}, [2.5e7, 0.0]),
        ("dspo", {}, [(100 * (1 - 0.001 / (1 + np.exp(-5.0)))) ** 2, 0.0]),
        ("dspo", {"reward_scale": 5000.0, "score_weight": 0.5}, [50.0**2, 0.0]),
    ],
)
def test_finite_in_float32_at_extreme_differences(name, given, expected, preference):
    """D = 1e4, then -1e4: one image of the pair is 100 off, the other and the reference are right."""
    target = jnp.asarray(np.random.default_rng(0).normal(size=(2, *SHAPE[1:])), jnp.float32)
    policy = target.at[np.arange(2), np.arange(2)].add(100)
    objective, schedule = get_objective(name, **given), Schedule.scaled_linear()

    def evaluate(policy):
        predictions = Predictions(policy, target, target, jnp.array([500, 500]), preference)
        loss, metrics = objective(predictions, schedule)
        return loss.sum(), (loss, metrics)

    (_, (loss, metrics)), gradient = jax.jit(jax.value_and_grad(evaluate, has_aux=True))(policy)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, metrics, gradient)))
    np.testing.assert_allclose(metrics["winner_drift"] - metrics["loser_drift"], [1e4, -1e4], rtol=1e-5)
    if preference is None:
        np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computes_in_float32_whatever_the_inputs(name, dtype, arrays):
    low = as_predictions(arrays, dtype)
    objective, schedule = get_objective(name), Schedule.scaled_linear()
    cast = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == dtype else a, low)
    for result, expected in zip(
        jax.tree.leaves(objective(low, schedule)), jax.tree.leaves(objective(cast, schedule)), strict=True
    ):
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
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


@pytest.mark.parametrize("name", PAIRWISE)
def test_no_preference_means_certainty(name, arrays):
    certain = as_predictions(arrays | {"preference": np.ones(SHAPE[0])})
    objective, schedule = get_objective(name), Schedule.scaled_linear()
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
    for name in PAIRWISE:
        assert set(get_objective(name)(pairs, schedule)[1]) == pair_metrics | drifts


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
