"""Configs that would be computed wrongly are refused by name; the building blocks against NumPy and torch."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import tiny_model as tiny
from flax import nnx
from tables import each_row

from dspo_jax.kernels.attention import attention
from dspo_jax.models import clip, clip_vision, unet, vae
from dspo_jax.models.blocks import sinusoidal_embedding
from dspo_jax.models.model import build_model
from dspo_jax.models.norms import GroupNorm, LayerNorm
from dspo_jax.weights.layout import flatten

CONFIGS = {
    "UNet2DConditionModel": tiny.UNET,
    "AutoencoderKL": tiny.VAE,
    "CLIPTextModel": tiny.TEXT_ENCODER,
    "CLIPTextModelWithProjection": tiny.TEXT_ENCODER | {"projection_dim": 8},
    "AutoencoderTiny": published.TAESD,
}
UNET, VAE, CLIP, PROJECTING_CLIP, TINY_VAE = CONFIGS


@each_row(
    ("class_name", "key", "value", "message"),
    [
        (UNET, "act_fn", "gelu", "act_fn = 'gelu' is not supported; allowed: 'silu'"),
        (
            UNET,
            "mid_block_type",
            None,
            "mid_block_type = None is not supported; allowed: 'UNetMidBlock2DCrossAttn'",
        ),
        (
            UNET,
            "resnet_time_scale_shift",
            "scale_shift",
            "resnet_time_scale_shift = 'scale_shift' is not supported",
        ),
        (
            UNET,
            "addition_embed_type",
            "image",
            "addition_embed_type = 'image' is not supported; allowed: None, 'text",
        ),
        (
            UNET,
            "class_embed_type",
            "timestep",
            "class_embed_type = 'timestep' is not supported; allowed: None",
        ),
        (UNET, "use_linear_projections", True, "did you mean 'use_linear_projection'?"),
        (
            UNET,
            "down_block_types",
            ["AttnDownBlock2D", "DownBlock2D"],
            "down_block_types has 'AttnDownBlock2D'; supp",
        ),
        (
            UNET,
            "up_block_types",
            ["UpBlock2D", "AttnUpBlock2D"],
            "up_block_types has 'AttnUpBlock2D'; supported: 'UpB",
        ),
        (UNET, "up_block_types", ["UpBlock2D"], "up_block_types = ['UpBlock2D'] needs 2 entries"),
        (UNET, "attention_head_dim", [1, 2, 4], "attention_head_dim = [1, 2, 4] needs 2 entries"),
        (UNET, "layers_per_block", [1], "layers_per_block = [1] needs 2 entries"),
        (
            UNET,
            "cross_attention_dim",
            [12, 12],
            "cross_attention_dim = [12, 12] must be an integer from 1 to 65536",
        ),
        (VAE, "act_fn", "mish", "act_fn = 'mish' is not supported; allowed: 'silu'"),
        (
            VAE,
            "latents_mean",
            [0.0] * 4,
            "latents_mean = [0.0, 0.0, 0.0, 0.0] is not supported; allowed: None",
        ),
        (VAE, "shift_factor", "0.1", "shift_factor = '0.1' must be a number from -1e+06 to 1e+06, or null"),
        (
            VAE,
            "down_block_types",
            ["AttnDownEncoderBlock2D"] * 3,
            "down_block_types has 'AttnDownEncoderBlock2D'",
        ),
        (VAE, "up_block_types", ["UpDecoderBlock2D"] * 2, "needs 3 entries"),
        (VAE, "temporal_layers", 2, "unknown key temporal_layers = 2"),
        (CLIP, "hidden_act", "relu", "hidden_act = 'relu' is not supported; allowed: 'quick_gelu', 'gelu'"),
        (CLIP, "attention_dropout", 0.1, "attention_dropout = 0.1 is not supported; allowed: 0.0"),
        (CLIP, "num_hidden_layer", 3, "did you mean 'num_hidden_layers'?"),
        (
            PROJECTING_CLIP,
            "hidden_act",
            "relu",
            "hidden_act = 'relu' is not supported; allowed: 'quick_gelu'",
        ),
        (TINY_VAE, "act_fn", "gelu", "act_fn = 'gelu' is not supported; allowed: 'relu'"),
        (
            TINY_VAE,
            "upsample_fn",
            "bilinear",
            "upsample_fn = 'bilinear' is not supported; allowed: 'nearest'",
        ),
        (TINY_VAE, "upsampling_scaling_factor", 4, "upsampling_scaling_factor = 4 is not supported"),
        (TINY_VAE, "num_decoder_blocks", [3, 1], "num_decoder_blocks = [3, 1] needs 4 entries"),
        (
            TINY_VAE,
            "encoder_block_out_channels",
            [64, 64, 64, 32],
            "encoder_block_out_channels = [64, 64, 64, 32] must be the same number throughout",
        ),
        # Of the right name and the wrong type or size.
        (
            UNET,
            "layers_per_block",
            10**9,
            "layers_per_block = 1000000000 must be an integer from 1 to 16, or a",
        ),
        (UNET, "layers_per_block", "2", "layers_per_block = '2' must be an integer from 1 to 16"),
        (UNET, "layers_per_block", True, "layers_per_block = True must be an integer"),
        (UNET, "layers_per_block", 1.0, "layers_per_block = 1.0 must be an integer"),
        (UNET, "layers_per_block", None, "layers_per_block = None must be an integer"),
        (UNET, "layers_per_block", [], "layers_per_block = [] must be an integer"),
        (
            UNET,
            "transformer_layers_per_block",
            64,
            "[1, 1] with transformer_layers_per_block = [64, 64] are 390 blocks; at most",
        ),
        (
            UNET,
            "block_out_channels",
            [],
            "block_out_channels = [] must be a list of 1 to 8 entries, each an int",
        ),
        (
            UNET,
            "block_out_channels",
            [8] * 9,
            "block_out_channels = [8, 8, 8, 8, 8, 8, 8, 8, 8] must be a list",
        ),
        (
            UNET,
            "block_out_channels",
            [8, 18],
            "block_out_channels = 18 is no multiple of norm_num_groups = 4",
        ),
        (UNET, "attention_head_dim", 3, "block_out_channels = 8 is no multiple of attention_head_dim = 3"),
        (
            UNET,
            "num_attention_heads",
            [2, 5],
            "block_out_channels = 16 is no multiple of num_attention_heads = 5",
        ),
        (UNET, "norm_eps", float("nan"), "norm_eps = nan must be a number from 0 to 1"),
        (UNET, "flip_sin_to_cos", "true", "flip_sin_to_cos = 'true' must be true or false"),
        (UNET, "sample_size", 10**9, "sample_size = 1000000000 must be an integer from 1 to 4096"),
        (
            UNET,
            "sample_size",
            [8, 8, 8],
            "sample_size = [8, 8, 8] must be an integer from 1 to 4096, or a list",
        ),
        (
            UNET,
            "reverse_transformer_layers_per_block",
            [[1]],
            "block = [[1]] is not supported; allowed: None",
        ),
        (VAE, "in_channels", 4, "in_channels = 4 is not supported; allowed: 3"),
        (VAE, "scaling_factor", 0, "scaling_factor = 0 must be a number from 1e-06 to 1e+06"),
        (CLIP, "num_attention_heads", 5, "hidden_size = 12 is no multiple of num_attention_heads = 5"),
        (CLIP, "num_hidden_layers", -1, "num_hidden_layers = -1 must be an integer from 1 to 96"),
        (
            TINY_VAE,
            "encoder_block_out_channels",
            64,
            "encoder_block_out_channels = 64 must be a list of 1 to 8",
        ),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_by_name(class_name, key, value, message):
    with pytest.raises(ValueError, match=f"^{class_name} config: ") as error:
        build_model(class_name, CONFIGS[class_name] | {key: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_class_is_refused():
    with pytest.raises(
        ValueError, match="'FluxTransformer2DModel' is not supported; supported: UNet2DConditionModel"
    ):
        build_model("FluxTransformer2DModel", {})


def test_keys_that_switch_nothing_on_are_accepted():
    config = tiny.TEXT_ENCODER | {"a_new_option": None, "another": False, "transformers_version": "9.0"}
    assert build_model(CLIP, config).config["another"] is False


def test_a_part_that_is_not_computed_is_no_misspelling():
    with pytest.raises(ValueError, match="not supported") as error:
        build_model(UNET, tiny.UNET | {"reverse_transformer_layers_per_block": [[1]]})
    assert "did you mean" not in str(error.value)


def test_sinusoids_without_a_frequency_are_refused():
    narrow = {"block_out_channels": [2, 4], "norm_num_groups": 2, "freq_shift": 1}
    with pytest.raises(ValueError, match="block_out_channels = 2 leaves no frequency with freq_shift = 1"):
        build_model(UNET, tiny.UNET | narrow)


@each_row("flip_sin_to_cos", [True, False])
def test_sinusoids_are_those_of_their_formula(flip_sin_to_cos):
    """Frequencies 10000^(-i / (F - shift)), cosines or sines first, and a zero where the width is odd."""
    timesteps = np.array([0.0, 1.5, 999.0])
    angles = timesteps[:, None] * 10_000.0 ** (-np.arange(3) / (3 - 1))
    halves = [np.cos(angles), np.sin(angles)] if flip_sin_to_cos else [np.sin(angles), np.cos(angles)]
    ours = sinusoidal_embedding(jnp.asarray(timesteps), 7, flip_sin_to_cos=flip_sin_to_cos, freq_shift=1.0)
    np.testing.assert_allclose(ours, np.concatenate([*halves, np.zeros((3, 1))], axis=1), atol=1e-4)


def defaults_of_the_class(class_name):
    """Key -> default of the class in diffusers or transformers."""
    if class_name in CLIP_CLASSES:
        transformers = pytest.importorskip("transformers")
        config = transformers.CLIPVisionConfig if class_name == "CLIP vision" else transformers.CLIPTextConfig
        return {
            field.name: field.default for field in dataclasses.fields(config) if field.name in vars(config)
        }
    diffusers = pytest.importorskip("diffusers")
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


# Class -> our table, and the keys that change nothing here.
TABLES = {
    UNET: (unet._KEYS, set()),
    VAE: (vae._KEYS, vae._UNREAD),
    TINY_VAE: (vae._TINY_KEYS, vae._TINY_UNREAD),
    CLIP: (clip.TEXT_KEYS, {*clip.UNREAD, *clip.PROJECTION}),
    PROJECTING_CLIP: (clip.TEXT_KEYS | clip.PROJECTION, clip.UNREAD),
    "CLIP vision": (clip_vision._TOWERS["vision_config"], {*clip.UNREAD, *clip.PROJECTION}),
}
CLIP_CLASSES = (CLIP, PROJECTING_CLIP, "CLIP vision")


@each_row("class_name", list(TABLES))
def test_an_absent_key_takes_the_default_of_its_class(class_name):
    table, unread = TABLES[class_name]
    theirs = defaults_of_the_class(class_name)
    assert len(theirs) > 10
    assert {key: table[key].default for key in theirs.keys() & table.keys()} == {
        key: value for key, value in theirs.items() if key not in unread
    }
    # Ours alone: what older versions of the class had.
    assert table.keys() - theirs.keys() == (
        {"dropout", "pruned_heads"} if class_name in CLIP_CLASSES else set()
    )


def test_stable_diffusion_1_4s_autoencoder_has_the_default_groups():
    """Its published config.json has no norm_num_groups."""
    published_vae = {key: value for key, value in published.SDXL_VAE.items() if key != "norm_num_groups"}
    model = build_model(VAE, published_vae)
    assert model.settings["norm_num_groups"] == 32
    assert model.settings == build_model(VAE, published.SDXL_VAE).settings


@each_row("key", ["addition_time_embed_dim", "projection_class_embeddings_input_dim"])
def test_a_text_and_time_embedding_without_its_size_is_refused(key):
    with pytest.raises(
        ValueError, match=f"config: {key} = None must be an integer where addition_embed_type"
    ):
        build_model(UNET, published.SDXL_UNET | {key: None})


@each_row("dtype", ["float32", "bfloat16"])
def test_a_text_encoder_computes_in_the_dtype_of_its_parameters(dtype):
    model = build_model(CLIP, tiny.TEXT_ENCODER)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), model.abstract_params())
    text = jax.eval_shape(model.apply, params, jnp.zeros((2, 77), jnp.int32))
    assert {text.last.dtype, text.pooled.dtype} == {jnp.dtype(dtype)}


@pytest.mark.ci
@each_row(
    ("class_name", "config", "parameters"),
    [
        (UNET, published.SD15_UNET, 859_520_964),
        (UNET, published.PIX2PIX_UNET, 859_520_964 + 4 * 9 * 320),
        (UNET, published.SD21_UNET, 865_910_724),
        (UNET, published.SDXL_UNET, 2_567_463_684),
        (VAE, published.SDXL_VAE, 83_653_863),
        (TINY_VAE, published.TAESD, 2_445_063),
        (CLIP, published.SD15_TEXT_ENCODER, 123_060_480),
        (CLIP, published.SD21_TEXT_ENCODER, 340_387_840),
        (PROJECTING_CLIP, published.SDXL_TEXT_ENCODER_2, 694_659_840),
    ],
)
def test_published_configs_give_models_of_their_published_size(class_name, config, parameters):
    leaves = jax.tree.leaves(build_model(class_name, config).abstract_params())
    assert sum(leaf.size for leaf in leaves) == parameters


def test_bookkeeping_of_averaged_weights_is_passed_over():
    build_model(UNET, tiny.UNET | {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 37_000})


def test_conditions_of_another_model_are_refused():
    model = build_model(UNET, tiny.UNET)
    inputs = (jnp.zeros((1, 4, 4, 4)), jnp.zeros(1, int), jnp.zeros((1, 77, 12)))
    with pytest.raises(ValueError, match="this UNet takes no text_embeds or time_ids"):
        model.apply(
            model.abstract_params(), *inputs, text_embeds=jnp.zeros((1, 4)), time_ids=jnp.zeros((1, 6), int)
        )
    config = tiny.UNET | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": 16,
    }
    model = build_model(UNET, config)
    with pytest.raises(ValueError, match="this UNet needs text_embeds and time_ids"):
        model.apply(model.abstract_params(), *inputs)


@pytest.mark.ci
def test_a_text_for_two_images_in_a_row_is_that_text_twice():
    model = build_model(UNET, tiny.UNET)
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.3 * draw.standard_normal(leaf.shape, np.float32), model.abstract_params()
    )
    sample = draw.standard_normal((4, 8, 8, 4), np.float32)
    states = draw.standard_normal((2, 7, tiny.UNET["cross_attention_dim"]), np.float32)

    def weighted(params, states, images):
        out = model.apply(params, sample, np.arange(4), jnp.repeat(states, images, axis=0))
        return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum(), out

    both = jax.jit(jax.grad(weighted, (0, 1), has_aux=True), static_argnums=2)
    once, twice = (both(params, states, images) for images in (1, 2))
    for actual, expected in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@each_row("causal", [False, True])
def test_attention_is_softmax_of_scaled_products(causal):
    draw = np.random.default_rng(0)
    length = 6 if causal else 5
    query = draw.normal(size=(2, 6, 3, 4)).astype(np.float32)
    key, value = draw.normal(size=(2, 2, length, 3, 4)).astype(np.float32)
    expected = np.zeros(query.shape)
    for batch, head, t in np.ndindex(2, 3, 6):
        visible = t + 1 if causal else length
        logits = key[batch, :visible, head].astype(np.float64) @ query[batch, t, head] / np.sqrt(4)
        weights = np.exp(logits) / np.exp(logits).sum()
        expected[batch, t, head] = weights @ value[batch, :visible, head]
    np.testing.assert_allclose(attention(query, key, value, causal=causal), expected, rtol=1e-5, atol=1e-6)


def test_attention_keeps_a_float32_softmax_in_bfloat16():
    """Logits near 300 differ by less than bfloat16 resolves there, and the weights still tell them apart."""
    query = jnp.full((1, 1, 1, 1), 300, jnp.bfloat16)
    key = jnp.asarray([1.0, 1 + 2**-7], jnp.bfloat16).reshape(1, 2, 1, 1)
    value = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    out = attention(query, key, value)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32).item(), 1 / (1 + np.exp(-300 / 128)), atol=2**-8)


@each_row("offset", [0.0, 100.0])
def test_group_norm_matches_torch(offset):
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    x = (draw.normal(size=(2, 3, 5, 8)) + offset).astype(np.float32)
    scale, bias = draw.normal(size=(2, 8)).astype(np.float32)
    norm = GroupNorm(8, 4, 1e-5)
    norm.scale, norm.bias = nnx.Param(jnp.asarray(scale)), nnx.Param(jnp.asarray(bias))
    nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).double()
    expected = torch.nn.functional.group_norm(
        nchw, 4, torch.from_numpy(scale).double(), torch.from_numpy(bias).double(), 1e-5
    )
    np.testing.assert_allclose(
        norm(jnp.asarray(x)), expected.numpy().transpose(0, 2, 3, 1), atol=1e-5 * max(1.0, offset)
    )


@each_row("norm", [GroupNorm(8, 4, 1e-5), LayerNorm(8)], ids=["group", "layer"])
@each_row("offset", [0.0, 1.0, 30.0])
def test_norms_of_bfloat16_are_those_of_the_same_numbers_in_float32(norm, offset):
    """Their variance comes from a mean of squares, also where means are large and channels differ."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(2, 16, 16, 8)) + offset * np.arange(8), jnp.bfloat16)
    out = norm(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), norm(x.astype(jnp.float32)), rtol=2**-8, atol=2**-8)
    # A variance of 0, beside squares of 10^6.
    flat = jnp.full((1, 16, 16, 8), 1000.0, jnp.bfloat16)
    np.testing.assert_array_equal(norm(flat), np.zeros_like(flat))


