"""AdEMAMix, Muon, Prodigy and schedule-free AdamW: formulas in float64, meshes, whole runs, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import each_row
from tiny_run import make_config, read_reproducible

from configs import common
from dspo_jax.conversion.export_model import export
from dspo_jax.limits import parse
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.parallel.rules import make_shardings
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training import schedule_free, settings
from dspo_jax.training.make_task import make_task
from dspo_jax.training.optim import OptimizerSettings, make_optimizer
from dspo_jax.training.run import train
from dspo_jax.weights.saved_params import restore_params

NEW = ("ademamix", "muon", "prodigy", "schedule_free")
RATES = 1e-2 * np.array([1 / 3, 2 / 3, *[1] * 17])  # a warm-up of three updates


def build(name, **changes):
    """The optimizer alone."""
    keys = common.get_config().optimizer.to_dict() | {
        "name": name,
        "learning_rate": 10.0 if name == "prodigy" else 1e-2,
        "warmup_steps": 3,
        "max_grad_norm": 0.0,
        **changes,
    }
    return make_optimizer(parse(OptimizerSettings, keys, "config.optimizer"), 100, 8)[0]


def make_problem(scale=1.0):
    """Parameters of each kind, and gradients that agree in part, in float64."""
    random = np.random.default_rng(0)
    shapes = {"kernel": (5, 3), "wide": (3, 7), "conv": (3, 3, 2, 4), "embedding": (6, 4), "bias": (3,)}
    start = {name: scale * random.normal(size=shape) for name, shape in shapes.items()}
    drift = {name: random.normal(size=shape) for name, shape in shapes.items()}
    gradients = [{name: each + random.normal(size=each.shape) for name, each in drift.items()} for _ in RATES]
    return start, gradients


def follow(optimizer, start, gradients):
    """The parameters after the updates, and the optimizer's state."""
    params, gradients = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (start, gradients))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(ours, expected, start, rtol=1e-5):
    for name, value in expected.items():
        moved = value - start[name]
        np.testing.assert_allclose(ours[name] - start[name], moved, atol=rtol * np.abs(moved).max())


def adamw(start, gradients, decay=0.01, b1=0.9, b2=0.999, alpha=0.0, b3=0.0):
    """AdamW, or AdEMAMix with its slow moment."""
    p, m, slow, v = start, 0.0, 0.0, 0.0
    for n, (g, rate) in enumerate(zip(gradients, RATES, strict=True), 1):
        m, slow, v = b1 * m + (1 - b1) * g, b3 * slow + (1 - b3) * g, b2 * v + (1 - b2) * g**2
        step = (m / (1 - b1**n) + alpha * slow) / (np.sqrt(v / (1 - b2**n)) + 1e-8)
        p = p - rate * (step + decay * p)
    return p


def test_ademamix_follows_its_formula():
    start, gradients = make_problem()
    expected = {
        name: adamw(start[name], [g[name] for g in gradients], alpha=3.0, b3=0.98, b1=0.8, b2=0.9)
        for name in start
    }
    changes = {"alpha": 3.0, "b3": 0.98, "b1": 0.8, "b2": 0.9}
    assert_close(follow(build("ademamix", **changes), start, gradients)[0], expected, start)


def orthogonalize(matrix):
    """Five times the polynomial of Newton-Schulz, of each singular value."""
    left, values, right = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return left @ np.diag(values) @ right


def test_muon_orthogonalizes_matrices_and_leaves_the_rest_to_adamw():
    start, gradients = make_problem()
    expected = {name: adamw(start[name], [g[name] for g in gradients]) for name in start}
    for name in ("kernel", "wide"):
        p, m, b = start[name], 0.0, 0.7
        for n, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), 1):
            g = gradient[name]
            m = b * m + (1 - b) * g
            nesterov = b * m / (1 - b ** (n + 1)) + (1 - b) * g / (1 - b**n)
            step = 0.2 * np.sqrt(max(p.shape)) * orthogonalize(nesterov)
            p = p - rate * (step + 0.01 * p)
        expected[name] = p
    ours, _ = follow(build("muon", momentum=0.7), start, gradients)
    assert_close(ours, expected, start, rtol=1e-4)


