"""Objectives of labelled images, pairs and lists: NumPy, finite differences, the released formulas."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import lists_numpy
import numpy as np
import objectives_numpy
import pytest
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.objectives import Predictions, get_objective
from dspo_jax.schedules.variance_preserving import Schedule

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
# The strengths put sigmoids where they bend; the clips leave some images with a gradient and some without.
STRONG = {
    "nft": {"beta": 0.6},
    "awm": {"clip": 0.2},
    "lpo_list": {"beta": 3.0},
    "dgpo": {"beta": 2.0, "clip": 0.2},
    "crd": {"beta": 0.4},
}
OF_SINGLES = ("nft", "awm")
VARIANTS = [
    (name, case, reduction, *weighted)
    for name, case, reduction, weighted in itertools.product(
        STRONG,
        ((1, False), (2, False), (2, True), (4, False), (4, True)),
        ("mean", "sum"),
        (("none", "epsilon"), ("none", "v_prediction"), ("paper", "v_prediction")),
    )
    # Without a time weight the kind of prediction changes `nft` alone.
    if (case[0] > 1 or name in OF_SINGLES) and (name == "nft" or weighted != ("none", "v_prediction"))
]


def make_arrays(images, scored, count=4):
    """Float64 arrays [B, P, 3, 2, 2]; one list of scores is without spread, one label says nothing."""
    rng = np.random.default_rng(images)
    shape = (count, images, 3, 2, 2)
    reference, target = rng.normal(size=(2, *shape))
    scores = rng.normal(size=shape[:2])
    scores[1] = 0.7
    return {
        "policy": reference + 0.3 * rng.normal(size=shape),
        "reference": reference,
        "target": target,
        "timesteps": rng.integers(0, 1000, shape[:2]),
        "preference": np.array([1.0, 0.9, 0.5, 0.7])[:count],
        "scores": scores if scored else None,
    }


def as_predictions(arrays):
    floats = {k: jnp.asarray(a, jnp.float32) for k, a in arrays.items() if a is not None and k != "timesteps"}
    return Predictions(**floats, levels=jnp.asarray(arrays["timesteps"]))


@each_row(("name", "case", "reduction", "time_weight", "prediction_type"), VARIANTS)
def test_loss_and_gradient_match_numpy_in_float64(name, case, reduction, time_weight, prediction_type):
    arrays = make_arrays(*case)
    objective = get_objective(name, **STRONG[name], reduction=reduction, time_weight=time_weight)
    schedule = Schedule.scaled_linear(prediction_type=prediction_type)
    predictions = as_predictions(arrays)

    def total(policy):
        loss, metrics = objective(dataclasses.replace(predictions, policy=policy), schedule)
        return loss.sum(), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(predictions.policy)
    given = (BETAS, prediction_type)
    expected = lists_numpy.evaluate(name, arrays, *given, **objective.hyperparameters)
    np.testing.assert_allclose(loss, expected, rtol=3e-4, atol=1e-6)
    assert all(values.shape == (4,) and np.isfinite(values).all() for values in metrics.values())
    direction = np.random.default_rng(1).normal(size=arrays["policy"].shape)
    ahead, behind = (
        lists_numpy.evaluate(
            name,
            arrays | {"policy": arrays["policy"] + sign * 1e-6 * direction},
            *given,
            held=arrays["policy"],
            **objective.hyperparameters,
        )
        for sign in (1, -1)
    )
    gradient = np.asarray(gradient, np.float64)
    scale = np.sqrt((gradient**2).sum((1, 2, 3, 4)))
    scale = np.maximum(scale, 1e-3 * scale.max())
    along = (gradient * direction).sum((1, 2, 3, 4))
    np.testing.assert_allclose(along / scale, (ahead - behind) / 2e-6 / scale, rtol=2e-3, atol=1e-3)


@each_row("images", [3, 6, 7, 8])
def test_equal_scores_ask_for_nothing(images):
    """The mean of three 21.7 in float32 is not 21.7."""
    arrays = make_arrays(images, scored=True)
    arrays["scores"][:] = np.array([21.7, 0.1, -0.7, 1e4])[:, None]
    start, schedule = as_predictions(arrays | {"policy": arrays["reference"]}), Schedule.scaled_linear()

    def total(policy, name):
        loss, metrics = get_objective(name)(dataclasses.replace(start, policy=policy), schedule)
        return loss.sum(), (loss, metrics)

    for name in ("awm", "nft", "dgpo", "crd"):
        gradient, (loss, metrics) = jax.grad(total, has_aux=True)(start.policy, name)
        if name == "nft":
            np.testing.assert_array_equal(metrics["liked"], np.full(4, 0.5))
        else:
            np.testing.assert_array_equal(loss, np.zeros(4), err_msg=name)
        np.testing.assert_allclose(gradient, np.zeros_like(gradient), atol=1e-7, err_msg=name)


def test_scores_weigh_the_margin_of_a_pair():
    arrays = make_arrays(2, scored=True)
    arrays["scores"][2] = [0.3, 1.5]  # against the label
    objective = get_objective("diffusion_dpo", beta=3.0, smpo_weight=10.0)
    schedule = Schedule.scaled_linear()
    loss, metrics = objective(as_predictions(arrays), schedule)
    expected, expected_metrics = objectives_numpy.evaluate(
        "diffusion_dpo", arrays, BETAS, "epsilon", **objective.hyperparameters
    )
    assert "'1*hpsv2.1'" in objective.notes(64)[1]
    np.testing.assert_allclose(loss, expected, rtol=3e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["margin"], expected_metrics["margin"], rtol=3e-4, atol=1e-6)
    assert metrics["margin"][1] == 0  # equal scores
    with pytest.raises(
        UserError, match=r"'diffusion_dpo' weighs pairs by the scores .* Predictions.scores is None"
    ):
        objective(as_predictions(arrays | {"scores": None}), schedule)


@each_row("preference", [1.0, 0.7])
def test_a_list_of_two_is_diffusion_dpo(preference):
    arrays = make_arrays(2, scored=False) | {"preference": np.full(4, preference)}
    schedule = Schedule.scaled_linear()
    results = [
        get_objective(name, beta=3.0)(as_predictions(arrays), schedule)
        for name in ("lpo_list", "diffusion_dpo")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    # And with scores of its order, or of the other.
    for scores, swapped in (([1.0, 0.0], False), ([0.0, 1.0], True)):
        scored = as_predictions(arrays | {"scores": np.tile(scores, (4, 1))})
        pair = {k: a[:, ::-1] if swapped and getattr(a, "ndim", 0) > 1 else a for k, a in arrays.items()}
        certain = as_predictions(pair | {"preference": np.ones(4)})
        losses = [
            get_objective(name, beta=3.0)(given, schedule)[0]
            for name, given in (("lpo_list", scored), ("diffusion_dpo", certain))
        ]
        np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-6)


def test_values_and_gradients_where_a_run_starts():
    """At the reference, where every implicit reward is zero."""
    arrays = make_arrays(4, scored=True)
    start = as_predictions(arrays | {"policy": arrays["reference"]})
    schedule = Schedule.scaled_linear()
    worth = np.array([lists_numpy.advantages(s, None, 4) for s in arrays["scores"]])
    errors = ((arrays["reference"] - arrays["target"]) ** 2).mean((2, 3, 4))
    expected = {
        "lpo_list": np.full(4, math.log(24)),
        "awm": np.zeros(4),
        "crd": (worth**2).mean(1) / 100,
        "dgpo": (worth * errors).mean(1) / 2,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(get_objective(name)(start, schedule)[0], values, rtol=1e-4, atol=1e-6)

    def total(policy, name):
        return get_objective(name)(dataclasses.replace(start, policy=policy), schedule)[0].sum()

    for name in ("awm", "nft", "dgpo", "crd"):
        gradient = np.asarray(jax.grad(total)(start.policy, name))
        assert not gradient[1].any() or name == "nft", name  # scores without spread ask for nothing
        assert np.abs(gradient[0]).max() > 0, name
        # Towards the target for the best image, off it for the worst.
        downhill = (gradient * (start.policy - start.target)).sum((2, 3, 4))[0]
        assert downhill[worth[0].argmax()] > 0 > downhill[worth[0].argmin()], name


def test_metrics_of_a_list():
    arrays = make_arrays(4, scored=True)
    _, metrics = get_objective("crd", beta=1.0)(as_predictions(arrays), Schedule.scaled_linear())
    errors, old = (((arrays[key] - arrays["target"]) ** 2).mean((2, 3, 4)) for key in ("policy", "reference"))
    gain = old - errors
    for i, scores in enumerate(arrays["scores"]):
        pairs = [(a, b) for a in range(4) for b in range(4) if scores[a] > scores[b]]
        share = np.mean([gain[i, a] > gain[i, b] for a, b in pairs]) if pairs else 0.5
        np.testing.assert_allclose(metrics["implicit_accuracy"][i], share, rtol=1e-6)
        best, worst = gain[i, scores.argmax()], gain[i, scores.argmin()]
        np.testing.assert_allclose(metrics["margin"][i], best - worst, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["error"], errors.mean(1), rtol=1e-5)
    np.testing.assert_allclose(metrics["drift"], -gain.mean(1), rtol=1e-4, atol=1e-6)


@each_row("name", STRONG)
@each_row("images", [2, 4])
def test_finite_however_large_the_errors(name, images):
    """One image right and the others 100 off, or the reverse; scores equal or far apart."""
    schedule = Schedule.scaled_linear()
    target = jnp.asarray(np.random.default_rng(0).normal(size=(2, images, 3, 2, 2)), jnp.float32)
    far = target.at[0, 1:].add(100).at[1, :1].add(100)
    scores = jnp.stack([jnp.zeros(images), 1e6 * jnp.arange(images, dtype=jnp.float32)])
    for policy, reference in itertools.product((target, far), (target, far)):

        def total(policy, reference=reference):
            given = Predictions(policy, reference, target, jnp.array([0, 999]), scores=scores)
            loss, metrics = get_objective(name)(given, schedule)
            return loss.sum(), (loss, metrics)

        results = jax.grad(total, has_aux=True)(policy)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


@each_row("prediction_type", ["epsilon", "v_prediction"])
def test_nft_takes_the_errors_of_x0(prediction_type):
    """With x_0 as the schedule gives it for a noised image."""
    schedule, rng = Schedule.scaled_linear(prediction_type=prediction_type), np.random.default_rng(0)
    x0, noise, old, policy = (jnp.asarray(rng.normal(size=(3, 1, 4, 4, 2)), jnp.float32) for _ in range(4))
    times = jnp.array([[5], [400], [900]])
    noisy = schedule.add_noise(x0, noise, times)
    given = Predictions(policy, old, schedule.target(x0, noise, times), times, jnp.array([1.0, 0.3, 0.0]))
    expected = []
    for sign in (1, -1):
        off = np.asarray(schedule.to_x0(old + sign * 0.6 * (policy - old), noisy, times) - x0)[:, 0]
        expected.append((off**2).mean((1, 2, 3)) / np.abs(off).mean((1, 2, 3)))
    liked = np.array([1.0, 0.3, 0.0])
    loss, _ = get_objective("nft", beta=0.6)(given, schedule)
    np.testing.assert_allclose(loss, (liked * expected[0] + (1 - liked) * expected[1]) / 0.6, rtol=2e-3)


def released_nft(policy, old, target, worth, beta, t):
    """NVlabs/DiffusionNFT, commit 24af555, scripts/train_nft_sd3.py, lines 928 to 960; t of a flow's x_t."""
    torch = pytest.importorskip("torch")
    x0 = torch.ones_like(target)
    xt = x0 + t * target
    r = torch.clamp((worth / 5.0) / 2.0 + 0.5, 0, 1)
    losses = []
    for prediction in (beta * policy + (1 - beta) * old, (1.0 + beta) * old - beta * policy):
        x0_prediction = xt - t * prediction
        with torch.no_grad():
            weight = torch.abs(x0_prediction - x0).mean(dim=(1, 2, 3), keepdim=True).clip(min=1e-5)
        losses.append(((x0_prediction - x0) ** 2 / weight).mean(dim=(1, 2, 3)))
    return (r * losses[0] / beta + (1.0 - r) * losses[1] / beta).mean()


