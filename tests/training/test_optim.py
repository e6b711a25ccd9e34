"""The optimizers against torch and their formulas, the schedules against theirs, and every refusal."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from tables import each_row
from torch.optim.adamw import adamw
from transformers.optimization import Adafactor

from dspo_jax.limits import parse
from dspo_jax.training.optim import OptimizerSettings, make_optimizer, make_schedule


def config(**changes):
    defaults = {
        "name": "adamw",
        "learning_rate": 1e-2,
        "text_encoder_learning_rate": None,
        "b1": 0.9,
        "b2": 0.999,
        "b3": 0.9999,
        "alpha": 2.0,
        "momentum": 0.95,
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "schedule": "constant",
        "warmup_steps": 0,
        "moment_dtype": "float32",
        "factored_axes": "largest",
        "scale_lr": False,
    }
    return parse(OptimizerSettings, {**defaults, **changes}, "config.optimizer")


@each_row("max_grad_norm", [0.0, 1.0])
def test_adamw_agrees_with_torch(max_grad_norm):
    random = np.random.default_rng(0)
    start = {
        "kernel": random.normal(size=(5, 3)).astype(np.float32),
        "bias": random.normal(size=(3,)).astype(np.float32),
    }
    gradients = [
        jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), start) for _ in range(5)
    ]

    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    first, second = ([torch.zeros_like(parameter) for parameter in theirs.values()] for _ in range(2))
    steps = [torch.tensor(0.0) for _ in theirs]
    ours = jax.tree.map(jnp.asarray, start)
    optimizer, _ = make_optimizer(config(max_grad_norm=max_grad_norm), total_steps=5, batch_size=1)
    state = optimizer.init(ours)
    for gradient in gradients:
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm)
        with torch.no_grad():
            # The function behind torch.optim.AdamW; the class would import torch's compiler, which takes ten
            # seconds.
            adamw(
                list(theirs.values()),
                [parameter.grad for parameter in theirs.values()],
                first,
                second,
                [],
                steps,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=1e-2,
                weight_decay=1e-2,
                eps=1e-8,
                maximize=False,
            )
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, ours)
        ours = optax.apply_updates(ours, updates)

    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=0, atol=2e-6)
        assert np.abs(ours[name] - start[name]).min() > 1e-3


def test_adafactor_takes_a_step_of_the_learning_rate_and_factors_its_moments():
    """On the first step the second moment is the gradient's own square, or its rows' and columns' means."""
    random = np.random.default_rng(0)
    row, column = random.uniform(0.5, 2, (2, 128))
    signs = {"kernel": random.choice([-1.0, 1.0], (128, 128)), "bias": random.choice([-1.0, 1.0], 5)}
    gradient = {
        "kernel": signs["kernel"] * np.outer(row, column),
        "bias": signs["bias"] * random.uniform(1, 9, 5),
    }
    start = {name: random.normal(size=value.shape) for name, value in gradient.items()}
    start, gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (start, gradient))
    optimizer, _ = make_optimizer(config(name="adafactor"), total_steps=5, batch_size=1)
    state = optimizer.init(start)
    held = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (128,) in held
    assert (128, 128) not in held
    updates, _ = optimizer.update(gradient, state, start)
    # A gradient whose squares are a product of rows and columns is factored without loss.
    for name, update in updates.items():
        np.testing.assert_allclose(update, -1e-2 * (signs[name] + 1e-2 * start[name]), rtol=1e-4, atol=1e-7)


# What is trained, and how torch lays it out.
SHAPES = {
    "conv3x3": ((3, 3, 5, 7), (3, 2, 0, 1)),
    "conv_wide": ((3, 3, 130, 129), (3, 2, 0, 1)),  # of which optax factors the other two axes
    "conv1x1": ((1, 1, 5, 7), (3, 2, 0, 1)),
    "linear": ((6, 4), (1, 0)),
    "bias": ((7,), (0,)),
}


