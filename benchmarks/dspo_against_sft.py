"""Distance of DSPO's gradient from SFT's, over lambda: the tables of docs/measurements.md and the plot.

    python -m benchmarks.dspo_against_sft --out docs/dspo_against_sft.png

The gradients are with respect to the predictions of both images (SFT's is zero at the loser), at the size of
an SD1.5 latent, over a batch of pairs. The errors have a usual size (SE = 0.1); the policy is at the
reference, or away from it by a share of that error: partly along it, partly in any direction. Takes seconds
on a CPU.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dspo_jax import cli
from dspo_jax.files import whole
from dspo_jax.objectives import Predictions, get_objective
from dspo_jax.schedules.variance_preserving import Schedule

PAIRS, LATENT = 16, (64, 64, 4)
LAMBDAS = (0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0)
SCALES = (0.001, 1.0, 100.0, 1000.0, 2000.0, 5000.0, 20000.0)
# Root mean square of e - r over that of r - y.
DRIFTS = (0.0, 0.03, 0.1)


def make_predictions(drift: float) -> Predictions:
    """Pairs [B, 2, 64, 64, 4] whose policy is `drift` away from the reference, winners better than losers."""
    rng = np.random.default_rng(0)
    target, residual, noise = (
        rng.normal(size=(PAIRS, 2, *LATENT)) * size for size in (1.0, 0.1**0.5, 0.1**0.5)
    )
    # A tenth of the way is along the error itself: down for winners, up for losers, more in some pairs.
    along = rng.uniform(0.0, 0.2, (PAIRS, 2, 1, 1, 1)) * np.array([-1.0, 1.0]).reshape(1, 2, 1, 1, 1)
    reference = target + residual
    policy = reference + drift * (along * residual + noise)
    e, r, y = (jnp.asarray(array, jnp.float32) for array in (policy, reference, target))
    return Predictions(policy=e, reference=r, target=y, levels=jnp.full(PAIRS, 500))


def prediction_gradient(predictions: Predictions, name: str, **hyperparameters: float) -> np.ndarray:
    """Computes the mean loss's gradient with respect to the policy's predictions, flat, float64."""
    objective, schedule = get_objective(name, **hyperparameters), Schedule.scaled_linear()

    def mean_loss(policy: jax.Array) -> jax.Array:
        moved = Predictions(policy, predictions.reference, predictions.target, predictions.levels)
        return objective(moved, schedule)[0].mean()

    return np.asarray(jax.grad(mean_loss)(predictions.policy), np.float64).ravel()


def compare(predictions: Predictions, **hyperparameters: float) -> tuple[float, float]:
    """Computes the cosine of DSPO's and SFT's gradients, and their difference's norm over SFT's."""
    dspo = prediction_gradient(predictions, "dspo", **hyperparameters)
    sft = prediction_gradient(predictions, "sft")
    norms = np.linalg.norm(dspo), np.linalg.norm(sft)
    return float(dspo @ sft / (norms[0] * norms[1])) if norms[0] else 0.0, float(
        np.linalg.norm(dspo - sft) / norms[1]
    )


def main(argv: Sequence[str]) -> None:
    """Prints both tables and draws the plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    del argv
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.5), sharex="col", layout="constrained")
    sweeps = {
        "lambda, as published (inside G, and s)": [(value, {"lam": value}) for value in LAMBDAS],
        "reward_scale (inside G) with s = 1": [
            (value, {"reward_scale": value, "score_weight": 1.0}) for value in SCALES
        ],
    }
    for column, (title, sweep) in enumerate(sweeps.items()):
        print(f"{title}\n{'value':>8}" + "".join(f"{f'drift {drift}':>28}" for drift in DRIFTS))
        results = np.array([[compare(make_predictions(d), **h) for d in DRIFTS] for _, h in sweep])
        for (value, _), row in zip(sweep, results, strict=True):
            print(f"{value:8g}" + "".join(f"   1 - cos {1 - c:8.1e} dif {d:6.4f}" for c, d in row))
        for i, drift in enumerate(DRIFTS):
            values = [value for value, _ in sweep]
            axes[0, column].plot(values, results[:, i, 0], marker="o", label=f"drift {drift}")
            axes[1, column].plot(values, results[:, i, 1], marker="o", label=f"drift {drift}")
        axes[0, column].set(title=title, ylabel="cosine with SFT's gradient", xscale="log")
        axes[1, column].set(xlabel="value", ylabel="relative difference", yscale="log")
        axes[0, column].legend()
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    out = Path(flags.FLAGS.out)
    with whole(out, shared=True) as partial:
        figure.savefig(partial, format="png", dpi=100)
    print(f"drew {out}")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The PNG to draw.", required=True)
    cli.run(main)
