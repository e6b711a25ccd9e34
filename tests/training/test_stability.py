"""Which updates are made, and what is remembered of those that were not."""

import jax
import jax.numpy as jnp
import numpy as np
from tables import each_row

from dspo_jax.training import stability


def run(losses, *, loss_spike=0.0, grad_norms=None):
    """Verdicts on a series of losses, and the health after each."""
    health, verdicts, after = stability.start(), [], []
    judge = jax.jit(stability.judge, static_argnums=3)
    for number, loss in enumerate(losses):
        norm = 1.0 if grad_norms is None else grad_norms[number]
        good, health = judge(health, jnp.float32(loss), jnp.float32(norm), loss_spike)
        verdicts.append(bool(good))
        after.append(health)
    return verdicts, after


@each_row("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_skipped_counted_and_forgotten(bad):
    verdicts, after = run([1.0, bad, bad, 1.0, bad])
    assert verdicts == [True, False, False, True, False]
    assert [int(health.skipped) for health in after] == [0, 1, 2, 2, 3]
    assert [int(health.skipped_in_a_row) for health in after] == [0, 1, 2, 0, 1]
    assert [int(health.updates) for health in after] == [1, 1, 1, 2, 2]
    assert all(float(health.loss_mean) == 1.0 for health in after)


def test_gradients_that_are_not_finite_are_skipped_though_the_loss_is():
    verdicts, _ = run([1.0, 1.0, 1.0], grad_norms=[1.0, np.nan, np.inf])
    assert verdicts == [True, False, False]


def test_mean_and_variance_are_of_the_losses_with_exponential_weights():
    losses = np.random.default_rng(0).normal(3.0, 2.0, 400)
    _, after = run(losses)
    first = losses[:100]  # an ordinary mean while the weight is at least 1/100
    np.testing.assert_allclose(after[99].loss_mean, first.mean(), rtol=1e-5)
    np.testing.assert_allclose(after[99].loss_variance, first.var(), rtol=1e-4)
    weights = 0.99 ** np.arange(300)[::-1]
    weights = np.concatenate([np.full(100, 0.99**300), weights * (1 - 0.99) * 100]) / 100
    mean = (weights * losses).sum()
    np.testing.assert_allclose(after[-1].loss_mean, mean, rtol=1e-4)
    np.testing.assert_allclose(after[-1].loss_variance, (weights * losses**2).sum() - mean**2, rtol=1e-3)


def test_a_spike_is_skipped_once_noise_is_known_and_only_if_asked():
    quiet = list(np.random.default_rng(0).normal(0.7, 0.01, 60))
    assert run([*quiet, 0.9])[0][-1]
    assert run([*quiet, 0.71], loss_spike=6.0)[0][-1]
    verdicts, after = run([*quiet, 0.9, 0.7], loss_spike=6.0)
    assert verdicts[-2:] == [False, True]
    assert float(after[-2].loss_mean) == float(after[-3].loss_mean)  # the spike is not in the mean
    # Too early to tell: everything is a spike beside one loss of no variance.
    assert run([0.7, 0.9], loss_spike=6.0)[0] == [True, True]
