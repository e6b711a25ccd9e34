"""Values and gradients against torch's autograd of the losses in the authors' released code.

The releases compute log p of a step as a mean over the latent, from the network's prediction; here it goes
through `samplers.log_probability`, which is a sum, and the size that the loss divides by.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.objectives.policy_gradient import get_policy_gradient
from dspo_jax.objectives.steps import Steps, divergence
from dspo_jax.samplers import log_probability

torch = pytest.importorskip("torch")

ROWS, LATENT = 12, (3, 2, 4)
SIZE = 24
SEP = [-3, -2, -1]


def ddim_log_prob(prediction, data):
    """The mean of the normal log-density over a latent; all three repositories share it."""
    mean = data["a"] * data["x"] + data["c"] * prediction
    deviation = data["s"]
    log_prob = -((data["reached"] - mean) ** 2) / (2 * deviation**2) - torch.log(deviation)
    log_prob = log_prob - torch.log(torch.sqrt(2 * torch.as_tensor(np.pi)))
    return log_prob.mean(dim=SEP)


def ddpo(prediction, data, clip, advantage_clip):
    """kvablack/ddpo-pytorch, scripts/train.py."""
    advantages = data["advantage"].clamp(-advantage_clip, advantage_clip)
    ratio = torch.exp(ddim_log_prob(prediction, data)[:, 0] - ddim_log_prob(data["old"], data)[:, 0])
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, clipped).mean()


def grpo(prediction, data, clip, advantage_clip, beta):
    """yifan123/flow_grpo, scripts/train_sd3.py: that loss, and the mean over a latent of KL's square."""
    change = data["c"] * (prediction - data["reference"])
    kl = (change**2).mean(dim=SEP, keepdim=True) / (2 * data["s"] ** 2)
    return ddpo(prediction, data, clip, advantage_clip) + beta * kl.mean()


def dpok(prediction, data, clip, alpha, beta, kl):
    """google-research/dpok, train_online_pg.py: reward_weight, kl_weight, ratio_clip."""
    assert kl == "prediction"
    ratio = torch.exp(ddim_log_prob(prediction, data)[:, 0] - ddim_log_prob(data["old"], data)[:, 0])
    loss = (-alpha * data["advantage"] * ratio.clamp(1 - clip, 1 + clip)).mean()
    return loss + beta * ((prediction - data["reference"]) ** 2).mean(dim=SEP).mean()


def d3po(prediction, data, clip, beta):
    """yk7333/d3po, scripts/train_with_rm.py: human_prefer is (1, -1), (-1, 1) or, for a tie, (0, 0)."""
    log_ratio = ddim_log_prob(prediction, data) - ddim_log_prob(data["reference"], data)
    ratio_0, ratio_1 = torch.exp(log_ratio).clamp(1 - clip, 1 + clip).unbind(1)
    prefer = torch.stack([data["label"], -data["label"]], 1)
    inside = beta * torch.log(ratio_0) * prefer[:, 0] + beta * torch.log(ratio_1) * prefer[:, 1]
    return -torch.log(torch.sigmoid(inside)).mean()


CASES = [
    (ddpo, {"clip": 0.02, "advantage_clip": 1.0}, 1),
    (grpo, {"clip": 0.02, "advantage_clip": 1.0, "beta": 0.04}, 1),
    (dpok, {"clip": 0.02, "alpha": 10.0, "beta": 0.01, "kl": "prediction"}, 1),
    (d3po, {"clip": 0.1, "beta": 0.1}, 2),
]


def make_data(images):
    """Stored numbers of steps: states, predictions of three networks, coefficients and rewards."""
    rng = np.random.default_rng(0)
    shape = (ROWS, images, *LATENT)
    x, z, old = rng.normal(size=(3, *shape))
    rate = np.geomspace(1e-3, 1, ROWS)[:, None, None, None, None]  # from inside the clip to far outside
    scalar = (ROWS, 1, 1, 1, 1)
    data = {"a": rng.uniform(0.8, 1.1, scalar), "c": rng.uniform(-0.9, -0.3, scalar)}
    data |= {"s": rng.uniform(0.1, 0.5, scalar), "x": x, "old": old}
    data["reached"] = data["a"] * x + data["c"] * old + data["s"] * z
    data["reference"] = old + 0.5 * rate * rng.normal(size=shape)
    data |= {"advantage": rng.normal(size=ROWS), "label": np.tile([1.0, -1.0, 0.0], ROWS // 3)}
    return data, old + rate * rng.normal(size=shape)


def collect_steps(prediction, data, images):
    """What a caller gives to the loss, from the same numbers."""
    deviation = data["s"].reshape(ROWS, 1) * jnp.ones((ROWS, images), jnp.float32)

    def log_p(prediction):
        mean = data["a"] * data["x"] + data["c"] * prediction
        flat = (array.reshape(-1, *LATENT) for array in (data["reached"], mean))
        return log_probability(*flat, deviation.reshape(-1)).reshape(ROWS, images)

    return Steps(
        log_probability=log_p(prediction),
        old_log_probability=log_p(data["old"]),
        reference_log_probability=log_p(data["reference"]),
        kl=divergence(data["c"] * prediction, data["c"] * data["reference"], deviation),
        prediction_error=jnp.square(prediction - data["reference"]).mean((2, 3, 4)),
        advantage=data["advantage"] if images == 1 else data["label"],
        size=SIZE,
    )


@each_row(("released", "given", "images"), CASES)
def test_matches_torch_autograd_of_the_released_loss(released, given, images):
    data, policy = make_data(images)
    tensors = {name: torch.from_numpy(array) for name, array in data.items()}
    prediction = torch.from_numpy(policy).requires_grad_()
    expected = released(prediction, tensors, **given)
    expected.backward()
    wanted = prediction.grad.numpy()

    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in data.items()}
    method = get_policy_gradient(released.__name__, **given)

    def mean_loss(prediction):
        loss, metrics = method(collect_steps(prediction, arrays, images))
        return loss.mean(), metrics

    (loss, metrics), gradient = jax.value_and_grad(mean_loss, has_aux=True)(jnp.asarray(policy, jnp.float32))
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
    assert 0 < metrics["clipped"].mean() < 1  # the case has rows on both sides
