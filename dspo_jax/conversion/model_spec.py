"""Headers of single files that describe their model: Stability's ModelSpec, and keys of kohya's trainer.

Model browsers show it; ComfyUI and web user interfaces tell by it which model an adapter is for. Sources:
Stability-AI/ModelSpec, version 1.0.0; `save_checkpoint` of ComfyUI; library/sai_model_spec.py of
kohya-ss/sd-scripts; `detect_version` of the web user interface's extensions-builtin/Lora/network.py, which
takes every adapter without the keys of kohya for one of Stable Diffusion 1.
"""

from collections.abc import Mapping
from pathlib import Path

from dspo_jax.conversion.single_file import write_process
from dspo_jax.models.model import Model
from dspo_jax.weights.model_dir import read_json

# By family: the name of the architecture, that of v-prediction, and what kohya's trainer calls the base.
_NAMES = {
    "1": ("stable-diffusion-v1", "stable-diffusion-v1", "sd_v1"),
    "2": ("stable-diffusion-v2-512", "stable-diffusion-v2-768-v", "sd_v2"),
    "3": ("stable-diffusion-3", "stable-diffusion-3", "sd3"),
    "XL": ("stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}


def make_metadata(
    models: Mapping[str, Model],
    base: Path,
    title: str,
    description: str,
    alphas: Mapping[int, float] | None = None,
) -> dict[str, str]:
    """Returns the entries of a safetensors header.

    Args:
      models: architectures of the base by component.
      base: its diffusers folder, whose scheduler config is read.
      title: of the model.
      description: in a sentence.
      alphas: of adapters, rank -> alpha in kohya's sense: what they add is multiplied by alpha / rank; None
        for a whole model.
    """
    family = _find_family(models)
    _, process = write_process(read_json(base / "scheduler" / "scheduler_config.json"))
    usual, of_v, kohya = _NAMES[family]
    architecture = of_v if "v" in process.values() else usual
    spec = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture if alphas is None else f"{architecture}/lora",
        "modelspec.implementation": "sgm" if alphas is None else "diffusers",
        "modelspec.title": title,
        "modelspec.description": description,
        **process,
    }
    size = models["transformer" if family == "3" else "unet"].settings["sample_size"]
    if size is not None:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        factor = models["vae"].settings["vae_scale_factor"]
        spec["modelspec.resolution"] = f"{width * factor}x{height * factor}"
    if alphas is None:
        return spec

    def only(values: set[float]) -> str:
        return f"{values.pop():g}" if len(values) == 1 else "Dynamic"

    return spec | {
        "ss_base_model_version": kohya,
        "ss_v2": str(family == "2"),
        "ss_network_module": "networks.lora_sd3" if family == "3" else "networks.lora",
        "ss_network_dim": only(set(alphas)),
        "ss_network_alpha": only(set(alphas.values())),
        "ss_output_name": title,
    }


def _find_family(models: Mapping[str, Model]) -> str:
    """Tells Stable Diffusion 1, 2, 3 and XL apart by their parts; the text encoder of 2 has gelu."""
    if "transformer" in models:
        return "3"
    if "text_encoder_2" in models:
        return "XL"
    return "2" if models["text_encoder"].settings["hidden_act"] == "gelu" else "1"
