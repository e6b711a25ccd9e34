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


def min_snr_weight(betas, t, prediction_type, gamma):
    """min(SNR, gamma) on the error of x_0, per squared error of the prediction."""
    alpha_bar = np.prod(1 - betas[: t + 1])
    # x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar) = sqrt(abar) x_t - sqrt(1 - abar) v.
    of_x0 = (1 - alpha_bar) / (alpha_bar if prediction_type == "epsilon" else 1)
    return min(alpha_bar / (1 - alpha_bar), gamma) * of_x0


def kl_bernoulli(p, q):
    return sum(a * np.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)))


def alpha_divergence(p, a):
    return (p**a - (1 - a) - a * p) / (a * (a - 1))


# The loss as a function of the margin, for a label that is certain.
MARGIN_LOSSES = {
    "diffusion_dpo": lambda z, h: -log_sigmoid(z),
    "diffusion_dpo_l2": lambda z, h: -log_sigmoid(z),
    "sdpo": lambda z, h: -log_sigmoid(z),
    "ipo": lambda z, h: (z - 1 / (2 * h["beta"])) ** 2,
    "dmpo": lambda z, h: kl_bernoulli(1 / (1 + np.exp(-z)), 1 - h["alpha"]),
    "alpha_dpo": lambda z, h: alpha_divergence(1 / (1 + np.exp(-z)), h["order"]),
    "hinge": lambda z, h: max(0.0, 1 - z),
    "linear_dpo": lambda z, h: -z,
    "npo": lambda z, h: -log_sigmoid(-z),
}


