"""Stable Diffusion 3's single files, against diffusers' own conversion of them, and its folders."""

import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import contents, make_run
from tables import each_row

from dspo_jax.conversion import single_file
from dspo_jax.conversion.export_model import export
from dspo_jax.conversion.import_model import import_model
from dspo_jax.errors import UserError
from dspo_jax.models.model import build_model
from dspo_jax.weights.components import read_buffers, read_model, read_params, write_params
from dspo_jax.weights.file_kinds import explain
from dspo_jax.weights.layout import torch_shapes
from dspo_jax.weights.original_layout import make_layouts
from dspo_jax.weights.tensors import Tensor, open_file

# The structure of Stable Diffusion 3.5 medium, with narrow layers.
TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 4,
    "caption_projection_dim": 8,
    "dual_attention_layers": [0, 1],
    "in_channels": 16,
    "joint_attention_dim": 12,
    "num_attention_heads": 2,
    "num_layers": 3,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 4,
    "qk_norm": "rms_norm",
    "sample_size": 4,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
CLIP = {
    "_class_name": "CLIPTextModelWithProjection",
    "hidden_act": "quick_gelu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 7,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 8,
    "vocab_size": 20,
}
T5 = {
    "_class_name": "T5EncoderModel",
    "d_ff": 12,
    "d_kv": 4,
    "d_model": 8,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": 20,
}
CONFIGS = {
    "transformer": TRANSFORMER,
    "vae": VAE,
    "text_encoder": CLIP,
    "text_encoder_2": CLIP | {"hidden_act": "gelu", "projection_dim": 6},
    "text_encoder_3": T5,
}
FILE = "diffusion_pytorch_model.safetensors"
ROOT = "model.diffusion_model."
T5_ROOT = "text_encoders.t5xxl.transformer."


@pytest.fixture(scope="module")
def model():
    """Layouts, shapes, and every component as random bfloat16 arrays under its names in a folder."""
    models = {name: build_model(config["_class_name"], config) for name, config in CONFIGS.items()}
    shapes = {name: torch_shapes(each) for name, each in models.items()}
    draw = np.random.default_rng(0)
    arrays = {
        component: {name: draw.standard_normal(shape).astype(jnp.bfloat16) for name, shape in each.items()}
        for component, each in shapes.items()
    }
    arrays["text_encoder"]["text_projection.weight"] = np.eye(8, dtype=jnp.bfloat16)
    return make_layouts({name: each.complete_config() for name, each in models.items()}), shapes, arrays


def lazy(array):
    return Tensor(array.shape, array.dtype, lambda: array)


def join(model):
    layouts, _, arrays = model
    components = {name: {key: lazy(a) for key, a in values.items()} for name, values in arrays.items()}
    return single_file.join(components, layouts)


def split(single, model):
    layouts, shapes, _ = model
    components = single_file.split(single, layouts, shapes)
    return {name: {key: t.read() for key, t in tensors.items()} for name, tensors in components.items()}


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_diffusers_reads_what_we_write(model):
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils as oracle

    arrays = model[2]
    single = {name: tensor.read().astype(np.float32) for name, tensor in join(model).items()}

    def check(convert, component, *arguments):
        checkpoint = {name: torch.from_numpy(np.array(value)) for name, value in single.items()}
        read = {name: value.numpy() for name, value in convert(checkpoint, *arguments).items()}
        assert_equal(read, {key: value.astype(np.float32) for key, value in arrays[component].items()})

    check(oracle.convert_sd3_transformer_checkpoint_to_diffusers, "transformer")
    check(oracle.convert_ldm_vae_checkpoint, "vae", VAE | {"layers_per_block": 1})
    check(oracle.convert_sd3_t5_checkpoint_to_diffusers, "text_encoder_3")
    check(oracle.convert_ldm_clip_checkpoint, "text_encoder_2", "text_encoders.clip_g.transformer.")
    # The first CLIP's projection is the identity there, without a tensor.
    projection = arrays["text_encoder"].pop("text_projection.weight")
    check(oracle.convert_ldm_clip_checkpoint, "text_encoder", "text_encoders.clip_l.transformer.")
    arrays["text_encoder"]["text_projection.weight"] = projection


def test_what_was_joined_is_split_again_bit_by_bit(model):
    single = join(model)
    components = split(single, model)
    assert components.keys() == CONFIGS.keys()
    for component, arrays in model[2].items():
        assert_equal(components[component], arrays)
    again = {name: {key: lazy(a) for key, a in tensors.items()} for name, tensors in components.items()}
    joined = single_file.join(again, model[0])
    assert_equal(
        {name: tensor.read() for name, tensor in joined.items()},
        {name: tensor.read() for name, tensor in single.items()},
    )


@each_row(
    ("ours", "theirs"),
    [
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        (
            "transformer_blocks.2.norm1_context.linear",
            "joint_blocks.2.context_block.adaLN_modulation.1",
        ),
    ],
)
def test_halves_of_shift_and_scale_change_places(ours, theirs, model):
    """1 where diffusers scales and 2 where it shifts, which the single file has first."""
    layouts, shapes, arrays = model
    halves = np.repeat(np.float32([1, 2]), 8)
    transformer = arrays["transformer"] | {
        f"{ours}.weight": np.tile(halves[:, None], (1, 8)),
        f"{ours}.bias": halves,
    }
    single = join((layouts, shapes, {**arrays, "transformer": transformer}))
    for leaf in ("weight", "bias"):
        stored = single[f"{ROOT}{theirs}.{leaf}"].read().reshape(16, -1)[:, 0]
        np.testing.assert_array_equal(stored, halves[::-1])
    assert_equal(split(single, model)["transformer"], transformer)


