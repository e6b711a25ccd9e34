"""`SD3Transformer2D` against diffusers' SD3Transformer2DModel with random weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.models.mmdit import POSITIONS, crop_positions
from dspo_jax.models.model import build_model
from dspo_jax.weights.components import read_buffers

torch = pytest.importorskip("torch")
from diffusers import SD3Transformer2DModel  # noqa: E402
from torch_modules import (  # noqa: E402
    assert_close,
    assert_gradients_close,
    compile_fast,
    randomize,
    save,
    to_nchw,
    to_nhwc,
)

CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 6,
}
# As large as the table of positions along one side, and smaller along the other by an odd number.
SIZE = (6, 12)


def inputs(size=SIZE, tokens=5, captions=2):
    """Latents [2, *size, 4], timesteps [2], text states [captions, tokens, 12] and pooled text."""
    draw = np.random.default_rng(0)
    latents = draw.standard_normal((2, *size, 4), np.float32)
    states = draw.standard_normal((captions, tokens, 12), np.float32)
    return latents, np.float32([3.7, 871.25]), states, draw.standard_normal((captions, 10), np.float32)


def theirs_of(module, latents, timesteps, states, pooled):
    images = len(latents) // len(states)
    states, pooled = (torch.from_numpy(np.repeat(array, images, axis=0)) for array in (states, pooled))
    return module(to_nchw(latents), states, pooled, torch.from_numpy(timesteps)).sample


def positions_of(module, size=SIZE):
    return crop_positions(module.pos_embed.pos_embed.numpy(), size[0] // 2, size[1] // 2)


def make(changes, folder):
    """A random module of torch, and the model and parameters that are read from its files."""
    module = randomize(SD3Transformer2DModel(**CONFIG | changes))
    return module, *save(module, folder)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("qk_norm", "dual", "remat"),
    [(None, [], "none"), ("rms_norm", [], "dots"), (None, [0], "blocks"), ("rms_norm", [0, 1], "none")],
    ids=["sd3", "sd3.5 large", "dual", "sd3.5 medium"],
)
def test_forward_and_gradients_match_diffusers(qk_norm, dual, remat, tmp_path):
    module, model, params = make({"qk_norm": qk_norm, "dual_attention_layers": dual}, tmp_path)
    latents, timesteps, states, pooled = inputs()
    target = np.random.default_rng(1).standard_normal(latents.shape, np.float32)
    conditions = {"pooled_projections": pooled, "positions": positions_of(module), "remat": remat}

    @compile_fast
    def gradients_of(params):
        def loss(params):
            prediction = model.apply(params, latents, timesteps, states, **conditions)
            return jnp.square(prediction - target).mean(), prediction

        return jax.grad(loss, has_aux=True)(params)

    gradients, prediction = gradients_of(params)
    theirs = theirs_of(module, latents, timesteps, states, pooled)
    assert_close(prediction, to_nhwc(theirs), 1e-5)
    (theirs - to_nchw(target)).square().mean().backward()
    assert_gradients_close(module, model, gradients, tmp_path, 1e-4)
    # Nothing reads the text behind the last block, and so none of its queries.
    last = gradients["transformer_blocks"]["1"]["attn"]
    unread = {name for name in last if not any(leaf.any() for leaf in jax.tree.leaves(last[name]))}
    assert unread == {"add_q_proj", *(["norm_added_q"] if qk_norm else [])}


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """One layer of each kind of Stable Diffusion 3.5 medium, compiled for whatever shapes it is given."""
    changes = {"qk_norm": "rms_norm", "dual_attention_layers": [0], "out_channels": None}
    folder = tmp_path_factory.mktemp("medium")
    module, model, params = make(changes, folder)
    return module, model, params, compile_fast(model.apply), folder


@each_row(
    ("size", "tokens", "captions"),
    [((12, 12), 5, 2), ((2, 4), 5, 2), ((4, 4), 0, 2), ((4, 4), 77, 1)],
    ids=["all positions", "few positions", "no text", "one caption for two images"],
)
def test_forward_matches_diffusers(size, tokens, captions, medium):
    module, _, params, apply, _ = medium
    *arrays, pooled = inputs(size, tokens, captions)
    with torch.no_grad():
        theirs = theirs_of(module, *arrays, pooled)
    positions = positions_of(module, size)
    prediction = apply(params, *arrays, pooled_projections=pooled, positions=positions)
    assert_close(prediction, to_nhwc(theirs), 1e-5)


def test_a_single_layer_matches_diffusers(tmp_path):
    """The last layer is the first then."""
    module, model, params = make({"num_layers": 1, "patch_size": 1, "pos_embed_max_size": 12}, tmp_path)
    *arrays, pooled = inputs()
    with torch.no_grad():
        theirs = theirs_of(module, *arrays, pooled)
    positions = crop_positions(module.pos_embed.pos_embed.numpy(), *SIZE)
    prediction = compile_fast(model.apply)(params, *arrays, pooled_projections=pooled, positions=positions)
    assert_close(prediction, to_nhwc(theirs), 1e-5)


def test_bfloat16_stays_bfloat16_and_near_float32(medium):
    module, _, params, apply, _ = medium
    latents, timesteps, states, pooled = inputs()
    with torch.no_grad():
        exact = to_nhwc(theirs_of(module, latents, timesteps, states, pooled))
    params, latents, states, pooled = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (params, latents, states, pooled)
    )
    positions = positions_of(module)
    rounded = apply(params, latents, timesteps, states, pooled_projections=pooled, positions=positions)
    assert rounded.dtype == jnp.bfloat16
    # A bfloat16 number is good to 2^-9; some twenty roundings in a row add up to a few per cent.
    assert_close(rounded.astype(jnp.float32), exact, 0.05)


def test_the_table_is_stored_but_no_parameter(medium):
    module, model, params, _, folder = medium
    assert "pos_embed" not in params["pos_embed"]
    (stored,) = read_buffers(folder, model).values()
    np.testing.assert_array_equal(stored, module.pos_embed.pos_embed.numpy())
    assert model.buffer_shapes() == {POSITIONS: stored.shape}


@each_row(
    ("sample_size", "patch_size", "pos_embed_max_size"),
    [(8, 2, 6), (128, 2, 19), (16, 1, 16)],
)
def test_the_table_of_a_fresh_model_is_that_of_diffusers(sample_size, patch_size, pos_embed_max_size):
    config = CONFIG | {
        "sample_size": sample_size,
        "patch_size": patch_size,
        "pos_embed_max_size": pos_embed_max_size,
        "num_layers": 1,
    }
    theirs = SD3Transformer2DModel(**config).pos_embed.pos_embed.numpy()
    ours = build_model("SD3Transformer2DModel", config).make_buffers()[POSITIONS]
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_a_fresh_model_predicts_zero_and_gates_every_branch_with_zero():
    model = build_model("SD3Transformer2DModel", CONFIG | {"dual_attention_layers": [0]})
    params = model.init(jax.random.key(0))
    zero = {
        f"transformer_blocks.{block}.{norm}.linear"
        for block, norm in itertools.product((0, 1), ("norm1", "norm1_context"))
    } | {"norm_out.linear", "proj_out"}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    kernels = {path.removesuffix(".kernel"): leaf for path, leaf in paths.items() if path.endswith("kernel")}
    assert {path for path, leaf in kernels.items() if not leaf.any()} == zero
