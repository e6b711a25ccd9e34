"""Names of Stable Diffusion 3's tensors in single files: Stability's own, which ComfyUI reads and writes.

Source: the modules of Stability-AI/sd3.5, and diffusers' conversion of such files.
"""

from collections.abc import Mapping

from dspo_jax.models.config import NetworkConfig
from dspo_jax.models.mmdit import POSITIONS
from dspo_jax.weights.places import Layout, Place

_ROOT = "model.diffusion_model."
_STEM = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
# Of a block: what image and text have each, here and there.
_IMAGE, _TEXT = "x_block", "context_block"
_BLOCK = {
    "norm1.linear": f"{_IMAGE}.adaLN_modulation.1",
    "norm1_context.linear": f"{_TEXT}.adaLN_modulation.1",
    "attn.to_out.0": f"{_IMAGE}.attn.proj",
    "attn.to_add_out": f"{_TEXT}.attn.proj",
    "attn.norm_q": f"{_IMAGE}.attn.ln_q",
    "attn.norm_k": f"{_IMAGE}.attn.ln_k",
    "attn.norm_added_q": f"{_TEXT}.attn.ln_q",
    "attn.norm_added_k": f"{_TEXT}.attn.ln_k",
    "attn2.to_out.0": f"{_IMAGE}.attn2.proj",
    "attn2.norm_q": f"{_IMAGE}.attn2.ln_q",
    "attn2.norm_k": f"{_IMAGE}.attn2.ln_k",
    "ff.net.0.proj": f"{_IMAGE}.mlp.fc1",
    "ff.net.2": f"{_IMAGE}.mlp.fc2",
    "ff_context.net.0.proj": f"{_TEXT}.mlp.fc1",
    "ff_context.net.2": f"{_TEXT}.mlp.fc2",
}
# Queries, keys and values, which are one layer there.
_STACKED = {
    f"{_IMAGE}.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    f"{_TEXT}.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    f"{_IMAGE}.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
_LEAVES = ("weight", "bias")
_COUNTERPARTS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


def transformer_layout(config: NetworkConfig) -> Layout:
    """Returns the layout of the transformer; `config` is its config.json with all keys.

    Where diffusers scales and shifts alone, the file has the shift first: behind the last block and in its
    text. There the halves of the layer change places.
    """
    modules = dict(_STEM)
    tensors = {POSITIONS: Place("pos_embed")}
    swapped = {"norm_out.linear": "final_layer.adaLN_modulation.1"}
    for number in range(config["num_layers"]):
        ours, theirs = f"transformer_blocks.{number}", f"joint_blocks.{number}"
        modules |= {f"{ours}.{part}": f"{theirs}.{new}" for part, new in _BLOCK.items()}
        for stack, layers in _STACKED.items():
            for part, layer in enumerate(layers):
                for leaf in _LEAVES:
                    place = Place(f"{theirs}.{stack}.{leaf}", "third", part)
                    tensors[f"{ours}.{layer}.{leaf}"] = place
    last = config["num_layers"] - 1
    text = "norm1_context.linear"
    swapped[f"transformer_blocks.{last}.{text}"] = f"joint_blocks.{last}.{_BLOCK[text]}"
    for layer, new in swapped.items():
        tensors |= {f"{layer}.{leaf}": Place(f"{new}.{leaf}", "swapped") for leaf in _LEAVES}
    return Layout(_ROOT, modules, tensors)


def text_layouts(configs: Mapping[str, NetworkConfig]) -> dict[str, Layout]:
    """Returns the layouts of those text encoders that `configs` names.

    No single file projects the pooled state of the first CLIP: what diffusers reads as its projection is the
    identity, and a projection that such a file holds nevertheless is read by no program.
    """
    layouts = {}
    for component in configs.keys() & _COUNTERPARTS.keys():
        root = f"text_encoders.{_COUNTERPARTS[component]}.transformer."
        names = ("shared", "encoder") if component == "text_encoder_3" else ("text_model", "text_projection")
        tensors, passed_over = {}, r"(?!)"
        if component == "text_encoder":
            tensors["text_projection.weight"] = Place("text_projection.weight", "identity")
            passed_over = r"text_projection\.weight"
        elif component == "text_encoder_3":
            passed_over = r"encoder\.embed_tokens\.weight"  # a copy of "shared"
        layouts[component] = Layout(root, {name: name for name in names}, tensors, passed_over)
    return layouts