def test_the_released_adafactor_is_that_of_transformers():
    """As the released trainers call it, for six updates of a rate that changes."""
    random = np.random.default_rng(0)
    start = {name: random.normal(size=shape).astype(np.float32) for name, (shape, _) in SHAPES.items()}
    gradients = [
        # With a scale for each of a kernel's positions, or the factors would all be about one.
        jax.tree.map(
            lambda p: (random.normal(size=p.shape) * random.uniform(0.01, 3, p.shape)).astype(np.float32),
            start,
        )
        for _ in range(6)
    ]
    theirs = {
        name: torch.nn.Parameter(torch.tensor(start[name].transpose(SHAPES[name][1]))) for name in start
    }
    theirs_optimizer = Adafactor(
        theirs.values(),
        lr=1e-2,
        weight_decay=1e-2,
        clip_threshold=1.0,
        scale_parameter=False,
        relative_step=False,
    )
    changes = {"schedule": "linear", "max_grad_norm": 0.0}
    made, rate = make_optimizer(
        config(name="adafactor", factored_axes="released", **changes), total_steps=10, batch_size=1
    )
    ours = jax.tree.map(jnp.asarray, start)
    state = made.init(ours)
    for done, gradient in enumerate(gradients):
        theirs_optimizer.param_groups[0]["lr"] = float(rate(done))
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name].transpose(SHAPES[name][1]))
        theirs_optimizer.step()
        updates, state = made.update(jax.tree.map(jnp.asarray, gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
    for name, parameter in theirs.items():
        expected = parameter.detach().numpy().transpose(np.argsort(SHAPES[name][1]))
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=2e-6, err_msg=name)
        assert np.abs(ours[name] - start[name]).mean() > 1e-2


def test_the_released_adafactor_keeps_six_numbers_of_nine():
    params = {name: jnp.zeros(shape) for name, (shape, _) in SHAPES.items()}
    made, _ = make_optimizer(config(name="adafactor", factored_axes="released"), total_steps=5, batch_size=1)
    kept = {name: 0 for name in params}
    for path, leaf in jax.tree_util.tree_leaves_with_path(made.init(params)):
        if leaf.size > 1:
            kept[path[-1].key] += leaf.size
    assert kept == {
        "conv3x3": 6 * 35,
        "conv_wide": 6 * 130 * 129,
        "conv1x1": 35,
        "linear": 10,
        "bias": 7,
    }


def test_lion_follows_its_formula():
    """Algorithm 2 of the paper in float64, with a rate that changes at every step."""
    random = np.random.default_rng(0)
    start = {"kernel": random.normal(size=(5, 3)), "bias": random.normal(size=3)}
    gradients = [jax.tree.map(lambda p: random.normal(size=p.shape), start) for _ in range(6)]
    changes = {"b1": 0.8, "b2": 0.6, "weight_decay": 0.3, "max_grad_norm": 0.0}
    optimizer, _ = make_optimizer(
        config(name="lion", schedule="linear", warmup_steps=2, **changes), total_steps=8, batch_size=1
    )
    ours = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), start)
    state = optimizer.init(ours)
    momenta, expected = {name: 0.0 for name in start}, dict(start)
    by_momentum = 0
    for gradient, rate in zip(gradients, 1e-2 * np.array([1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6]), strict=True):
        for name, g in gradient.items():
            direction = np.sign(0.8 * momenta[name] + 0.2 * g)
            by_momentum += np.sum(direction != np.sign(g))
            expected[name] = expected[name] - rate * (direction + 0.3 * expected[name])
            momenta[name] = 0.6 * momenta[name] + 0.4 * g
        given = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient)
        updates, state = optimizer.update(given, state, ours)
        ours = optax.apply_updates(ours, updates)
    assert by_momentum > 10
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-6)


def held_dtypes(optimizer, params):
    return sorted(str(leaf.dtype) for leaf in jax.tree.leaves(optimizer.init(params)) if leaf.shape)


