"""A step on rectified flow: flow-DPO through the preference loss, against torch in float64."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_task import make_batch, make_params, make_reference, make_state, make_task
from tables import each_row

from configs import common
from dspo_jax.errors import UserError
from dspo_jax.limits import parse
from dspo_jax.objectives import get_objective
from dspo_jax.samplers import make_sampler
from dspo_jax.schedules.rectified_flow import RectifiedFlow
from dspo_jax.schedules.sigma_draws import LogitNormal
from dspo_jax.schedules.variance_preserving import Schedule
from dspo_jax.training.losses.preference import draw_noise
from dspo_jax.training.online_checks import check_drawing
from dspo_jax.training.settings import parse as parse_settings
from dspo_jax.training.step import train_step
from dspo_jax.training.stream_settings import StreamSettings
from dspo_jax.training.trajectory_stream import noisy_calls

FLOW = RectifiedFlow(shift=3.0)
KEY = jax.random.key(0)
BETA = 1500.0
BATCH = make_batch()
DRAW = {"levels": LogitNormal(), "caption_dropout": 0.0}


def flow_task(name="diffusion_dpo", **hyperparameters):
    return make_task(name, DRAW, FLOW, **hyperparameters)


def in_torch(weight=None):
    """Loss and gradient of -log sigmoid(-(beta/2) D), D of squared errors of eps - x_0, by its definition.

    `weight`: of the squared errors, a function of sigma.
    """
    torch = pytest.importorskip("torch")

    def double(array):
        return torch.tensor(np.asarray(array), dtype=torch.float64)

    x0, eps, sigma, _ = map(np.asarray, draw_noise(flow_task().loss.draws, BATCH, KEY))
    x0, eps, sigma = map(double, (x0, eps, sigma))
    policy = {name: double(leaf).requires_grad_() for name, leaf in make_params(0).items()}
    reference = {name: double(leaf) for name, leaf in make_params(1).items()}
    text = 0.01 * double(BATCH["tokens"]).mean((1, 2))

    def network(params, x):
        """`DensePipeline.predict`, which is told t = 1000 sigma and divides by 1000."""
        hidden = x @ params["in"] + sigma[..., None, None, None] + text[:, None, None, None, None]
        return torch.tanh(torch.tanh(hidden) @ params["middle"]) @ params["out"]

    level = sigma[..., None, None, None]
    x_t, v = (1 - level) * x0 + level * eps, eps - x0
    errors = [((network(params, x_t) - v) ** 2).mean((2, 3, 4)) for params in (policy, reference)]
    drift = (errors[0] - errors[1]) * (1.0 if weight is None else weight(sigma))
    loss = -torch.nn.functional.logsigmoid(-BETA / 2 * (drift[:, 0] - drift[:, 1]))
    preference = double(BATCH["preference"])
    swapped = -torch.nn.functional.logsigmoid(BETA / 2 * (drift[:, 0] - drift[:, 1]))
    total = (preference * loss + (1 - preference) * swapped).mean()
    total.backward()
    return total.item(), {name: leaf.grad.numpy() for name, leaf in policy.items()}


WEIGHTS = {
    "none": None,
    "epsilon": lambda sigma: (1 - sigma) ** 2,
    # Of 1000 steps of equal size, times 1000 / 2.
    "paper": lambda sigma: 500 * 1e-3 * (2 * sigma - 1e-3 - 2 * sigma * (sigma - 1e-3)) / (sigma - 1e-3) ** 2,
}


@each_row("time_weight", WEIGHTS)
def test_flow_dpo_and_its_gradient_match_torch_in_float64(time_weight) -> None:
    task = flow_task(beta=BETA, time_weight=time_weight)
    reference = make_reference(task, seed=1)

    @jax.jit
    def evaluate(params):
        return jax.value_and_grad(lambda params: task.loss(params, task, reference, BATCH, KEY)[0])(params)

    loss, gradient = evaluate({"unet": make_params(0)})
    expected, gradients = in_torch(WEIGHTS[time_weight])
    assert expected > 1  # beta times the drift is no small number: the sigmoid is bent
    np.testing.assert_allclose(loss, expected, rtol=2e-4)
    for name, theirs in gradients.items():
        ours = gradient["unet"][name]
        np.testing.assert_allclose(ours, theirs, atol=5e-4 * np.abs(theirs).max(), err_msg=name)


def test_a_step_trains_on_levels_in_float32_whatever_the_compute_dtype() -> None:
    task = make_task("diffusion_dpo", DRAW | {"compute_dtype": "bfloat16"}, FLOW, beta=BETA)
    told = []
    predict = type(task.pipe).predict

    class Watched(type(task.pipe)):
        def predict(self, params, latents, timesteps, text, *, remat):
            told.append((timesteps.dtype, latents.dtype))
            return predict(self, params, latents, timesteps, text, remat=remat)

    task = dataclasses.replace(task, pipe=Watched(FLOW))
    state, metrics = jax.jit(train_step)(make_state(task), make_reference(task), BATCH, KEY)
    assert set(told) == {(jnp.dtype("float32"), jnp.dtype("bfloat16"))}
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    moved = jax.tree.map(
        lambda now, then: float(jnp.abs(now - then).max()), state.params["unet"], make_params(0)
    )
    assert min(moved.values()) > 0


def test_levels_are_drawn_by_example_and_shared_by_a_pair() -> None:
    draws = flow_task().loss.draws
    _, _, levels, _ = draw_noise(draws, BATCH, KEY)
    assert levels.dtype == jnp.float32
    np.testing.assert_array_equal(levels[:, 0], levels[:, 1])
    assert len(np.unique(levels)) == len(levels)
    part = {name: array[3:5] for name, array in BATCH.items()}
    np.testing.assert_array_equal(draw_noise(draws, part, KEY)[2], levels[3:5])
    apart = dataclasses.replace(draws, share_timesteps=False)
    assert not np.any(np.equal(*np.moveaxis(draw_noise(apart, BATCH, KEY)[2], 1, 0)))


@each_row("name", ["sft", "ddpm", "ipo", "dmpo", "sdpo", "kto", "mapo", "orpo", "dspo", "dspo_ref", "dspo_e"])
def test_objectives_carry_over_to_flow(name) -> None:
    """None refuses the process, and loss and metrics are finite with weights of the level."""
    task = flow_task(name, time_weight="paper")
    task.loss.objective.check_process(FLOW)
    loss, metrics = task.loss({"unet": make_params(0)}, task, make_reference(task, seed=1), BATCH, KEY)
    assert np.isfinite(loss)
    assert all(np.isfinite(value) for value in metrics.values())


def test_nft_on_a_flow_compares_images_x_minus_sigma_v() -> None:
    rng = np.random.default_rng(0)
    policy, old, target, x = rng.normal(size=(4, 2, 1, 3, 3, 4)).astype(np.float32)
    levels = np.array([[0.3], [0.8]], np.float32)
    from dspo_jax.objectives import Predictions

    liked = np.array([0.9, 0.2], np.float32)
    loss, _ = get_objective("nft", beta=0.5)(
        Predictions(*map(jnp.asarray, (policy, old, target, levels, liked))), FLOW
    )
    expected = []
    for i, q in enumerate(liked.astype(np.float64)):
        sigma, image = levels[i, 0].astype(np.float64), x[i] - levels[i, 0].astype(np.float64) * target[i]
        parts = []
        for sign in (1, -1):
            found = x[i] - sigma * (old[i] + sign * 0.5 * (policy[i].astype(np.float64) - old[i]))
            parts.append(np.mean((found - image) ** 2) / np.mean(np.abs(found - image)))
        expected.append((q * parts[0] + (1 - q) * parts[1]) / 0.5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_released_switch_of_dspo_sdxl_is_refused_for_a_flow() -> None:
    with pytest.raises(UserError, match=r"config\.objective\.released_switch = True: .*velocity"):
        get_objective("dspo_sdxl", released_switch=True).check_process(FLOW)
    get_objective("dspo_sdxl").check_process(FLOW)


def test_a_sampler_of_another_process_is_refused_by_key() -> None:
    for process, sampler, named in (
        (FLOW, "ddim", "flow_euler, flow_ancestral"),
        (Schedule.scaled_linear(), "flow_grpo", "ddim"),
    ):
        stream = SimpleNamespace(sampler=sampler, num_inference_steps=10)
        with pytest.raises(UserError, match=rf"config\.stream\.sampler = '{sampler}': .*these do: {named}, "):
            check_drawing(SimpleNamespace(stream=stream), SimpleNamespace(schedule=process))


@each_row(
    ("process", "kind", "sampler"),
    [
        (FLOW, "own_pairs", "flow_euler"),
        (FLOW, "trajectories", "flow_ancestral"),
        (Schedule.scaled_linear(), "prompts", "ddim"),
        (Schedule.scaled_linear(), "trajectories", "ddim"),
    ],
)
def test_a_stream_draws_with_a_sampler_of_the_models_process(process, kind, sampler) -> None:
    config = common.get_config()
    config.objective.name, config.objective.beta = "diffusion_dpo", 1500.0
    config.stream.kind = kind
    if kind != "own_pairs":
        config.rewards.train = "compressibility"
    settings = parse_settings(config).with_sampler(process)
    assert settings.stream.drawing.sampler == settings.given["stream"]["sampler"] == sampler
    assert settings.with_sampler(FLOW).stream.sampler == sampler  # one that is named stays


def test_policy_gradients_train_on_the_steps_that_have_a_density() -> None:
    def calls(name, eta):
        sampler = make_sampler(name, FLOW, {}, 5, eta=eta if name != "flow_euler" else 0.0)
        keys = common.get_config().stream.to_dict() | {"sampler": name, "eta": eta}
        return noisy_calls(sampler, parse(StreamSettings, keys, "config.stream")).tolist()

    assert calls("flow_ancestral", 0.7) == [0, 1, 2, 3]
    assert calls("flow_grpo", 0.7) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"config\.stream\.eta = 0: .*must be above 0"):
        calls("flow_grpo", 0.0)
    with pytest.raises(UserError, match=r"config\.stream\.sampler = 'flow_euler': .*take 'flow_ancestral'"):
        calls("flow_euler", 1.0)


def test_the_first_lines_of_a_run_say_which_levels_are_drawn() -> None:
    lines = flow_task(beta=BETA).loss.notes(64)
    assert lines[0].startswith("noise levels: sigmoid of N(0, 1^2), shift 1: median sigma 0.5, mean of (1 - ")
    assert lines[1].startswith("diffusion_dpo: beta = 1500 ")