@each_row("class_name", list(CONFIGS))
def test_parameter_paths_are_the_state_dict_names(class_name):
    torch = pytest.importorskip("torch")
    config = {k: v for k, v in CONFIGS[class_name].items() if not k.startswith("_")}
    with torch.device("meta"):
        if class_name in (CLIP, PROJECTING_CLIP):
            import transformers

            module = getattr(transformers, class_name)(transformers.CLIPTextConfig(**config))
        else:
            import diffusers

            module = getattr(diffusers, class_name)(**config)
    # transformers 5 leaves out the first part of the published names.
    theirs = {name.removeprefix("text_model.").rpartition(".")[0] for name, _ in module.named_parameters()}
    paths = flatten(build_model(class_name, CONFIGS[class_name]).abstract_params())
    assert {path.removeprefix("text_model.").rpartition(".")[0] for path in paths} == theirs
    assert len(paths) == len(list(module.parameters()))


@pytest.mark.ci
@each_row("parts", [1, 7])
def test_attention_to_what_is_visible_is_attention_without_the_rest(parts, monkeypatch):
    monkeypatch.setattr("dspo_jax.kernels.attention._AT_A_TIME", 14 * 9 // parts)
    draw = np.random.default_rng(0)
    query, key, value = (jnp.asarray(draw.standard_normal((2, t, 3, 8)), jnp.float32) for t in (14, 9, 9))
    visible = jnp.arange(9)[None] < jnp.array([[9], [4]])
    actual = attention(query, key, value, visible=visible)
    for row, length in enumerate((9, 4)):
        part = slice(row, row + 1)
        expected = attention(query[part], key[part, :length], value[part, :length])
        np.testing.assert_allclose(actual[part], expected, rtol=1e-5, atol=1e-6)


def test_long_attention_in_parts_gives_the_same_values_and_gradients(monkeypatch):
    draw = np.random.default_rng(0)
    query, key, value = (jnp.asarray(draw.standard_normal((2, 50, 3, 8)), jnp.float32) for _ in range(3))

    def outputs():
        loss, grads = jax.value_and_grad(
            lambda *inputs: jnp.square(attention(*inputs)).sum(), argnums=(0, 1, 2)
        )(query, key, value)
        return attention(query, key, value), loss, *grads

    whole = outputs()
    monkeypatch.setattr("dspo_jax.kernels.attention._AT_A_TIME", 50 * 50 // 7)  # parts of 7 and of 6 queries
    for actual, expected in zip(outputs(), whole, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    kept = jax.vjp(attention, query, key, value)[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) < 2 * 50 * 50 * 3  # the weights alone are that