def released(name, policy, old, target, worth):
    """Losses of one group, means over images: X-GenGroup/Flow-Factory, commit a0b2bc5.

    `optimize` of src/flow_factory/trainers/awm.py; `_compute_crd_loss` of crd.py there, without
    `adaptive_logp`; `_maybe_clip_dsm` and `_compute_group_dgpo_loss` of dgpo.py there.
    """
    torch = pytest.importorskip("torch")

    def error(prediction):
        return (prediction - target).pow(2).mean((1, 2, 3))

    if name == "awm":
        ratio = torch.exp(-error(policy) + error(old))
        return torch.maximum(-worth * ratio, -worth * torch.clamp(ratio, 0.8, 1.2)).mean()
    if name == "crd":
        gain, wanted = error(old) - error(policy), worth / 10
        reward = 0.4 * (gain - gain.mean().detach())
        return (reward - (wanted - wanted.mean())).pow(2).mean()
    ratio = torch.exp(-error(policy).detach() + error(old))
    stopped = torch.where(worth > 0, ratio > 1.2, ratio < 0.8)
    loss = torch.where(stopped, error(policy).detach(), error(policy))
    group = torch.sigmoid((worth * 2.0 * (loss.detach() - error(old)) / len(worth)).sum())
    return (group * worth * loss).mean()