def test_prodigy_finds_its_rate_by_its_formula():
    """As its authors' code, with `use_bias_correction` and `safeguard_warmup`."""
    start, gradients = make_problem(scale=1e-4)
    flat = np.concatenate([start[name].ravel() for name in start])
    p, m, s, v, numerator, d, found = flat, 0.0, 0.0, 0.0, 0.0, 1e-6, []
    for n, (gradient, rate) in enumerate(zip(gradients, 1000 * RATES, strict=True), 1):
        g = np.concatenate([gradient[name].ravel() for name in start])
        step = d * rate * np.sqrt(1 - 0.999**n) / (1 - 0.9**n)
        numerator = 0.999**0.5 * numerator + d / 1e-6 * step * (g @ (flat - p))
        s = 0.999**0.5 * s + d / 1e-6 * d * g
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * (d * g) ** 2
        d = max(d, numerator / np.abs(s).sum())
        p = p - step * (m / (np.sqrt(v) + d * 1e-8) + 0.01 * p)
        found.append(d)
    assert found[-1] > 3 * found[0]
    ours, state = follow(build("prodigy"), start, gradients)
    assert state.estim_lr == pytest.approx(d, rel=1e-4)
    assert_close({"": np.concatenate([np.ravel(ours[name]) for name in start])}, {"": p}, {"": flat}, 1e-3)


def test_schedule_free_adamw_averages_by_the_square_of_the_rate():
    start, gradients = make_problem()
    trained, averaged = {}, {}
    for name in start:
        x = y = z = start[name]
        v, total = 0.0, 0.0
        for n, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), 1):
            v = 0.999 * v + 0.001 * gradient[name] ** 2
            z = z - rate * (gradient[name] / (np.sqrt(v / (1 - 0.999**n)) + 1e-8) + 0.01 * y)
            total += rate**2
            x = x + rate**2 / total * (z - x)
            y = 0.2 * z + 0.8 * x
        trained[name], averaged[name] = y, x
    ours, state = follow(build("schedule_free", b1=0.8, max_grad_norm=1e9), start, gradients)
    assert_close(ours, trained, start)
    assert_close(schedule_free.average(state, ours), averaged, start, rtol=1e-4)
    assert np.abs(averaged["kernel"] - trained["kernel"]).max() > 1e-3


def test_muon_keeps_one_moment_of_a_matrix_in_its_dtype():
    start, _ = make_problem()
    params = jax.tree.map(jnp.float32, start)
    state = build("muon", moment_dtype="bfloat16").init(params)
    held = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if (name := jax.tree_util.keystr(path[-1:], simple=True)) in start:
            held.setdefault(name, []).append(str(leaf.dtype))
    adam = ["bfloat16", "float32"]
    matrices = {"kernel": ["bfloat16"], "wide": ["bfloat16"]}
    assert held == matrices | {"conv": adam, "embedding": adam, "bias": adam}


@each_row("name", NEW)
def test_an_update_does_not_depend_on_the_mesh(name):
    """Muon's products of matrices and Prodigy's sums run over all of a parameter, wherever its parts lie."""
    random = np.random.default_rng(0)
    shapes = {"kernel": (16, 64), "wide": (64, 24), "bias": (8,)}
    start, *gradients = (
        {key: np.float32(random.normal(size=shape) / 100) for key, shape in shapes.items()} for _ in range(4)
    )
    mesh = make_mesh({"data": 2, "fsdp": 4, "tensor": 1}, jax.devices())
    whole, whole_state = follow(build(name), start, gradients)
    shardings = make_shardings(start, mesh)
    split, state = follow(build(name), *jax.device_put((start, gradients), (shardings, [shardings] * 3)))
    for ours, expected in zip(
        jax.tree.leaves((split, state)), jax.tree.leaves((whole, whole_state)), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    held = make_shardings(jax.eval_shape(build(name).init, start), mesh)
    for path, sharding in jax.tree_util.tree_leaves_with_path(held):
        split_by = jax.tree_util.keystr(path[-1:], simple=True) in ("kernel", "wide")
        assert ("fsdp" in str(sharding.spec)) == split_by, path


RUN = {
    "muon": {"lora.rank": 2, "mesh.fsdp": 2, "accumulation": 2, "batch_size": 16},
    "schedule_free": {"checkpoint.max_to_keep": 4},
    "ademamix": {"mesh.fsdp": 2},
    "prodigy": {"lora.rank": 2, "optimizer.learning_rate": 1.0},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.ci if i < 2 else pytest.mark.slow) for i, name in enumerate(RUN)],
)
def test_a_run_goes_on_as_if_it_had_not_stopped(name, shallow_model, tiny_pairs, tmp_path):
    changes = {"objective.name": "diffusion_dpo", "optimizer.name": name, "checkpoint.every": 1} | RUN[name]
    for folder, ends in (("whole", (4,)), ("parts", (2, 4))):
        for steps in ends:
            config = make_config(shallow_model, tiny_pairs, changes | {"steps": steps})
            assert train(config, tmp_path / folder).finished
    whole, parts = (read_reproducible(tmp_path / folder) for folder in ("whole", "parts"))
    assert whole == parts
    assert abs(whole[-1]["loss"] - np.log(2)) > 1e-7
    if name == "schedule_free":
        assert_export_is_the_mean_of_the_fast_iterates(tmp_path)