@each_row(("name", "b2"), [("adamw", 0.999), ("lion", 0.99)])
def test_text_encoders_have_a_rate_of_their_own(name, b2):
    """Either first step is rate * (sign of the gradient + weight decay * parameter)."""
    start = {"unet": np.float32([1.0, -2.0]), "text_encoder": np.float32([3.0, 4.0])}
    gradient = {"unet": np.float32([0.5, -3.0]), "text_encoder": np.float32([-2.0, 1.0])}
    changes = {"name": name, "b2": b2, "text_encoder_learning_rate": 3e-3, "max_grad_norm": 0.0}
    optimizer, schedule = make_optimizer(config(**changes), 5, 1, ("text_encoder", "text_encoder_2"))
    params = jax.tree.map(jnp.asarray, start)
    updates, _ = optimizer.update(jax.tree.map(jnp.asarray, gradient), optimizer.init(params), params)
    for component, rate in {"unet": 1e-2, "text_encoder": 3e-3}.items():
        expected = -rate * (np.sign(gradient[component]) + 1e-2 * start[component])
        np.testing.assert_allclose(updates[component], expected, rtol=1e-5)
    assert float(schedule(0)) == pytest.approx(1e-2)


@each_row(("name", "second"), [("adamw", ["float32"]), ("lion", [])])
def test_the_first_moment_is_stored_in_its_dtype(name, second):
    params = jnp.ones((300,))
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(20, 300)), jnp.float32)
    moved = {}
    for dtype in ("float32", "bfloat16"):
        changes = {"name": name, "moment_dtype": dtype, "b2": 0.99, "weight_decay": 0.0}
        optimizer, _ = make_optimizer(config(**changes), total_steps=5, batch_size=1)
        assert held_dtypes(optimizer, params) == sorted([dtype, *second])
        state, now = optimizer.init(params), params
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, now)
            assert updates.dtype == jnp.float32
            now = optax.apply_updates(now, updates)
        assert str(jax.tree.leaves(state)[1].dtype) == dtype  # after the count
        moved[dtype] = now - params
    difference = np.linalg.norm(moved["bfloat16"] - moved["float32"]) / np.linalg.norm(moved["float32"])
    assert 0 < difference < 0.1


@each_row("name", ["adafactor", "adamw", "lion"])
def test_a_scaled_rate_is_that_of_one_example_times_the_batch(name):
    given = {"name": name, "schedule": "cosine", "warmup_steps": 2}
    scaled = config(learning_rate=1e-3, scale_lr=True, **given)
    assert scaled.peak_rate(8) == 8e-3
    params, gradient = jnp.ones((3,)), jnp.arange(1.0, 4.0)
    steps = []
    for each, batch_size in ((scaled, 8), (config(learning_rate=8e-3, **given), 999)):
        optimizer, rate = make_optimizer(each, total_steps=10, batch_size=batch_size)
        np.testing.assert_allclose(rate(1), 8e-3, rtol=1e-6)
        steps.append(optimizer.update(gradient, optimizer.init(params), params)[0])
    assert np.abs(steps[0]).min() > 1e-3
    np.testing.assert_allclose(*steps, rtol=1e-6)


