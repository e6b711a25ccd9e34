"""Files that are no text-to-image model are refused by what they are."""

import numpy as np
from model_folders import make_run, refused
from safetensors.numpy import save_file
from tables import each_row

from dspo_jax.conversion.export_model import export
from dspo_jax.conversion.import_model import import_model
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.weights import file_kinds, tensors

UNET = "model.diffusion_model."
ONE = np.zeros(1, np.float32)

# Names as the programs write them, with one shape where it tells.
KINDS = {
    "PEFT's LoRA": (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "a LoRA"),
    "PEFT's LoRA, named": (["base_model.model.conv_in.lora_B.default.weight"], "a LoRA"),
    "diffusers' old LoRA": (["down_blocks.0.attn1.processor.to_q_lora.down.weight"], "a LoRA"),
    "diffusers' text LoRA": (["text_encoder.text_model.encoder.layers.0.q_proj.lora.up.weight"], "a LoRA"),
    "kohya's LoRA": (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
    "kohya's alpha": (["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"], "a LoRA"),
    "LyCORIS": (["unet.down_blocks.0.resnets.0.conv1.hada_w1_a"], "a LoRA"),
    "ControlNet": (["control_model.input_hint_block.0.weight", f"{UNET}out.0.weight"], "a ControlNet"),
    "diffusers' ControlNet": (["controlnet_cond_embedding.x", "down_blocks.0.x"], "a ControlNet"),
    "IP-Adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
    "T2I-Adapter": (["adapter.body.0.resnets.0.block1.weight"], "a T2I-Adapter"),
    "inversion": (["emb_params"], "a textual inversion"),
    "inversion of SDXL": (["<cat-toy>"], "a textual inversion"),
    "Flux": (["double_blocks.0.img_attn.qkv.weight"], "Flux or one of its relatives"),
    "Flux, whole": ([f"{UNET}double_blocks.0.img_attn.qkv.weight"], "Flux or one of its relatives"),
    "Flux, diffusers": (["single_transformer_blocks.0.attn.to_q.weight"], "Flux or one of its relatives"),
    "PixArt": (["transformer_blocks.0.attn1.to_q.weight"], "a diffusion transformer"),
    "Cascade": ([f"{UNET}clip_txt_pooled_mapper.weight"], "Stable Cascade"),
    "UNet": (["conv_in.weight", "down_blocks.0.resnets.0.x"], "a UNet alone, with diffusers' names"),
    "bare UNet": (["input_blocks.0.0.weight"], "a UNet alone, whose names lack model.diffusion_model."),
    "VAE": (["decoder.conv_in.weight", "decoder.mid.attn_1.k.weight"], "a VAE alone"),
    "diffusers' VAE": (["encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.x"], "a VAE alone"),
    "text encoder": (["text_model.final_layer_norm.weight"], "a text encoder alone"),
    "CLIP": (["vision_model.post_layernorm.weight", "text_model.final_layer_norm.weight"], "a CLIP with its"),
    "T5": (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
    "refiner": (
        [f"{UNET}label_emb.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"],
        "the refiner of Stable Diffusion XL",
    ),
}  # fmt: skip
FIRST = f"{UNET}input_blocks.0.0.weight"


def save(path, **values):
    save_file(values, path)
    return path


@each_row("key", KINDS)
def test_a_file_is_refused_as_what_it_is(key, tmp_path, out):
    names, kind = KINDS[key]
    path = save(tmp_path / "file.safetensors", **dict.fromkeys(names, ONE))
    with refused(f"{path}: is {kind}"):
        import_model(path, out)
    with refused(r".*neither a diffusers folder .*; it is " + kind, FileNotFoundError):
        load_pipeline(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / path.name)
    with refused(rf"{folder}: neither a diffusers folder .*; file.safetensors is {kind}", FileNotFoundError):
        load_pipeline(folder)


def test_a_vector_of_a_text_encoder_is_an_inversion(tmp_path, out):
    path = save(tmp_path / "file.safetensors", **{"my-cat": np.zeros((2, 768), np.float32)})
    with refused(f"{path}: is a textual inversion"):
        import_model(path, out)


@each_row(("channels", "kind"), [(9, "an inpainting model"), (8, ".*InstructPix2Pix"), (5, ".*depth")])
def test_a_unet_that_reads_a_picture_is_named(channels, kind, tmp_path, out):
    path = save(tmp_path / "file.safetensors", **{FIRST: np.zeros((8, channels, 3, 3), np.float32)})
    with refused(f"{path}: is {kind}.*: its UNet reads {channels} channels, and not 4"):
        import_model(path, out)


def test_a_peft_folder_is_a_lora(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused(f"{tmp_path}: neither .*; it is a LoRA", FileNotFoundError):
        load_pipeline(tmp_path)


def test_a_model_is_none_of_them(family, tmp_path, out):
    single = tmp_path / "single.safetensors"
    export(make_run(tmp_path / "source" / "run", family), single)
    assert file_kinds.find_kind(tensors.open_file(single)) is None
    with refused(".*neither .*; it is a single file: python -m dspo_jax.convert import", FileNotFoundError):
        load_pipeline(single)
