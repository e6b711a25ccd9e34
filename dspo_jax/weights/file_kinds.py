"""Weights files that are no text-to-image model: their kinds, by the names of their tensors, for refusals.

Sources of the names: diffusers, PEFT, kohya-ss/sd-scripts, LyCORIS, ControlNet, IP-Adapter, and the published
files of the models themselves.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from dspo_jax.weights.tensors import Tensor, open_file

_ORIGINAL_UNET = "model.diffusion_model."
_INTO_FOLDER = "it belongs into a diffusers folder, as the file that it replaces there"
_FUSE = (
    "a LoRA, which changes another model's layers and is none itself; name it with --lora beside its model, "
    "or add it to that: python -m dspo_jax.convert import --model=MODEL --lora=FILE --out=DIR"
)
_LORA = re.compile(
    r"lora_(unet|te\d?|transformer|prior)_.*"  # kohya's
    r"|.*\blora_(A|B|up|down|mid|linear_layer)\b.*"  # PEFT's, and kohya's
    r"|.*\.(lora|\w+_lora)\.(up|down)\..*"  # diffusers' before it used PEFT
    r"|.*\.(hada_w\d_[ab]|lokr_w\d(_[ab])?|oft_blocks|dora_scale)"  # LyCORIS'
)

# A pattern of names, one of which is enough -> what the file is. The first that fits.
_KINDS = [
    (re.compile(pattern), kind)
    for pattern, kind in (
        (_LORA.pattern, _FUSE),
        (
            r"control_model\..*|(controlnet_|input_hint_block|lllite_).*",
            "a ControlNet, which steers another model by a picture; this project trains models without one",
        ),
        (r"(image_proj|ip_adapter)\..*", "an IP-Adapter, which steers another model by a picture"),
        (
            r"adapter\..*|body\.\d+\.(block1|in_conv).*",
            "a T2I-Adapter, which steers another model by a picture",
        ),
        (r"emb_params|string_to_(param|token).*|<[^>]*>", "a textual inversion: words for another model"),
        (
            r"(model\.diffusion_model\.|transformer\.)?(double_blocks|single_transformer_blocks)\..*",
            "Flux or one of its relatives, not Stable Diffusion 1, 2, 3 or XL",
        ),
        (r".*clip_txt(_pooled)?_mapper\..*", "Stable Cascade, not Stable Diffusion 1, 2, 3 or XL"),
        (
            r"(model\.diffusion_model\.|transformer\.)?(transformer_blocks|blocks|layers)\.\d+\.\w+\..*",
            "a diffusion transformer, not Stable Diffusion 1, 2, 3 or XL",
        ),
        (r"encoder\.block\.\d+\.layer\..*", "a T5 text encoder alone"),
    )
]
# The same, for files that hold no UNet in the original layout.
_PARTS = [
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"(diffusion_model\.)?input_blocks\.\d+\..*", f"a UNet alone, whose names lack {_ORIGINAL_UNET}"),
        (r"(unet\.)?down_blocks\.\d+\..*", f"a UNet alone, with diffusers' names; {_INTO_FOLDER}"),
        (r"(first_stage_model\.)?(encoder|decoder)\.conv_in\..*", f"a VAE alone; {_INTO_FOLDER}"),
        (r"vision_model\..*", "a CLIP with its image side, which a reward is made of"),
        (
            r"(text_model|transformer\.resblocks|cond_stage_model|conditioner)\..*|text_projection.*",
            f"a text encoder alone; {_INTO_FOLDER}",
        ),
        (r"conv_first\..*|model\.\d+\..*", "an upscaler of pictures"),
    )
]
# Channels that the first convolution reads -> the model; without a picture it reads the four of the latents.
_CHANNELS = {
    5: "a model that reads a depth map, too",
    8: "a model that edits a picture (InstructPix2Pix)",
    9: "an inpainting model",
}


def find_kind(tensors: Mapping[str, Tensor]) -> str | None:
    """Finds what a file with these tensors is; None for an original checkpoint, or if it is unknown."""

    def find(kinds: list[tuple[re.Pattern[str], str]]) -> str | None:
        return next((kind for pattern, kind in kinds if any(map(pattern.fullmatch, tensors))), None)

    kind = find(_KINDS)
    if kind is None and not any(name.startswith(_ORIGINAL_UNET) for name in tensors):
        return find(_PARTS) or _find_inversion(tensors)
    first = tensors.get(f"{_ORIGINAL_UNET}input_blocks.0.0.weight")
    if kind is None and first is not None and len(first.shape) == 4 and first.shape[1] in _CHANNELS:
        return f"{_CHANNELS[first.shape[1]]}: its UNet reads {first.shape[1]} channels, and not 4"
    first_text = "conditioner.embedders.0.model."
    if kind is None and f"{_ORIGINAL_UNET}label_emb.0.0.weight" in tensors:
        others = {name.split(".")[2] for name in tensors if name.startswith("conditioner.embedders.")} - {"0"}
        if not others and any(name.startswith(first_text) for name in tensors):
            return "the refiner of Stable Diffusion XL, which goes on with pictures of the base model"
    return kind


def _find_inversion(tensors: Mapping[str, Tensor]) -> str | None:
    """Finds a textual inversion: a few vectors of a text encoder's width."""
    widths = {tensor.shape[-1] for tensor in tensors.values() if 1 <= len(tensor.shape) <= 2}
    small = len(tensors) <= 2 and widths and widths <= {768, 1024, 1280}
    return "a textual inversion: words for another model" if small else None


def explain(path: Path) -> str:
    """Ends the refusal of a path that is neither a model's folder nor a run: "; it is ...", or nothing.

    Raises:
      UserError: a damaged file.
    """
    if path.is_file() and path.suffix == ".safetensors":
        kind = find_kind(open_file(path))
        return f"; it is {kind or 'a single file: python -m dspo_jax.convert import makes a folder of it'}"
    if (path / "adapter_config.json").is_file():
        return f"; it is {_FUSE}"
    for file in sorted(path.glob("*.safetensors")):
        kind = find_kind(open_file(file))
        if kind:
            return f"; {file.name} is {kind}"
    return ""