@each_row(
    ("schedule", "decay"),
    [
        ("constant", lambda progress: 1.0),
        ("linear", lambda progress: 1 - progress),
        ("cosine", lambda progress: 0.5 * (1 + np.cos(np.pi * progress))),
    ],
)
def test_schedules_follow_their_formula(schedule, decay):
    rate = make_schedule(schedule, 2.0, 4, total_steps=24)
    np.testing.assert_allclose(rate(jnp.arange(4)), [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    expected = [2 * decay((step - 4) / 20) for step in range(4, 25)]
    np.testing.assert_allclose(rate(jnp.arange(4, 25)), expected, rtol=1e-5, atol=1e-6)


@each_row(
    ("warmup_steps", "expected"),
    [
        # Updates 1 to 4 warm up; the 9th has sqrt(4 / 9) of the peak, the 16th a half.
        (4, {0: 0.5, 1: 1.0, 3: 2.0, 4: 2 * 0.8**0.5, 8: 4 / 3, 15: 1.0, 399: 0.2}),
        (0, {0: 2.0, 3: 1.0, 15: 0.5, 399: 0.1}),
    ],
)
def test_inverse_sqrt_by_hand(warmup_steps, expected):
    for total_steps in (2, 1000):  # not read, and the warm-up may be longer than the run
        rate = make_schedule("inverse_sqrt", 2.0, warmup_steps, total_steps)
        np.testing.assert_allclose([rate(done) for done in expected], list(expected.values()), rtol=1e-6)


def test_a_missing_key_is_named():
    incomplete = dataclasses.asdict(config())
    del incomplete["eps"]
    with pytest.raises(ValueError, match=r"config\.optimizer\.eps: missing"):
        parse(OptimizerSettings, incomplete, "config.optimizer")


def test_the_optimizer_uses_the_schedule_it_returns():
    optimizer, rate = make_optimizer(config(warmup_steps=3, weight_decay=0.0), total_steps=10, batch_size=1)
    params = jnp.ones((2,))
    state = optimizer.init(params)
    for step in range(5):
        # Under a constant gradient Adam's step has size 1 before the learning rate.
        updates, state = optimizer.update(jnp.ones((2,)), state, params)
        np.testing.assert_allclose(updates, -rate(step) * np.ones(2), rtol=1e-5)


@each_row(
    ("changes", "message"),
    [
        (
            {"name": "adam"},
            r"config\.optimizer\.name = 'adam': unknown; did you mean 'adamw'\?.*adafactor, adamw, .*\)",
        ),
        ({"schedule": "cosin"}, r"config\.optimizer\.schedule = 'cosin': unknown; did you mean 'cosine'\?"),
        (
            {"wieght_decay": 0.1},
            r"a key of config\.optimizer = 'wieght_decay': unknown; did you mean 'weight_decay'\?",
        ),
        (
            {"learning_rate": -1.0},
            r"config\.optimizer\.learning_rate = -1\.0: must be finite and not negative",
        ),
        ({"learning_rate": math.nan}, r"config\.optimizer\.learning_rate = nan: must be finite"),
        (
            {"text_encoder_learning_rate": -1.0},
            r"config\.optimizer\.text_encoder_learning_rate = -1\.0: must be finite and not negative",
        ),
        (
            {"text_encoder_learning_rate": 1e-3, "learning_rate": 0.0},
            r"config\.optimizer\.learning_rate = 0: must be above 0 where text_encoder_learning_rate",
        ),
        (
            {"text_encoder_learning_rate": 1e-3, "name": "prodigy", "learning_rate": 1.0},
            r"config\.optimizer\.text_encoder_learning_rate = 0\.001: prodigy has one rate",
        ),
        ({"eps": 0.0}, r"config\.optimizer\.eps = 0: must be above 0"),
        (
            {"moment_dtype": "bflot16"},
            r"config\.optimizer\.moment_dtype = 'bflot16': unknown; did you mean 'bfloat16'\?.*float32\)",
        ),
        (
            {"factored_axes": "last"},
            r"config\.optimizer\.factored_axes = 'last': unknown.* \(allowed: largest, released\)",
        ),
        (
            {"name": "adafactor", "moment_dtype": "bfloat16"},
            r"config\.optimizer\.moment_dtype = 'bfloat16': adafactor keeps no first moment",
        ),
        (
            {"name": "lion", "moment_dtype": "bfloat16"},
            r"config\.optimizer\.b2 = 0\.999: is 1 in bfloat16, .* use 0\.99 or less",
        ),
        (
            {"b1": 0.9985, "moment_dtype": "bfloat16"},
            r"config\.optimizer\.b1 = 0\.9985: is 1 in bfloat16, .* use 0\.99 or less",
        ),
        ({"b2": 1.0}, r"config\.optimizer\.b2 = 1\.0: must be at least 0 and below 1"),
        (
            {"max_grad_norm": -1.0},
            r"config\.optimizer\.max_grad_norm = -1\.0: must be finite and not negative",
        ),
        (
            {"schedule": "linear", "warmup_steps": 10},
            r"config\.optimizer\.warmup_steps = 10: must be below the run's 10 steps for schedule 'linear'",
        ),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        make_optimizer(config(**changes), total_steps=10, batch_size=1)
