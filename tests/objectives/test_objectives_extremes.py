"""What every objective keeps at any shape, dtype and size of the numbers; known values at the far ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import each_row

from dspo_jax.objectives import Predictions, get_objective
from dspo_jax.objectives.registry import OBJECTIVES as REGISTERED
from dspo_jax.schedules.variance_preserving import Schedule

OF_THE_MARGIN = (
    *("diffusion_dpo", "diffusion_dpo_l2", "sdpo", "ipo", "dmpo", "dspo_sdxl", "kto"),
    *("alpha_dpo", "hinge", "linear_dpo", "diffusion_rpo", "npo"),
)
OBJECTIVES = (*OF_THE_MARGIN, "ddpm", "sft", "dspo", "dspo_ref", "dspo_e", "mapo", "orpo")
WITHOUT_BOUND = ("linear_dpo",)
SINGLE, PAIRS = (1, 1, 1, 1, 1), (3, 2, 2, 3, 4)  # B, P, h, w, C
VARIANTS = ((SINGLE, jnp.float32), (PAIRS, jnp.bfloat16))


@functools.cache
def compiled(name):
    """(policy, the rest of the predictions) -> (loss, metrics, gradient); traced for each shape and dtype."""
    objective, schedule = get_objective(name, time_weight="paper"), Schedule.scaled_linear()

    def evaluate(policy, reference, target, timesteps, preference):
        def total(policy):
            captions = jnp.ones((len(policy), 3))
            predictions = Predictions(policy, reference, target, timesteps, preference, captions=captions)
            loss, metrics = objective(predictions, schedule)
            return loss.sum(), (loss, metrics)

        (_, (loss, metrics)), gradient = jax.value_and_grad(total, has_aux=True)(policy)
        return loss, metrics, gradient

    return jax.jit(evaluate)


@pytest.mark.ci
@pytest.mark.parametrize("name", OBJECTIVES)
@given(
    variant=st.sampled_from(VARIANTS),
    size=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 100.0]),
    distance=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 100.0]),
    preference=st.floats(0.5, 1.0, width=32),
    seed=st.integers(0, 2**32 - 1),
)
@settings(derandomize=True, deadline=None, max_examples=25, database=None)
def test_finite_and_well_formed(name, variant, size, distance, preference, seed):
    shape, dtype = VARIANTS[1] if get_objective(name).needs_loser else variant
    rng = np.random.default_rng(seed)
    target, reference, step = rng.normal(size=(3, *shape))
    reference = target + size * reference
    arrays = [jnp.asarray(array, dtype) for array in (reference + distance * step, reference, target)]
    timesteps = jnp.asarray(rng.integers(0, 1000, shape[:2]))
    labels = jnp.full(shape[0], preference, jnp.float32)
    loss, metrics, gradient = compiled(name)(*arrays, timesteps, labels)
    for key, value in {"loss": loss, **metrics}.items():
        assert value.shape == (shape[0],), key
        assert value.dtype == jnp.float32, key
        assert np.isfinite(value).all(), key
    assert np.isfinite(gradient.astype(jnp.float32)).all()
    assert name in WITHOUT_BOUND or np.all(loss > -1e-5)
    if "implicit_accuracy" in metrics:
        assert set(np.asarray(metrics["implicit_accuracy"]).tolist()) <= {0.0, 0.5, 1.0}
    if name in OF_THE_MARGIN and name != "alpha_dpo" and shape[1] == 2:
        # A label that says nothing cannot tell the images apart, but for alpha-DPO's order.
        unsure = jnp.full(shape[0], 0.5)
        one, _, _ = compiled(name)(*arrays, timesteps, unsure)
        other, _, _ = compiled(name)(*(array[:, ::-1] for array in (*arrays, timesteps)), unsure)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


G5 = 1 / (1 + np.exp(-5.0))  # 1 - sigmoid(z) at lam = 0.001 and D = 1e4
EXTREMES = [
    ("ddpm", {}, [5e3, 5e3]),
    ("sft", {}, [1e4, 0.0]),
    ("diffusion_dpo", {}, [2.5e7, 0.0]),
    ("diffusion_dpo_l2", {}, [0.0, 2.5e7]),
    ("sdpo", {}, [2.5e7, 0.0]),
    ("ipo", {}, [1e8, 1e8]),
    ("dmpo", {}, [-np.log(0.01), -np.log(0.99)]),
    # Half of the pairs are ranked rightly.
    ("alpha_dpo", {}, [1 / (0.9999 / 2), 0.0]),
    ("alpha_dpo", {"alpha": 0.5}, [1 / 0.25, 0.0]),
    ("hinge", {}, [2.5e7, 0.0]),
    ("linear_dpo", {}, [2.5e7, -2.5e7]),
    # Each weight is 1/2; a winner is as good as the other pair's loser.
    ("diffusion_rpo", {}, [6.25e6, np.log(2) / 2]),
    ("npo", {}, [0.0, 5e6]),
    ("orpo", {}, [1e4 + 1e3, 0.0]),
    ("kto", {}, [0.75, 0.25]),
    ("mapo", {}, [1e4 + 100, 0.0]),
    ("dspo", {}, [(100 * (1 - 0.001 * G5)) ** 2, 0.0]),
    ("dspo", {"reward_scale": 5000.0, "score_weight": 0.5}, [50.0**2, 0.0]),
    ("dspo_ref", {}, [(100 * (1 - 0.001 * G5)) ** 2, 0.0]),
    ("dspo_e", {}, [99.9**2, 0.0]),
    ("dspo_sdxl", {}, [1.0, 0.0]),
    ("dspo_sdxl", {"released_switch": True}, [1e4, 0.0]),
]


@each_row(("name", "hyperparameters", "expected"), EXTREMES)
def test_known_values_at_extreme_differences(name, hyperparameters, expected):
    """D = 1e4, then -1e4: one image of the pair is 100 off, the other and the reference are right."""
    target = jnp.asarray(np.random.default_rng(0).normal(size=(2, *PAIRS[1:])), jnp.float32)
    policy = target.at[np.arange(2), np.arange(2)].add(100)
    objective, schedule = get_objective(name, **hyperparameters), Schedule.scaled_linear()

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def evaluate(policy, preference):
        levels, captions = jnp.array([500, 500]), jnp.ones((2, 3))
        predictions = Predictions(policy, target, target, levels, preference, captions=captions)
        loss, metrics = objective(predictions, schedule)
        return loss.sum(), (loss, metrics)

    for preference in (0.6, 1.0):
        (_, (loss, metrics)), gradient = evaluate(policy, jnp.full(2, preference))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, metrics, gradient)))
    np.testing.assert_allclose(metrics["winner_drift"] - metrics["loser_drift"], [1e4, -1e4], rtol=1e-5)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


ZERO_SNR = {
    **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    **{"num_train_timesteps": 1000, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@each_row("time_weight", ["none", "paper"])
@each_row("name", REGISTERED)
def test_finite_where_the_noised_image_is_noise_alone(name, time_weight):
    """The last timestep of a schedule with zero terminal SNR, whose alpha and abar are 0."""
    objective, schedule = get_objective(name, time_weight=time_weight), Schedule.from_config(ZERO_SNR)
    policy, reference, target = jnp.asarray(np.random.default_rng(0).normal(size=(3, *PAIRS)), jnp.float32)
    ones = jnp.ones(PAIRS[:2])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def evaluate(policy, timesteps):
        predictions = Predictions(
            *(policy, reference, target, timesteps, ones[:, 0]),
            **{"scores": ones.at[:, 1].set(0.0), "weight": ones, "captions": ones},
        )
        loss, metrics = objective(predictions, schedule)
        return loss.sum(), (loss, metrics)

    (_, (loss, metrics)), gradient = evaluate(policy, jnp.full(PAIRS[:2], 999))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, metrics, gradient)))
    # The weights that take x_0's part at that timestep are 0 or nearly: they go on from the one before.
    (_, (nearly, _)), _ = evaluate(policy, jnp.full(PAIRS[:2], 998))
    np.testing.assert_allclose(loss, nearly, rtol=1e-3, atol=5e-3)
