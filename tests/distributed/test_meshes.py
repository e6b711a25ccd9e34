"""The same trajectory however the arrays lie: 20 steps on every mesh, whole and by adapters."""

import jax
import numpy as np
import pytest
from tiny_run import make_config, read_batches

from dspo_jax.parallel.mesh import make_mesh, replicated, shard_batch
from dspo_jax.parallel.rules import bytes_per_device
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_adapters, make_state
from dspo_jax.training.step import compile_step

pytestmark = pytest.mark.ci


STEPS = 20
# Of AdamW's first updates only the signs of tiny gradients would count, and those are rounding.
SETTINGS = {
    "objective.name": "dspo",
    "objective.reward_scale": 10.0,
    "objective.score_weight": 1.0,
    "optimizer.eps": 1e-4,
    "optimizer.learning_rate": 1e-2,
    "batch_size": 16,
}
KINDS = {"full": {"train_text_encoder": True}, "lora": {"lora.rank": 4}}
MESHES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]
# One of each; the other half runs with `pytest -m slow`.
FAST = {("full", (2, 2, 2), 2), ("lora", (2, 4, 1), 2)}


class Trajectory:
    """20 steps of a run on a mesh: losses, and what a device held."""

    def __init__(self, shallow_model, batches, kind, mesh_shape, accumulation):
        config = make_config(shallow_model, ".", {**SETTINGS, **KINDS[kind], "accumulation": accumulation})
        pipe = load_pipeline(shallow_model)
        task = make_task(parse(config), pipe)
        sizes = dict(zip(("data", "fsdp", "tensor"), mesh_shape, strict=True))
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod(mesh_shape))])
        state, reference = make_state(task, mesh, make_adapters(parse(config), pipe))
        self.bytes = {"params": bytes_per_device(state.params), "moments": bytes_per_device(state.opt_state)}
        step = compile_step(state)
        key = jax.device_put(jax.random.key(0), replicated(mesh))
        self.metrics = []
        for batch in batches:
            state, metrics = step(state, reference, shard_batch(batch, mesh), key)
            self.metrics.append({name: float(value) for name, value in metrics.items()})


@pytest.fixture(scope="module")
def batches(tiny_pairs):
    return read_batches(tiny_pairs, batch_size=16, count=STEPS)


@pytest.fixture(scope="module")
def on_one_device(shallow_model, batches):
    return {kind: Trajectory(shallow_model, batches, kind, (1, 1, 1), 1) for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "mesh_shape", "accumulation"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in ((kind, shape, parts) for kind in KINDS for shape in MESHES for parts in (1, 2))
    ],
)
def test_the_trajectory_does_not_depend_on_the_mesh(
    shallow_model, batches, on_one_device, kind, mesh_shape, accumulation
):
    expected = on_one_device[kind]
    ours = Trajectory(shallow_model, batches, kind, mesh_shape, accumulation)
    losses, expected_losses = ([values["loss"] for values in each.metrics] for each in (ours, expected))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert np.ptp(expected_losses) > 0.01
    assert abs(expected.metrics[-1]["winner_drift"]) > 1e-3  # it trains
    _, fsdp, tensor = mesh_shape
    for name, held in ours.bytes.items():
        # Vectors are whole on every device, and in a network of 8 channels they are a good part.
        assert expected.bytes[name] / (fsdp * tensor) <= held
        assert fsdp * tensor == 1 or held < 0.75 * expected.bytes[name]
