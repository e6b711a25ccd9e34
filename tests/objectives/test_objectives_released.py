"""Values and gradients against torch's autograd of the formulas in the authors' released code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.objectives import Predictions, get_objective
from dspo_jax.schedules.variance_preserving import Schedule

torch = pytest.importorskip("torch")

SHAPE = (4, 2, 3, 2, 2)  # B, P, h, w, C
SEP = [1, 2, 3]
CAPTIONS = np.random.default_rng(1).normal(size=(SHAPE[0], 5))


def errors(predictions, target):
    """Of the winners, then of the losers; the released code holds a batch as [winners; losers]."""
    return (predictions - target).pow(2).mean(dim=SEP).chunk(2)


def inside_term(policy, reference, target, beta, loser_scale=1.0):
    model_w, model_l = errors(policy, target)
    ref_w, ref_l = errors(reference, target)
    model_l = model_l.detach() + loser_scale * (model_l - model_l.detach())
    return -0.5 * beta * ((model_w - model_l) - (ref_w - ref_l))


def sft(policy, reference, target):
    """Every repository here."""
    return errors(policy, target)[0].mean()


def diffusion_dpo(policy, reference, target, beta):
    """SalesforceAIResearch/DiffusionDPO, commit 5233e75, train.py, line 1145."""
    return -torch.nn.functional.logsigmoid(inside_term(policy, reference, target, beta)).mean()


def dspo(policy, reference, target, lam, detach=False):
    """huaishengzhu/DSPO, commit 8b4e09b, train.py, line 1169: without --sdxl, where gamma is 1."""
    gate = 1 - torch.sigmoid(inside_term(policy, reference, target, lam))
    gate = gate.detach() if detach else gate
    residual_w, _ = (policy - target).chunk(2)
    step_w, _ = (policy - reference).chunk(2)
    return (residual_w - lam * gate[:, None, None, None] * step_w).pow(2).mean(dim=SEP).mean()


def dspo_sdxl(policy, reference, target, beta, released_switch):
    """huaishengzhu/DSPO, commit 8b4e09b, train.py, lines 1165 and 1167: with --sdxl."""
    gate = 1 - torch.sigmoid(inside_term(policy, reference, target, beta))
    step_w, _ = (policy - reference).chunk(2)
    if released_switch and step_w.pow(2).mean() >= 0.1:
        return (gate[:, None, None, None] * step_w).pow(2).mean(dim=SEP).mean()
    return gate.pow(2).mean()


def ipo(policy, reference, target, beta):
    """diffusers' research_projects/diffusion_dpo, --loss_type ipo."""
    return (inside_term(policy, reference, target, 2.0) - 1 / (2 * beta)).pow(2).mean()


def dmpo(policy, reference, target, beta, alpha):
    """AIDC-AI/Diffusion-SDPO, commit 84fb241, train.py, line 1220: --train_method dmpo."""
    inside = inside_term(policy, reference, target, beta)
    q, p = torch.tensor(1 - alpha), torch.sigmoid(inside)
    log_p, log_not_p = -torch.nn.functional.softplus(-inside), -torch.nn.functional.softplus(inside)
    return (p * (log_p - torch.log(q)) + (1 - p) * (log_not_p - torch.log1p(-q))).mean()


def sdpo(policy, reference, target, beta, mu):
    """AIDC-AI/Diffusion-SDPO, commit 84fb241, train.py, --use_winner_preserving: one scale for its batch."""
    held = policy.detach().requires_grad_()
    error_w, error_l = (error.sum() for error in errors(held, target))
    (gradient,) = torch.autograd.grad(error_w + error_l, held)
    winner, loser = gradient.chunk(2)
    overlap = (winner * loser).sum()
    bound = (1 - mu) * winner.pow(2).sum() / overlap
    scale = bound.clamp(0, 1) if overlap > 0 else 1.0
    return -torch.nn.functional.logsigmoid(inside_term(policy, reference, target, beta, scale)).mean()