def test_other_modulations_keep_their_order(model):
    single, transformer = join(model), model[2]["transformer"]
    for ours, theirs in (("norm1", "x_block"), ("norm1_context", "context_block")):
        np.testing.assert_array_equal(
            single[f"{ROOT}joint_blocks.0.{theirs}.adaLN_modulation.1.bias"].read(),
            transformer[f"transformer_blocks.0.{ours}.linear.bias"],
        )


def test_names_of_other_programs_are_read(model):
    """A transformer alone without a prefix; T5's tokens under either name; numbers that are passed over."""
    single, arrays = join(model), model[2]
    bare = {name.removeprefix(ROOT): tensor for name, tensor in single.items() if name.startswith(ROOT)}
    assert "joint_blocks.0.x_block.attn.qkv.weight" in bare
    assert_equal(split(bare, model)["transformer"], arrays["transformer"])

    shared, copy = f"{T5_ROOT}shared.weight", f"{T5_ROOT}encoder.embed_tokens.weight"
    both = single | {copy: single[shared]}
    other = {name: tensor for name, tensor in both.items() if name != shared}
    by_the_way = lazy(np.float32([1]))
    more = single | {
        "text_encoders.clip_l.logit_scale": by_the_way,
        "text_encoders.clip_g.transformer.text_model.embeddings.position_ids": by_the_way,
        "text_encoders.clip_l.transformer.text_projection.weight": lazy(np.zeros((8, 8), np.float32)),
    }
    for file in (both, other, more):
        components = split(file, model)
        for component in CONFIGS:
            assert_equal(components[component], arrays[component])


def test_a_projection_that_the_file_cannot_say_is_refused(model):
    layouts, shapes, arrays = model
    scaled = arrays["text_encoder"] | {"text_projection.weight": 2 * np.eye(8, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"^text_encoder\.text_projection\.weight is not the identity"):
        join((layouts, shapes, {**arrays, "text_encoder": scaled}))


@each_row(
    ("change", "message"),
    [
        ({"scaled_fp8": True}, r"has the tensor scaled_fp8, of weights in 8 bits"),
        (
            {f"{ROOT}joint_blocks.0.x_block.attn.qkv.scale_weight": True},
            r"qkv\.scale_weight, of weights in 8",
        ),
        (
            {f"{ROOT}joint_blocks.3.x_block.attn.qkv.bias": True},
            r"1 tensor\(s\) that --base does not ask for",
        ),
        ({f"{ROOT}pos_embed": False}, r"tensor model\.diffusion_model\.pos_embed is missing; is --base of"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, message, model):
    single = join(model)
    for name, added in change.items():
        if added:
            single[name] = lazy(np.zeros(1, np.float32))
        else:
            del single[name]
    with pytest.raises(ValueError, match=message):
        split(single, model)


def test_a_file_of_another_family_is_refused(model):
    single = {"cond_stage_model.transformer.text_model.final_layer_norm.bias": lazy(np.zeros(1, np.float32))}
    with pytest.raises(ValueError, match="is Stable Diffusion 1, but --base is 3"):
        split(single, model)


def test_a_folder_of_torch_is_written_again_bit_by_bit(tmp_path):
    """In bfloat16; the table of positions among it, which is no parameter."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    theirs = tmp_path / "theirs"
    config = {key: value for key, value in TRANSFORMER.items() if key != "_class_name"}
    diffusers.SD3Transformer2DModel(**config).to(torch.bfloat16).save_pretrained(theirs)
    model = read_model(theirs)
    params, buffers = read_params(theirs, model), read_buffers(theirs, model)
    write_params(tmp_path / "ours", model, params, buffers=buffers)
    stored, written = (
        {name: tensor.read() for name, tensor in open_file(folder / FILE).items()}
        for folder in (theirs, tmp_path / "ours")
    )
    assert {value.dtype for value in stored.values()} == {jnp.dtype(jnp.bfloat16)}
    assert_equal(written, stored)
    # In another dtype the table is stored as it was.
    write_params(tmp_path / "wide", model, params, "float32", buffers=buffers)
    wide = open_file(tmp_path / "wide" / FILE)
    assert {name for name, tensor in wide.items() if tensor.dtype != np.float32} == set(buffers)
    with pytest.raises(ValueError, match=r"buffers \[\], not \['pos_embed\.pos_embed'\]"):
        write_params(tmp_path / "without", model, params)


def test_the_single_file_of_a_model_and_back_changes_no_tensor(out, tmp_path):
    pytest.importorskip("transformers")
    from tiny_sd3 import write_sd3

    model = write_sd3(tmp_path / "source" / "model")
    run = make_run(tmp_path / "source" / "run", model, trained=("transformer",))
    single = out.with_name("single.safetensors")
    assert export(run, single) == 3
    assert explain(single).startswith("; it is a single file: python -m dspo_jax.convert import")
    import_model(single, out, base=model)
    imported = contents(out)
    assert imported.pop("README.md").startswith(b"# single\n")
    assert imported == contents(model)
    with pytest.raises(UserError, match="safetensors: --prediction_type: is not of rectified flow"):
        import_model(single, tmp_path / "other", base=model, process={"prediction_type": "epsilon"})
