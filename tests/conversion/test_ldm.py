"""The name table of single-file checkpoints, against diffusers' own conversion of them."""

import re

import numpy as np
import pytest
from tables import each_row

from dspo_jax.conversion import single_file
from dspo_jax.weights.original_layout import make_layouts
from dspo_jax.weights.tensors import Tensor

# Real structures with narrow layers: of Stable Diffusion 1 and of XL.
SD_UNET = {
    "block_out_channels": [8, 16, 24, 24],
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
XL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "attention_head_dim": [1, 2, 4],
    "block_out_channels": [8, 16, 24],
    "cross_attention_dim": 12,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "projection_class_embeddings_input_dim": 36,
    "transformer_layers_per_block": [1, 2, 3],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [4, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
CLIP = {"hidden_act": "quick_gelu", "hidden_size": 6, "num_hidden_layers": 2}
OPEN_CLIP = {"hidden_act": "gelu", "hidden_size": 8, "num_hidden_layers": 3}

SD1 = {"unet": SD_UNET, "vae": VAE, "text_encoder": CLIP}
SD2 = {"unet": SD_UNET | {"use_linear_projection": True}, "vae": VAE, "text_encoder": OPEN_CLIP}
SDXL = {
    "unet": XL_UNET,
    "vae": VAE,
    "text_encoder": CLIP,
    "text_encoder_2": OPEN_CLIP | {"projection_dim": 8},
}
FAMILIES = {"SD1": SD1, "SD2": SD2, "SDXL": SDXL}


def clip_shapes(config):
    """The state dict of transformers' CLIPTextModel as published models have it."""
    width = config["hidden_size"]
    shapes = {
        "text_model.embeddings.token_embedding.weight": (20, width),
        "text_model.embeddings.position_embedding.weight": (7, width),
    }
    modules = {"text_model.final_layer_norm": (width,)}
    for number in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{number}"
        modules |= {f"{layer}.self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        modules |= {f"{layer}.layer_norm{n}": (width,) for n in (1, 2)}
        modules |= {f"{layer}.mlp.fc1": (4 * width, width), f"{layer}.mlp.fc2": (width, 4 * width)}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    if "projection_dim" in config:
        shapes["text_projection.weight"] = (config["projection_dim"], width)
    return shapes


def make_shapes(configs):
    diffusers = pytest.importorskip("diffusers")
    import torch

    shapes = {name: clip_shapes(config) for name, config in configs.items() if name.startswith("text")}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**configs["unet"])
        vae = diffusers.AutoencoderKL(**{k: v for k, v in configs["vae"].items() if k != "_class_name"})
    for name, module in (("unet", unet), ("vae", vae)):
        shapes[name] = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return shapes


def lazy(array):
    return Tensor(array.shape, array.dtype, lambda: array)


def read(tensors):
    values = {name: tensor.read() for name, tensor in tensors.items()}
    for name, value in values.items():
        assert (value.shape, value.dtype) == (tensors[name].shape, tensors[name].dtype), name
    return values


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """configs, and every component as random arrays under its names in a diffusers folder."""
    configs = FAMILIES[request.param]
    draw = np.random.default_rng(0)
    arrays = {
        component: {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        for component, shapes in make_shapes(configs).items()
    }
    return configs, arrays


@pytest.fixture
def single(model):
    configs, arrays = model
    components = {name: {key: lazy(a) for key, a in values.items()} for name, values in arrays.items()}
    return single_file.join(components, make_layouts(configs))


def split(single, model):
    configs, arrays = model
    shapes = {name: {key: a.shape for key, a in values.items()} for name, values in arrays.items()}
    return single_file.split(single, make_layouts(configs), shapes)


def test_diffusers_reads_what_we_write(single, model):
    import torch
    from diffusers.loaders import single_file_utils as oracle

    configs, arrays = model
    checkpoint = {name: torch.from_numpy(np.array(value)) for name, value in read(single).items()}
    assert_equal(oracle.convert_ldm_unet_checkpoint(dict(checkpoint), configs["unet"]), arrays["unet"])
    assert_equal(oracle.convert_ldm_vae_checkpoint(dict(checkpoint), configs["vae"]), arrays["vae"])
    first = oracle.convert_ldm_clip_checkpoint(checkpoint)
    if configs["text_encoder"] is CLIP:
        assert_equal(first, arrays["text_encoder"])
    towers = {"cond_stage_model.model.": "text_encoder", "conditioner.embedders.1.model.": "text_encoder_2"}
    for prefix, component in towers.items():
        if component in configs and configs[component]["hidden_act"] == "gelu":

            class Tower:
                class config:  # what the oracle reads of a model
                    hidden_size = OPEN_CLIP["hidden_size"]

            theirs = oracle.convert_open_clip_checkpoint(Tower, checkpoint, prefix)
            assert_equal(theirs, arrays[component])


def test_split_is_the_inverse_of_join(single, model):
    components = split(single, model)
    assert set(components) == set(model[1])
    for component, values in model[1].items():
        assert_equal(read(components[component]), values)


@each_row(
    ("family", "names"),
    [
        (
            "SD1",
            [
                "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
                "model.diffusion_model.input_blocks.3.0.op.weight",
                "model.diffusion_model.output_blocks.2.1.conv.weight",
                "model.diffusion_model.output_blocks.5.2.conv.weight",
                "cond_stage_model.transformer.text_model.final_layer_norm.weight",
                "first_stage_model.encoder.mid.attn_1.q.weight",
            ],
        ),
        (
            "SD2",
            [
                "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
                "cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight",
                "cond_stage_model.model.positional_embedding",
            ],
        ),
        (
            "SDXL",
            [
                "model.diffusion_model.label_emb.0.2.weight",
                "model.diffusion_model.output_blocks.2.2.conv.weight",
                "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
                "conditioner.embedders.1.model.text_projection",
                "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_proj.bias",
            ],
        ),
    ],
)
def test_published_names(family, names):
    configs = FAMILIES[family]
    layouts = make_layouts(configs)
    ours = {
        layouts[component].place(name).name
        for component, shapes in make_shapes(configs).items()
        for name in shapes
    }
    assert set(names) <= ours


def test_shapes_of_the_original_layout(single, model):
    assert single["first_stage_model.decoder.mid.attn_1.proj_out.weight"].shape == (8, 8, 1, 1)
    fused = [name for name in single if name.endswith("in_proj_weight")]
    assert {single[name].shape for name in fused} <= {(24, 8)}
    assert bool(fused) == (model[0] is not SD1)


def test_what_single_files_hold_besides_is_passed_over(single, model):
    by_the_way = [
        "model_ema.decay",
        "model_ema.diffusion_modelout2weight",
        "alphas_cumprod",
        "betas",
        "logvar",
    ]
    by_the_way += ["first_stage_model.loss.discriminator.main.0.weight", "denoiser.sigmas"]
    root = "conditioner.embedders.0" if "text_encoder_2" in model[0] else "cond_stage_model"
    by_the_way += [f"{root}.logit_scale", f"{root}.transformer.text_model.embeddings.position_ids"]
    by_the_way += ["v_pred", "ztsnr"]
    if model[0] is not SD1:
        tower = "conditioner.embedders.1" if "text_encoder_2" in model[0] else "cond_stage_model"
        by_the_way += [f"{tower}.model.attn_mask"]
    if model[0] is SD2:  # the layer that its diffusers folders lack
        by_the_way += ["cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"]
        by_the_way += ["cond_stage_model.model.text_projection"]
    single.update(dict.fromkeys(by_the_way, lazy(np.zeros(3, np.float32))))
    components = split(single, model)
    for component, values in model[1].items():
        assert_equal(read(components[component]), values)


RENAMED = {  # family -> a name's beginning as it is published, and as other programs write it
    "SD1": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    "SD2": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    "SDXL": ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.transformer."),
}


def test_the_names_of_other_programs_are_read(single, model):
    family = next(name for name, configs in FAMILIES.items() if configs is model[0])
    published, other = RENAMED[family]
    names = [name for name in single if name.startswith(published)]
    assert len(names) > 10
    for name in names:
        single[other + name.removeprefix(published)] = single.pop(name)
    single[f"{other}embeddings.position_ids"] = lazy(np.zeros(3, np.float32))
    components = split(single, model)
    assert set(components) == set(model[1])
    for component, values in model[1].items():
        assert_equal(read(components[component]), values)


def test_a_file_of_another_family_is_named(single, model):
    for family, configs in FAMILIES.items():
        if configs is not model[0]:
            message = rf"is Stable Diffusion \w+, but --base is {family[2:]}; name a base"
            with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
                single_file.split(single, make_layouts(configs), {})


EPSILON, VELOCITY = {"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}
ZERO_SNR = {**VELOCITY, "rescale_betas_zero_snr": True}


@each_row(
    ("names", "metadata", "expected"),
    [
        ([], {}, {}),
        ([], {"format": "pt", "modelspec.title": "x"}, {}),
        (["v_pred"], {}, VELOCITY),
        (["v_pred"], {"modelspec.predict_key": "epsilon"}, VELOCITY),  # programs go by the tensor
        ([], {"modelspec.prediction_type": "v"}, VELOCITY),
        ([], {"modelspec.prediction_type": "epsilon"}, EPSILON),
        ([], {"modelspec.predict_key": "V"}, VELOCITY),
        ([], {"modelspec.prediction_type": "flow"}, {}),
        (["v_pred", "ztsnr"], {}, ZERO_SNR),
        (["ztsnr"], {"modelspec.prediction_type": "v"}, ZERO_SNR),
        (["ztsnr"], {}, ZERO_SNR),
    ],
)
def test_what_a_file_says_of_its_process(names, metadata, expected):
    assert single_file.read_process(names, metadata) == expected


@each_row("name", ["edm_vpred.sigma_max", "edm_mean"])
def test_ways_of_training_that_are_not_computed_are_named(name):
    with pytest.raises(ValueError, match=rf"^has the tensor {name}: it was trained [^\n]* not supported"):
        single_file.read_process(["v_pred", name], {})


def test_zero_terminal_snr_of_epsilon_is_refused():
    with pytest.raises(ValueError, match=r"^has the tensor ztsnr, .*predicts epsilon"):
        single_file.read_process(["ztsnr"], {"modelspec.prediction_type": "epsilon"})


@each_row(("scheduler", "names"), [(EPSILON, []), (VELOCITY, ["v_pred"]), (ZERO_SNR, ["v_pred", "ztsnr"])])
def test_what_is_written_of_a_process_is_read_again(scheduler, names):
    markers, metadata = single_file.write_process(scheduler)
    assert {name: tensor.shape for name, tensor in markers.items()} == dict.fromkeys(names, (0,))
    assert single_file.read_process(markers, metadata) == scheduler


def test_a_component_without_any_tensor_is_absent(single, model):
    only = {name: tensor for name, tensor in single.items() if not name.startswith("first_stage_model.")}
    assert set(split(only, model)) == set(model[1]) - {"vae"}


UNET_NAME = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


@each_row(
    ("spoil", "message"),
    [
        (lambda s: s.pop(UNET_NAME), rf"tensor {UNET_NAME} is missing; is --base .*\(unet\)\?"),
        (
            lambda s: s.update({UNET_NAME: lazy(np.zeros(5, np.float32))}),
            rf"tensor {UNET_NAME} has shape \(5,\), --base asks for \(8, 8, 3, 3\)",
        ),
        (
            lambda s: s.update({"lora_te_text_model": lazy(np.zeros(5, np.float32))}),
            r"1 tensor\(s\) that --base does not ask for, first lora_te_text_model",
        ),
        (lambda s: s.clear(), r"holds no tensor model\.diffusion_model\.\*"),
    ],
    ids=["missing", "shape", "extra", "another layout"],
)
def test_what_does_not_fit_is_named(single, model, spoil, message):
    spoilt = dict(single)
    spoil(spoilt)
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        split(spoilt, model)


def test_a_fused_projection_of_another_width_is_named(model, single):
    fused = sorted(name for name in single if name.endswith("in_proj_weight"))
    if not fused:
        pytest.skip("no OpenCLIP tower")
    single[fused[0]] = lazy(np.zeros((25, 8), np.float32))
    with pytest.raises(ValueError, match=re.escape(f"tensor {fused[0]} has shape (25, 8)")):
        split(single, model)


def test_another_autoencoder_has_no_place():
    with pytest.raises(ValueError, match="AutoencoderTiny has no place in a single-file checkpoint"):
        make_layouts(SD1 | {"vae": {"_class_name": "AutoencoderTiny"}})