@each_row("name", ["nft", "awm", "crd", "dgpo"])
def test_matches_torch_autograd_of_the_released_formula(name):
    torch = pytest.importorskip("torch")
    arrays = make_arrays(4, scored=True)
    worth = [lists_numpy.advantages(scores, None, 4) for scores in arrays["scores"]]
    predictions = as_predictions(arrays)
    schedule = Schedule.scaled_linear(prediction_type="v_prediction")

    def total(policy):
        given = dataclasses.replace(predictions, policy=policy)
        return get_objective(name, **STRONG[name])(given, schedule)[0].sum()

    loss, gradient = jax.value_and_grad(total)(predictions.policy)
    policy, old, target = (torch.from_numpy(arrays[key]) for key in ("policy", "reference", "target"))
    policy = policy.clone().requires_grad_()
    # What a flow's x_0 has of its velocity is t; here it has sqrt(1 - abar) of v.
    level = torch.from_numpy(np.sqrt(1 - np.cumprod(1 - BETAS)[arrays["timesteps"]]))
    expected = torch.zeros(())
    for i in range(4):
        given = policy[i], old[i], target[i], torch.from_numpy(worth[i])
        if name == "nft":
            expected = expected + released_nft(*given, 0.6, level[i][:, None, None, None])
        else:
            expected = expected + released(name, *given)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    np.testing.assert_allclose(gradient, policy.grad.numpy(), rtol=1e-3, atol=1e-6)


def test_what_is_not_taken_is_one_clear_error():
    schedule = Schedule.scaled_linear()
    four = as_predictions(make_arrays(4, scored=True))
    with pytest.raises(UserError, match=r"'dspo' takes a pair .* 4 images: .*lpo_list"):
        get_objective("dspo")(four, schedule)
    with pytest.raises(UserError, match=r"'kto' takes a single image or a pair .* 4 images"):
        get_objective("kto")(four, schedule)
    with pytest.raises(UserError, match=r"'crd' .* one image per example \(P = 1\)"):
        get_objective("crd")(as_predictions(make_arrays(1, scored=False)), schedule)
    with pytest.raises(ValueError, match=r"Predictions.scores has shape \(4, 1\); it must be \(4, 4\)"):
        get_objective("crd")(dataclasses.replace(four, scores=jnp.zeros((4, 1))), schedule)
