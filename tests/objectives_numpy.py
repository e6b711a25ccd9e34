"""The objectives once more in NumPy and float64, one example at a time, written from the papers' equations.

Nothing here is shared with `dspo_jax`: the time weights are taken from the Gaussians they were derived from.
"""

import numpy as np


def log_sigmoid(z):
    return -np.logaddexp(0.0, -z)


def reverse_step(betas, t):
    """Posterior variance, noise factor of the mean, abar before and abar at, of the step that leaves t."""
    t = max(t, 1)
    alphas_cumprod = np.cumprod(1 - betas)
    before, at, beta = alphas_cumprod[t - 1], alphas_cumprod[t], betas[t]
    variance = (1 - before) / (1 - at) * beta
    return variance, beta / np.sqrt((1 - beta) * (1 - at)), before, at


def time_weights(betas, t, prediction_type):
    """w(t) of the reward, and A(t) and B(t) of DSPO's Eq. 12 with omega = variance."""
    variance, noise_factor, before, at = reverse_step(betas, t)
    # An error of eps is sqrt(abar) times one of v. w / 2 |e - y|^2 = |mean(e) - mean(y)|^2 / (2 variance).
    to_epsilon = 1.0 if prediction_type == "epsilon" else np.sqrt(at)
    w = (noise_factor * to_epsilon) ** 2 / variance
    preference_score = noise_factor * to_epsilon / variance
    data_score = to_epsilon / np.sqrt(1 - before)
    return w, variance * preference_score**2, data_score / preference_score


def evaluate(name, arrays, betas, prediction_type, *, gate_policy=None, **h):
    """Loss [B] and metrics of objective `name` with every hyperparameter in `h` given.

    Args:
      name: of the objective.
      arrays: dict of policy, reference, target [B, 2, h, w, C], timesteps [B, 2], preference [B].
      betas: [T] of the schedule.
      prediction_type: "epsilon" or "v_prediction".
      gate_policy: predictions to compute DSPO's G from, to differentiate past a detached G.
      **h: the hyperparameters.
    """
    reduce = {"mean": np.mean, "sum": np.sum}[h["reduction"]]
    losses, metrics = [], []
    for i, policy in enumerate(arrays["policy"]):
        reference, target, t = (arrays[key][i] for key in ("reference", "target", "timesteps"))
        paper = h["time_weight"] == "paper"
        weights = [time_weights(betas, step, prediction_type) if paper else (1.0, 1.0, 1.0) for step in t]
        error = [reduce((e - y) ** 2) for e, y in zip(policy, target, strict=True)]
        drift = [s - reduce((r - y) ** 2) for s, r, y in zip(error, reference, target, strict=True)]
        m = {
            "winner_error": error[0],
            "loser_error": error[1],
            "winner_drift": drift[0],
            "loser_drift": drift[1],
            "deviation": np.mean((policy - reference) ** 2),
            "margin": drift[1] - drift[0],
        }

        if name == "ddpm":
            loss = np.mean([a * b**2 * s for (_, a, b), s in zip(weights, error, strict=True)])
        elif name == "sft":
            loss = weights[0][1] * weights[0][2] ** 2 * error[0]
        else:
            p = arrays["preference"][i]
            scale = h["beta"] if name == "diffusion_dpo" else h["reward_scale"]
            rewards = [-scale / 2 * w * d for (w, _, _), d in zip(weights, drift, strict=True)]
            m["margin"] = z = rewards[0] - rewards[1]
            if name == "diffusion_dpo":
                loss = -p * log_sigmoid(z) - (1 - p) * log_sigmoid(-z)
            else:
                if gate_policy is not None:
                    held = {**arrays, "policy": gate_policy}
                    z = evaluate(name, held, betas, prediction_type, **h)[1]["margin"][i]
                gate = p * (1 - 1 / (1 + np.exp(-z))) - (1 - p) / (1 + np.exp(-z))
                _, a, b = weights[0]
                preferred = h["score_weight"] * gate * (policy[0] - reference[0])
                loss = a * reduce((b * (policy[0] - target[0]) - preferred) ** 2)
        m["implicit_accuracy"] = {1.0: 1.0, 0.0: 0.5, -1.0: 0.0}[float(np.sign(m["margin"]))]
        losses.append(loss)
        metrics.append(m)
    return np.array(losses), {key: np.array([m[key] for m in metrics]) for key in metrics[0]}