def kto(policy, reference, target, beta):
    """jacklishufan/diffusion-kto, commit 226bbd0, train_kto_sd_v1.5.py, line 1474: --halo sigmoid.

    Images with labels, here a pair's two.
    """
    gain = (reference - target).pow(2).mean(dim=SEP) - (policy - target).pow(2).mean(dim=SEP)
    baseline = gain.mean().detach().clamp(min=0)
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(len(gain) // 2)
    return (1 - torch.sigmoid(sign * beta * (gain - baseline))).mean()


def mapo(policy, reference, target, margin_weight, kappa, scale):
    """mapo-t2i/mapo, commit 374b3d3, utils.py, lines 290 to 296."""
    error_w, error_l = errors(policy, target)

    def score(error):
        return kappa * error / (torch.exp(kappa * error) - 1)

    margin = scale * (score(error_w) - score(error_l))
    return error_w.mean() - margin_weight * torch.nn.functional.logsigmoid(margin).mean()


def alpha_dpo(policy, reference, target, beta, alpha):
    """yangli-lab/Diffusion_alpha-DPO_ICLR2026, commit 67e709b, scripts/main.py, line 1137."""
    p = torch.sigmoid(inside_term(policy, reference, target, beta))
    order = alpha * p.mean().detach()
    return ((p.pow(order) - (1 - order) - order * p) / (order * (order - 1))).mean()


def hinge(policy, reference, target, beta):
    """diffusers' and align-anything's trainers, their loss_type hinge."""
    (model_w, model_l), (ref_w, ref_l) = errors(policy, target), errors(reference, target)
    return torch.relu(1 - beta * ((ref_w - ref_l) - (model_w - model_l))).mean()


def diffusion_rpo(policy, reference, target, beta, temperature):
    """yinyueqin/relative-preference-optimization, commit 7486a05, RPOTrainer, of language models.

    With Diffusion-DPO's implicit reward in the place of the log-probabilities.
    """
    (model_w, model_l), (ref_w, ref_l) = errors(policy, target), errors(reference, target)
    chosen, rejected = -0.5 * (model_w - ref_w), -0.5 * (model_l - ref_l)
    directions = torch.nn.functional.normalize(torch.from_numpy(CAPTIONS), dim=1)
    distance = 1 - directions @ directions.T
    weights = torch.softmax(-distance / temperature, dim=1)
    logits = beta * weights * (chosen[:, None] - rejected[None])
    return -torch.nn.functional.logsigmoid(logits).mean()


def orpo(policy, reference, target, beta):
    """diffusers' ORPO trainer, but for the sign of the difference, which is turned."""
    error_w, error_l = errors(policy, target)
    return error_w.mean() - beta * torch.nn.functional.logsigmoid(error_l - error_w).mean()


CASES = [
    (sft, {}),
    (diffusion_dpo, {"beta": 3.0}),
    (diffusion_dpo, {"beta": 5000.0}),
    (dspo, {"lam": 0.8}),
    (dspo, {"lam": 0.8, "detach": True}),
    (dspo, {"lam": 0.001}),
    (dspo_sdxl, {"beta": 3.0, "released_switch": False}),
    (dspo_sdxl, {"beta": 3.0, "released_switch": True}),
    (ipo, {"beta": 0.8}),
    (ipo, {"beta": 2500.0}),
    (dmpo, {"beta": 3.0, "alpha": 0.01}),
    (sdpo, {"beta": 3.0, "mu": 0.9}),
    (alpha_dpo, {"beta": 3.0, "alpha": 0.9999}),
    (alpha_dpo, {"beta": 40.0, "alpha": 0.9999}),
    (hinge, {"beta": 0.8}),
    (diffusion_rpo, {"beta": 8.0, "temperature": 0.5}),
    (diffusion_rpo, {"beta": 5000.0, "temperature": 0.25}),
    (orpo, {"beta": 0.7}),
    (kto, {"beta": 2.0}),
    (mapo, {"margin_weight": 0.1, "kappa": 0.5, "scale": 1000.0}),
]


@each_row("distance", [0.5, 0.1])  # of the policy from the reference: both sides of the switch
@each_row(("released", "given"), CASES)
def test_matches_torch_autograd_of_the_released_formula(released, given, distance):
    rng = np.random.default_rng(0)
    reference, target = rng.normal(size=(2, *SHAPE))
    policy = reference + distance * rng.normal(size=SHAPE)
    objective, schedule = get_objective(released.__name__, **given), Schedule.scaled_linear()
    if released is sdpo:  # its scale for the batch is the pair's where all pairs are the same
        policy, reference, target = (
            np.repeat(array[:1], SHAPE[0], 0) for array in (policy, reference, target)
        )
    expected, expected_gradient = torch_loss(released, given, policy, reference, target)
    arrays = [jnp.asarray(array, jnp.float32) for array in (policy, reference, target)]
    captions = jnp.asarray(CAPTIONS, jnp.float32)
    predictions = Predictions(*arrays, jnp.full(SHAPE[0], 500), captions=captions)

    def mean_loss(policy):
        return objective(dataclasses.replace(predictions, policy=policy), schedule)[0].mean()

    loss, gradient = jax.value_and_grad(mean_loss)(predictions.policy)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)
    scale = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-5 * scale)


def torch_loss(released, given, *arrays):
    """The released loss in float64 and its gradient, [B, P, h, w, C]."""

    def to_torch(array):  # -> [winners; losers] in NCHW
        return torch.from_numpy(np.concatenate([array[:, 0], array[:, 1]]).transpose(0, 3, 1, 2).copy())

    policy, reference, target = (to_torch(array) for array in arrays)
    policy.requires_grad_()
    loss = released(policy, reference, target, **given)
    loss.backward()
    winners, losers = np.split(policy.grad.numpy().transpose(0, 2, 3, 1), 2)
    return loss.item(), np.stack([winners, losers], 1)