def assert_export_is_the_mean_of_the_fast_iterates(tmp_path):
    """With a constant rate x is the mean of z, which the saved y = 0.1 z + 0.9 x give back one by one."""
    x = None
    for n in range(1, 5):
        saved, _ = restore_params(tmp_path / "whole" / "checkpoints", n, "params")
        y = jax.tree.map(np.float64, saved["unet"])
        x = x or jax.tree.map(np.zeros_like, y)
        x = jax.tree.map(
            lambda y, x, n=n: ((n - 1) * x + (y - 0.9 * (n - 1) / n * x) / (0.1 + 0.9 / n)) / n, y, x
        )
    export(tmp_path / "whole", tmp_path / "out")
    exported = load_pipeline(tmp_path / "out").read_params("unet")
    for ours, mean, last in zip(*map(jax.tree.leaves, (exported, x, y)), strict=True):
        np.testing.assert_allclose(ours, mean, rtol=0, atol=1e-6)
        assert np.abs(mean - last).max() > 1e-5


@each_row(
    ("changes", "message"),
    [
        (
            {"name": "prodigy", "learning_rate": 1e-5},
            r"learning_rate = 1e-05: prodigy finds the rate.* set it to 1",
        ),
        (
            {"name": "prodigy", "learning_rate": 1.0, "scale_lr": True},
            r"learning_rate = 1: .*scale_lr",
        ),
        ({"name": "schedule_free", "schedule": "cosine"}, r"schedule = 'cosine': schedule_free.*'constant'"),
        ({"name": "schedule_free", "b1": 0.0}, r"b1 = 0: must be above 0 for schedule_free"),
        ({"name": "muon", "eps": 0.0}, r"eps = 0: must be above 0"),
        ({"name": "muon", "momentum": 1.0}, r"momentum = 1\.0: must be at least 0 and below 1"),
        (
            {"name": "muon", "momentum": 0.999, "moment_dtype": "bfloat16"},
            r"momentum = 0\.999: is 1 in bfloat16",
        ),
        ({"name": "ademamix", "b3": 1.0}, r"b3 = 1\.0: must be at least 0 and below 1"),
        ({"name": "ademamix", "alpha": -1.0}, r"alpha = -1\.0: must be finite and not negative"),
        (
            {"name": "ademamix", "moment_dtype": "bfloat16"},
            r"moment_dtype = 'bfloat16': ademamix keeps.*'float32'",
        ),
    ],
)
def test_refusals(changes, message):
    keys = common.get_config().optimizer.to_dict() | {"warmup_steps": 0} | changes
    with pytest.raises(ValueError, match=rf"^config\.optimizer\.{message}[^\n]*$"):
        make_optimizer(parse(OptimizerSettings, keys, "config.optimizer"), 100, 8)


@each_row(
    ("changes", "message"),
    [
        (
            {"ema_decay": 0.9},
            r"config\.ema_decay = 0\.9: schedule_free keeps an average of its own; set it to 0",
        ),
        (
            {"param_dtype": "bfloat16"},
            r"config\.param_dtype = 'bfloat16': .*schedule_free's average.*'float32'",
        ),
    ],
)
def test_schedule_free_does_not_go_with(changes, message, shallow_model):
    config = make_config(shallow_model, "", {"optimizer.name": "schedule_free", **changes})
    with pytest.raises(ValueError, match=rf"^{message}$"):
        make_task(settings.parse(config), load_pipeline(shallow_model))
