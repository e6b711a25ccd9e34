"""Configs of Stable Diffusion 3's networks: published ones, their sizes, and what is refused."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from tables import each_row

from dspo_jax.kernels import attention as kernels
from dspo_jax.kernels.attention import attention
from dspo_jax.models import mmdit, t5
from dspo_jax.models.model import build_model

MMDIT, T5, VAE = "SD3Transformer2DModel", "T5EncoderModel", "AutoencoderKL"
CONFIGS = {MMDIT: published.SD35_MEDIUM, T5: published.T5_XXL}


@each_row(
    ("class_name", "key", "value", "message"),
    [
        (
            MMDIT,
            "caption_projection_dim",
            1152,
            "caption_projection_dim = 1152 must be num_attention_heads * attention_head_dim = 1536",
        ),
        (
            MMDIT,
            "qk_norm",
            "layer_norm",
            "qk_norm = 'layer_norm' is not supported; allowed: None, 'rms",
        ),
        (MMDIT, "pos_embed_max_size", None, "pos_embed_max_size = None must be an integer from 1 to 1024"),
        (MMDIT, "dual_attention_layers", [0, 24], "dual_attention_layers has 24, but num_layers = 24"),
        (MMDIT, "dual_attention_layers", 3, "dual_attention_layers = 3 must be a list of 0 to 128 entries"),
        (MMDIT, "num_layers", 4000, "num_layers = 4000 must be an integer from 1 to 128"),
        (MMDIT, "guidance_embeds", True, "unknown key guidance_embeds = True is not supported"),
        (MMDIT, "qknorm", "rms_norm", "did you mean 'qk_norm'?"),
        (
            T5,
            "feed_forward_proj",
            "relu",
            "feed_forward_proj = 'relu' is not supported; allowed: 'gated",
        ),
        (T5, "dense_act_fn", "silu", "dense_act_fn = 'silu' is not supported; allowed: 'gelu_new'"),
        (T5, "is_decoder", True, "unknown key is_decoder = True is not supported"),
        (
            T5,
            "relative_attention_num_buckets",
            6,
            "attention_num_buckets = 6 must be a multiple of 4",
        ),
        (T5, "relative_attention_max_distance", 8, "relative_attention_max_distance = 8 more than a quarter"),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_by_name(class_name, key, value, message):
    with pytest.raises(ValueError, match=f"^{class_name} config: ") as error:
        build_model(class_name, CONFIGS[class_name] | {key: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_first_t5_is_refused_where_its_config_says_nothing_of_its_activation():
    config = {key: value for key, value in published.T5_XXL.items() if key != "feed_forward_proj"}
    with pytest.raises(ValueError, match=r"^T5EncoderModel config: missing key\(s\) feed_forward_proj"):
        build_model(T5, config)


def test_an_absent_key_takes_the_default_of_its_class():
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    parameters = inspect.signature(diffusers.SD3Transformer2DModel.__init__).parameters
    theirs = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    assert {key: entry.default for key, entry in mmdit._KEYS.items()} == theirs
    ours = {key: entry.default for key, entry in t5._KEYS.items() if key != "feed_forward_proj"}
    gated = transformers.T5Config(feed_forward_proj="gated-gelu")
    assert ours == {key: getattr(gated, key) for key in ours}
    # Every key of a T5's file is read or known to change nothing.
    assert published.T5_XXL.keys() <= {*t5._KEYS, *t5._UNREAD, "architectures", "model_type"}


def test_a_t5_that_is_recomputed_has_the_same_gradients():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 16}
    model = build_model(T5, published.T5_XXL | sizes)
    params = model.init(jax.random.key(0))
    tokens = jnp.arange(6).reshape(2, 3)

    def gradients(remat):
        return jax.grad(lambda params: jnp.square(model.apply(params, tokens, remat=remat)).sum())(params)

    kept, again = gradients("none"), gradients("blocks")
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(kept)) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), kept, again)
    program = str(jax.make_jaxpr(lambda params: model.apply(params, tokens, remat="blocks"))(params))
    assert program.count("checkpoint") + program.count("remat") >= 2


# Sums of the published tensors' sizes, without the tables of positions.
@pytest.mark.ci
@each_row(
    ("class_name", "config", "parameters", "tensors"),
    [
        (MMDIT, published.SD3_MEDIUM, 2_028_328_000, 682),
        (MMDIT, published.SD35_MEDIUM, 2_243_171_520, 908),
        (MMDIT, published.SD35_LARGE, 8_056_627_520, 1226),
        (VAE, published.SD3_VAE, 83_819_683, 244),
        (T5, published.T5_XXL, 4_762_310_656, 219),
    ],
)
def test_published_configs_give_models_of_their_published_size(class_name, config, parameters, tensors):
    model = build_model(class_name, config)
    leaves = jax.tree.leaves(model.abstract_params())
    assert sum(leaf.size for leaf in leaves) == parameters
    assert len(leaves) == tensors
    side, width = config.get("pos_embed_max_size"), config.get("caption_projection_dim")
    assert model.buffer_shapes() == ({mmdit.POSITIONS: (1, side**2, width)} if side else {})


TINY = {
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 8,
    "caption_projection_dim": 8,
    "joint_attention_dim": 4,
    "pooled_projection_dim": 4,
    "in_channels": 4,
    "pos_embed_max_size": 4,
}


@each_row(
    ("changes", "message"),
    [
        ({"size": (7, 8)}, "latents of 7 x 8 do not split into patches of 2 x 2"),
        ({"positions": (3, 4)}, "positions of 3 x 4 patches do not fit latents of 4 x 4 patches"),
        ({"timesteps": "bfloat16"}, "timesteps are bfloat16, which rounds them; pass them in float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    model = build_model(MMDIT, TINY)
    sample = jnp.zeros((1, *changes.get("size", (8, 8)), 4))
    inputs = (sample, jnp.zeros(1, changes.get("timesteps", "float32")), jnp.zeros((1, 3, 4)))
    positions = jnp.zeros((*changes.get("positions", (4, 4)), 8))
    with pytest.raises(ValueError, match=f"^{message}"):
        model.apply(
            model.abstract_params(), *inputs, pooled_projections=jnp.zeros((1, 4)), positions=positions
        )


def test_an_image_larger_than_the_table_is_refused_with_its_limit():
    table = np.zeros((1, 16, 8), np.float32)
    assert mmdit.crop_positions(table, 4, 1).shape == (4, 1, 8)
    with pytest.raises(ValueError, match=r"5 x 4 patches is larger than pos_embed_max_size = 4 .* at most 4"):
        mmdit.crop_positions(table, 5, 4)


@each_row("at_a_time", [kernels._AT_A_TIME, 6])
def test_attention_adds_a_bias_to_its_scaled_products(at_a_time, monkeypatch):
    """Also where the queries are worked through in parts."""
    monkeypatch.setattr(kernels, "_AT_A_TIME", at_a_time)
    draw = np.random.default_rng(0)
    query, key, value = draw.normal(size=(3, 2, 5, 3, 4)).astype(np.float32)
    bias = draw.normal(size=(3, 5, 5)).astype(np.float32)
    logits = np.einsum("bthd,bshd->bhts", query, key, dtype=np.float64) / np.sqrt(4) + bias
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, value)
    actual = attention(*map(jnp.asarray, (query, key, value)), bias=jnp.asarray(bias))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
