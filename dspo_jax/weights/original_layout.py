"""Names of a component's tensors in the original layout of Stable Diffusion: CompVis' and OpenCLIP's.

Source: the modules of CompVis/latent-diffusion, Stability-AI/generative-models and open_clip.
"""

from collections.abc import Mapping

from dspo_jax.errors import UserError
from dspo_jax.models.config import NetworkConfig
from dspo_jax.weights.places import Layout, Place
from dspo_jax.weights.stable_diffusion_3_layout import text_layouts, transformer_layout

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def make_layouts(configs: Mapping[str, NetworkConfig]) -> dict[str, Layout]:
    """Returns the layout of every component.

    Args:
      configs: config.json of "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2", with all keys;
        for Stable Diffusion 3 of "transformer", "vae" and up to three text encoders.

    Raises:
      UserError: a VAE that no such file can hold.
    """
    vae_class = configs["vae"].get("_class_name")
    if vae_class != "AutoencoderKL":
        raise UserError(f"{vae_class} has no place in a single-file checkpoint; only AutoencoderKL has")
    vae = _vae_layout(configs["vae"])
    if "transformer" in configs:
        return {
            "transformer": transformer_layout(configs["transformer"]),
            "vae": vae,
            **text_layouts(configs),
        }
    layouts = {"unet": unet_layout(configs["unet"]), "vae": vae}
    sdxl = "text_encoder_2" in configs
    first = "conditioner.embedders.0" if sdxl else "cond_stage_model"
    # Stable Diffusion 2's tower is OpenCLIP's, which the activation tells from OpenAI's.
    if configs["text_encoder"]["hidden_act"] == "gelu":
        layouts["text_encoder"] = _open_clip_layout(f"{first}.model.", configs["text_encoder"])
    else:
        layouts["text_encoder"] = Layout(f"{first}.transformer.", {"text_model": "text_model"})
    if sdxl:
        layouts["text_encoder_2"] = _open_clip_layout(
            "conditioner.embedders.1.model.", configs["text_encoder_2"]
        )
    return layouts


def unet_layout(config: NetworkConfig) -> Layout:
    """Returns the layout of the UNet; `config` is its config.json with all keys."""
    levels = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    depths = list(layers) if isinstance(layers, list | tuple) else [layers] * levels
    modules = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }

    def add_resnet(name: str, theirs: str) -> None:
        modules.update({f"{name}.{part}": f"{theirs}.{new}" for part, new in _RESNET.items()})

    add_resnet("mid_block.resnets.0", "middle_block.0")
    add_resnet("mid_block.resnets.1", "middle_block.2")
    block = 1  # their blocks are numbered through: a resnet with its attention is one, a downsampler too
    for level, depth in enumerate(depths):
        for layer in range(depth):
            add_resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{block}.0")
            modules[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
            block += 1
        if level < levels - 1:
            modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    block = 0  # but an upsampler is part of its level's last block
    for level, (depth, kind) in enumerate(zip(reversed(depths), config["up_block_types"], strict=True)):
        for layer in range(depth + 1):
            add_resnet(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{block}.0")
            modules[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{block}.1"
            block += 1
        position = 2 if kind.startswith("CrossAttn") else 1
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{position}.conv"
    return Layout("model.diffusion_model.", modules)


def _vae_layout(config: NetworkConfig) -> Layout:
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    tensors = {}

    def add_resnet(name: str, theirs: str) -> None:
        modules[name] = theirs
        modules[f"{name}.conv_shortcut"] = f"{theirs}.nin_shortcut"

    for half in ("encoder", "decoder"):
        modules |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for number in (0, 1):
            add_resnet(f"{half}.mid_block.resnets.{number}", f"{half}.mid.block_{number + 1}")
        ours, theirs = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
        modules[f"{ours}.group_norm"] = f"{theirs}.norm"
        for part, new in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            modules[f"{ours}.{part}"] = f"{theirs}.{new}"
            tensors[f"{ours}.{part}.weight"] = Place(f"{theirs}.{new}.weight", "1x1")
    for level in range(levels):
        for layer in range(layers):
            add_resnet(f"encoder.down_blocks.{level}.resnets.{layer}", f"encoder.down.{level}.block.{layer}")
        modules[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        theirs = f"decoder.up.{levels - 1 - level}"  # counted from the image
        for layer in range(layers + 1):
            add_resnet(f"decoder.up_blocks.{level}.resnets.{layer}", f"{theirs}.block.{layer}")
        modules[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"{theirs}.upsample.conv"
    return Layout("first_stage_model.", modules, tensors)


def _open_clip_layout(root: str, config: NetworkConfig) -> Layout:
    modules = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.final_layer_norm": "ln_final",
    }
    tensors = {
        "text_model.embeddings.position_embedding.weight": Place("positional_embedding"),
        "text_projection.weight": Place("text_projection", "transposed"),
    }
    layers = config["num_hidden_layers"]
    for layer in range(layers):
        ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        modules |= {f"{ours}.{part}": f"{theirs}.{new}" for part, new in _OPEN_CLIP_LAYER.items()}
        for part, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            for leaf in ("weight", "bias"):
                tensors[f"{ours}.self_attn.{projection}.{leaf}"] = Place(
                    f"{theirs}.attn.in_proj_{leaf}", "third", part
                )
    # Stable Diffusion 2 reads the states before the last layer, which its diffusers folders therefore lack.
    return Layout(root, modules, tensors, passed_over=rf"transformer\.resblocks\.{layers}\..*")
