"""Objectives of any number of images in NumPy and float64, one image at a time, from the papers' formulas."""

import numpy as np
from objectives_numpy import time_weights


def advantages(scores, preference, images):
    """Of one example, [P]."""
    if scores is None and images <= 2:
        return np.array([2 * preference - 1, 1 - 2 * preference])[:images]
    scores = -np.arange(images) if scores is None else np.asarray(scores, float)
    if images > 1:
        scores = (scores - scores.mean()) / scores.std() if np.ptp(scores) else np.zeros(images)
    return np.clip(scores, -5, 5)


def evaluate(name, arrays, betas, prediction_type, *, held=None, **h):
    """The loss [B]; `arrays` and `held` as in `objectives_numpy.evaluate`, with `scores` [B, P] or None."""
    reduce = {"mean": np.mean, "sum": np.sum}[h["reduction"]]
    held = arrays["policy"] if held is None else held
    losses = []
    for i, policy in enumerate(arrays["policy"]):
        old, target, now = arrays["reference"][i], arrays["target"][i], held[i]
        images, times, p = len(policy), arrays["timesteps"][i], arrays["preference"][i]
        scores = None if arrays["scores"] is None else arrays["scores"][i]
        worth = advantages(scores, p, images)
        w, ab2 = np.ones(images), np.ones(images)
        if h["time_weight"] == "paper":
            of_paper = np.array([time_weights(betas, t, prediction_type) for t in times])
            w, ab2 = of_paper[:, 0], of_paper[:, 1] * of_paper[:, 2] ** 2

        def error(prediction, k, target=target):
            return reduce((prediction[k] - target[k]) ** 2)

        gain = np.array([w[k] * (error(old, k) - error(policy, k)) for k in range(images)])
        held_gain = np.array([w[k] * (error(old, k) - error(now, k)) for k in range(images)])
        if name == "nft":
            liked = worth / 10 + 0.5
            if scores is None and images <= 2:
                liked = np.array([p, 1 - p])[:images]
            each = []
            for k in range(images):
                abar = np.prod(1 - betas[: times[k] + 1])
                # Of x_0: sqrt(1 - abar) / sqrt(abar) times an error of eps, sqrt(1 - abar) times one of v.
                scale = np.sqrt(1 - abar) / (np.sqrt(abar) if prediction_type == "epsilon" else 1)
                terms = []
                for sign in (1, -1):
                    off, held_off = (
                        scale * (old[k] + sign * h["beta"] * (x[k] - old[k]) - target[k])
                        for x in (policy, now)
                    )
                    terms.append(reduce(off**2) / max(np.abs(held_off).mean(), 1e-5))
                each.append(ab2[k] * (liked[k] * terms[0] + (1 - liked[k]) * terms[1]) / h["beta"])
        elif name == "awm":
            ratio = np.exp(gain)
            each = np.maximum(-worth * ratio, -worth * np.clip(ratio, 1 - h["clip"], 1 + h["clip"]))
        elif name == "dgpo":
            group = 1 / (1 + np.exp(h["beta"] * np.mean(worth * held_gain)))
            each = []
            for k in range(images):
                rho = np.exp(held_gain[k])
                stopped = rho > 1 + h["clip"] if worth[k] > 0 else rho < 1 - h["clip"]
                each.append(group * worth[k] * w[k] * error(now if stopped else policy, k))
        elif name == "crd":
            reward, wanted = h["beta"] * gain, worth / 10
            each = ((reward - reward.mean()) - (wanted - wanted.mean())) ** 2
        else:  # lpo_list
            reward = h["beta"] / 2 * gain

            def ranked(places, reward=reward):
                chances = [np.exp(reward[k]) / np.exp(reward[places[j:]]).sum() for j, k in enumerate(places)]
                return -np.log(chances).sum()

            places = np.arange(images) if scores is None else np.argsort(-scores, kind="stable")
            loss = ranked(places)
            if images == 2 and scores is None:
                loss = p * loss + (1 - p) * ranked(places[::-1])
            each = loss
        losses.append(np.mean(each))
    return np.array(losses)
