"""A step of Stable Diffusion 3 is the same on every mesh, and a mesh that cuts through heads is refused."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tables import each_row
from tiny_run import make_config

from dspo_jax.models.model import build_model
from dspo_jax.parallel.mesh import make_mesh, replicated, shard_batch
from dspo_jax.pipelines.conditioning_inputs import prompt_batch
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import parse
from dspo_jax.training.start import check_heads, make_adapters, make_state
from dspo_jax.training.step import compile_step
from dspo_jax.weights.layout import flatten

pytest.importorskip("transformers")
from tiny_sd3 import NETWORKS, write_sd3


@each_row(
    ("heads", "of_t5", "tensor", "message"),
    [
        (24, 64, 8, None),
        (24, None, 3, None),
        (38, 64, 2, None),
        (38, 64, 4, "does not divide the 38 attention heads of transformer; for this model it can be 1, 2$"),
        (24, 64, 3, "does not divide the 64 attention heads of text_encoder_3; for .* can be 1, 2, 4, 8$"),
    ],
)
def test_tensor_divides_the_heads_of_the_transformer_and_of_t5(heads, of_t5, tensor, message):
    changes = {"num_attention_heads": heads, "caption_projection_dim": 8 * heads}
    networks = {"transformer": build_model("SD3Transformer2DModel", NETWORKS["transformer"] | changes)}
    if of_t5:
        config = NETWORKS["text_encoder_3"] | {"num_heads": of_t5, "d_kv": 1}
        networks["text_encoder_3"] = build_model("T5EncoderModel", config)
    pipe = SimpleNamespace(components=tuple(networks), networks=networks)
    mesh = SimpleNamespace(shape={"tensor": tensor})
    if message is None:
        check_heads(pipe, mesh)
    else:
        with pytest.raises(ValueError, match=f"^config.mesh.tensor = {tensor}: {message}"):
            check_heads(pipe, mesh)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load_pipeline(write_sd3(tmp_path_factory.mktemp("sd3") / "model"), max_sequence_length=8)


@pytest.fixture(scope="module")
def step(pipe):
    """Runs a step of the transformer and all text encoders: its metrics, and the parameters after it."""
    draw = np.random.default_rng(0)
    changes = {
        **{"objective.name": "diffusion_dpo", "objective.beta": 50.0, "train_text_encoder": True},
        # Of AdamW's first update only the signs of tiny gradients would count, and those are rounding.
        **{"optimizer.eps": 1e-3, "optimizer.learning_rate": 1e-2, "batch_size": 4},
    }
    settings = parse(make_config(pipe.path, ".", changes))
    tokens = pipe.tokenize(["a red fox", "snow", "a fox on snow", ""])
    batch = {
        "moments": draw.standard_normal((4, 2, 4, 4, 8)).astype(np.float32),
        **{name: np.asarray(array) for name, array in prompt_batch(pipe, tokens, (16, 16)).items()},
        **{"preference": np.ones(4, np.float32), "loser_won": np.zeros(4, bool)},
        "index": np.arange(4, dtype=np.uint32),
    }

    def run(sizes):
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        check_heads(pipe, mesh)
        task = make_task(settings, pipe)
        state, reference = make_state(task, mesh, make_adapters(settings, pipe))
        key = jax.device_put(jax.random.key(0), replicated(mesh))
        state, metrics = compile_step(state)(state, reference, shard_batch(batch, mesh), key)
        return {name: float(value) for name, value in metrics.items()}, jax.device_get(state.params)

    return run


@pytest.mark.slow
def test_a_step_over_fsdp_or_tensor_is_that_of_one_device(pipe, step):
    metrics, params = step({"data": 1})
    del metrics["implicit_accuracy"]  # of margins that are zero but for rounding
    before = flatten({name: pipe.read_params(name) for name in pipe.components})
    moved = [path for path, leaf in flatten(params).items() if np.abs(leaf - before[path]).max() > 1e-3]
    assert {path.partition(".")[0] for path in moved} == set(pipe.components)
    for sizes in ({"fsdp": 2}, {"tensor": 2}):
        ours, split = step({"data": 1, **sizes})
        for name, value in metrics.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-6, err_msg=f"{sizes}: {name}")
        for path, leaf in flatten(split).items():
            expected = flatten(params)[path]
            np.testing.assert_allclose(leaf, expected, rtol=0, atol=2e-5, err_msg=f"{sizes}: {path}")