def evaluate(name, arrays, betas, prediction_type, *, held=None, **h):
    """Loss [B] and metrics of objective `name` with every hyperparameter in `h` given.

    Args:
      name: of the objective.
      arrays: dict of policy, reference, target [B, P, h, w, C], timesteps and weight [B, P], preference [B],
        captions [B, D].
      betas: [T] of the schedule.
      prediction_type: "epsilon" or "v_prediction".
      held: the policy's predictions again, as what no gradient flows through: DSPO's detached G, KTO's
        baseline, SDPO's scale, alpha-DPO's order, the switch of `dspo_sdxl`. Differences in `policy` alone
        then give the gradient.
      **h: the hyperparameters.
    """
    reduce = {"mean": np.mean, "sum": np.sum}[h["reduction"]]
    policies, references, targets = (arrays[key] for key in ("policy", "reference", "target"))
    held = policies if held is None else held
    paper = h["time_weight"] == "paper"
    weights = np.array(
        [
            [time_weights(betas, t, prediction_type) if paper else (1.0, 1.0, 1.0) for t in row]
            for row in arrays["timesteps"]
        ]
    )

    min_snr = h.get("min_snr_gamma")
    if (
        name in (*MARGIN_LOSSES, "diffusion_rpo") and min_snr is not None
    ):  # in the place of w(t) and of A(t) B(t)^2
        for row, times in zip(weights, arrays["timesteps"], strict=True):
            row[:, 0] = row[:, 1] = [min_snr_weight(betas, t, prediction_type, min_snr) for t in times]

    def squared_errors(predictions):
        return np.array([[reduce(x) for x in row] for row in (predictions - targets) ** 2])

    def gains(predictions):
        return weights[..., 0] * (squared_errors(references) - squared_errors(predictions))

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    baseline = max(0.0, gains(held).mean())
    if name == "alpha_dpo":
        h["order"] = h["alpha"] * np.mean(sigmoid(-h["beta"] / 2 * np.diff(gains(held), axis=1)))
    switched = np.mean((held[:, 0] - references[:, 0]) ** 2) >= 0.1
    errors, reference_errors, gain = squared_errors(policies), squared_errors(references), gains(policies)
    losses, metrics = [], []
    for i, policy in enumerate(policies):
        reference, target, p = references[i], targets[i], arrays["preference"][i]
        w, a, b = weights[i].T
        drift = errors[i] - reference_errors[i]
        m = {"winner_error": errors[i, 0], "winner_drift": drift[0]}
        m["deviation"] = np.mean((policy - reference) ** 2)
        if len(policy) == 2:
            m |= {"loser_error": errors[i, 1], "loser_drift": drift[1], "margin": drift[1] - drift[0]}

        if name in ("ddpm", "sft", "rwr"):
            weighted = a * b**2 * errors[i]
            if h["min_snr_gamma"] is not None:
                times = arrays["timesteps"][i]
                weighted *= [min_snr_weight(betas, t, prediction_type, h["min_snr_gamma"]) for t in times]
            if name == "rwr":
                weighted *= arrays["weight"][i]
            loss = weighted[0] if name == "sft" else weighted.mean()
        elif name == "dspo_e":
            step = h["score_weight"] * (policy[0] - reference[0])
            loss = a[0] * reduce((b[0] * (policy[0] - target[0]) - step) ** 2)
        elif name == "kto":
            utility = sigmoid(h["beta"] * (gain[i] - baseline))
            liked = np.array([p, 1 - p])[: len(policy)]
            loss = np.mean(liked * (1 - utility) + (1 - liked) * utility)
            m["baseline"] = baseline
            if len(policy) == 2:
                m["margin"] = h["beta"] * (gain[i, 0] - gain[i, 1])
            else:
                m = {key.replace("winner_", ""): value for key, value in m.items()} | {"liked": p}
                correct = np.sign((p - 0.5) * (gain[i, 0] - baseline))
                m["implicit_accuracy"] = 0.5 + 0.5 * correct
        elif name == "mapo":
            x = h["kappa"] * w * errors[i]
            f = x / np.expm1(x)
            m["margin"] = z = h["scale"] * (f[0] - f[1])
            ranked = p * log_sigmoid(z) + (1 - p) * log_sigmoid(-z)
            loss = a[0] * b[0] ** 2 * errors[i, 0] - h["margin_weight"] * ranked
        elif name == "orpo":
            m["margin"] = z = w[1] * errors[i, 1] - w[0] * errors[i, 0]
            ranked = p * log_sigmoid(z) + (1 - p) * log_sigmoid(-z)
            loss = a[0] * b[0] ** 2 * errors[i, 0] - h["beta"] * ranked
        elif name == "diffusion_rpo":
            directions = [caption / np.sqrt(caption @ caption) for caption in arrays["captions"]]
            near = np.array([np.exp(-(1 - directions[i] @ other) / h["temperature"]) for other in directions])
            omega = near / near.sum()
            loss = 0.0
            for j, q in enumerate(arrays["preference"]):
                for wrong, other_wrong in ((0, 0), (0, 1), (1, 0), (1, 1)):  # labels of i and of j
                    chance = (p, 1 - p)[wrong] * ((q, 1 - q)[other_wrong] if j != i else wrong == other_wrong)
                    z = h["beta"] / 2 * (gain[i, wrong] - gain[j, 1 - other_wrong])
                    loss -= chance * log_sigmoid(omega[j] * z) / len(policies)
            m["margin"] = h["beta"] / 2 * (gain[i, 0] - gain[i, 1])
            m["own_weight"] = omega[i]
        elif name in MARGIN_LOSSES:
            if name == "diffusion_dpo_l2":
                reward = h["beta"] / 2 * w * [reduce(x) for x in (policy - reference) ** 2]
            elif name == "sdpo":
                # Gradients of the (weighted) errors with respect to the predictions.
                g_w, g_l = w[:, None, None, None] * (held[i] - target)
                overlap = np.sum(g_w * g_l)
                scale = min((1 - h["mu"]) * np.sum(g_w**2) / overlap, 1.0) if overlap > 0 else 1.0
                m["loser_scale"] = scale
                loser = held[i, 1] + scale * (policy[1] - held[i, 1])
                reward = h["beta"] / 2 * gain[i]
                reward[1] = (
                    -h["beta"] / 2 * w[1] * (reduce((loser - target[1]) ** 2) - reference_errors[i, 1])
                )
            else:
                reward = {"ipo": 1.0, "hinge": h["beta"]}.get(name, h["beta"] / 2) * gain[i]
            z = reward[0] - reward[1]
            if h.get("smpo_weight"):
                q = np.exp(arrays["scores"][i]) / np.exp(arrays["scores"][i]).sum()
                z *= h["smpo_weight"] * (2 * q[0] - 1)
            m["margin"] = z
            loss = p * MARGIN_LOSSES[name](z, h) + (1 - p) * MARGIN_LOSSES[name](-z, h)
            if name == "alpha_dpo":
                m["order"] = h["order"]
        else:  # the DSPO family with G
            half_scale = h["beta" if name == "dspo_sdxl" else "reward_scale"] / 2
            m["margin"] = z = half_scale * (gain[i, 0] - gain[i, 1])
            if h.get("detach"):
                held_gain = gains(held)[i]
                z = half_scale * (held_gain[0] - held_gain[1])
            gate = p * sigmoid(-z) - (1 - p) * sigmoid(z)
            step = policy[0] - reference[0]
            if name == "dspo_sdxl":
                loss = reduce((gate * step) ** 2) if h["released_switch"] and switched else gate**2
            else:
                data = step if name == "dspo_ref" else policy[0] - target[0]
                loss = a[0] * reduce((b[0] * data - h["score_weight"] * gate * step) ** 2)
        if h.get("sft_weight"):
            loss += h["sft_weight"] * a[0] * b[0] ** 2 * errors[i, 0]
        if h.get("anchor_weight"):
            loss += h["anchor_weight"] / 2 * w @ [reduce(x) for x in (policy - reference) ** 2]
        if "margin" in m:
            m["implicit_accuracy"] = {1.0: 1.0, 0.0: 0.5, -1.0: 0.0}[float(np.sign(m["margin"]))]
        losses.append(loss)
        metrics.append(m)
    return np.array(losses), {key: np.array([m[key] for m in metrics]) for key in metrics[0]}
