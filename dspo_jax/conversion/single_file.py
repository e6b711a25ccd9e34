"""The names of single-file checkpoints, both ways from one table: CompVis' original layout, with OpenCLIP's.

A single `.safetensors` file with `model.diffusion_model.*`, `first_stage_model.*` and `cond_stage_model.*`
(SDXL: `conditioner.embedders.*`) is what Stable Diffusion was published as and most fine-tunes are shared as.
Source: the modules of CompVis/latent-diffusion, Stability-AI/generative-models and open_clip.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Container, Mapping

import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.models.config import NetworkConfig
from dspo_jax.weights.tensors import Tensor

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

# Tensors of such files besides the weights: running averages, the noise schedule, the discriminator that the
# VAE was trained with, and what CLIP's image side needs of the text side.
_BY_THE_WAY = re.compile(
    r"model_ema\..*|.*alphas_cumprod.*|betas|posterior_.*|logvar|lvlb_weights|scale_factor|denoiser\.sigmas"
    r"|first_stage_model\.loss\..*"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(.*\.)?"
    r"(position_ids|logit_scale|attn_mask|text_projection(\.weight)?)"
    r"|v_pred|ztsnr"
)

# Empty tensors, and two numbers, by which programs that load such files are told how a model was trained:
# ComfyUI's names, which other programs read and write as well.
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"
_NOT_COMPUTED = {
    "edm_vpred.sigma_max": "on the noise levels of EDM, as CosXL is",
    "edm_vpred.sigma_min": "on the noise levels of EDM, as CosXL is",
    "edm_mean": "on the noise levels of EDM, as Playground 2.5 is",
    "edm_std": "on the noise levels of EDM, as Playground 2.5 is",
}
# Keys of a file's metadata that say the same, and their values: Stability's model specification and ComfyUI.
_SPECIFICATIONS = ("modelspec.prediction_type", "modelspec.predict_key")
_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_BARE_TEXT = re.compile(r"(embeddings|encoder|final_layer_norm)\.")


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a component's tensor in the single file.

    Attributes:
      name: the name of the tensor there.
      kind: "same"; "1x1", a linear map kept as a convolution [O, I, 1, 1]; "transposed" [I, O]; or "third",
        one of three stacked along the first axis.
      part: which third.
    """

    name: str
    kind: str = "same"
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """One component's names in the single file.

    Attributes:
      root: prefix of all names there.
      modules: module of the component -> module there; the longest that fits decides.
      tensors: tensor of the component -> tensor there, where it does not follow its module.
      passed_over: a pattern of further names below `root` that the component does not need.
    """

    root: str
    modules: Mapping[str, str]
    tensors: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    passed_over: str = r"(?!)"

    def place(self, name: str) -> Place:
        """Finds the place of the component's tensor `name`.

        Raises:
          UserError: the layout has no such tensor.
        """
        if name in self.tensors:
            place = self.tensors[name]
            return dataclasses.replace(place, name=self.root + place.name)
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = self.modules.get(".".join(parts[:cut]))
            if module is not None:
                return Place(".".join([self.root + module, *parts[cut:]]))
        raise UserError(f"tensor {name} has no place in a single-file checkpoint")


def make_layouts(configs: Mapping[str, NetworkConfig]) -> dict[str, Layout]:
    """Returns the layout of every component.

    Args:
      configs: config.json of "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2", with all keys.

    Raises:
      UserError: a VAE that no such file can hold.
    """
    vae_class = configs["vae"].get("_class_name")
    if vae_class != "AutoencoderKL":
        raise UserError(f"{vae_class} has no place in a single-file checkpoint; only AutoencoderKL has")
    layouts = {"unet": _unet_layout(configs["unet"]), "vae": _vae_layout(configs["vae"])}
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


def _unet_layout(config: NetworkConfig) -> Layout:
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


def read_process(names: Container[str], metadata: Mapping[str, str]) -> dict[str, str | bool]:
    """Returns what a single file says of its model's forward process, as keys of a scheduler_config.json.

    They are `prediction_type` and, where it is true, `rescale_betas_zero_snr`; a file may say nothing.

    Args:
      names: of its tensors.
      metadata: from its header.

    Raises:
      UserError: it was trained in a way that is not supported, or says two things.
    """
    for name, way in _NOT_COMPUTED.items():
        if name in names:
            raise UserError(f"has the tensor {name}: it was trained {way}, which is not supported")
    said = (_PREDICTIONS.get(metadata.get(key, "").lower()) for key in _SPECIFICATIONS)
    prediction_type = "v_prediction" if _V_PREDICTION in names else next(filter(None, said), None)
    if _ZERO_SNR not in names:
        return {} if prediction_type is None else {"prediction_type": prediction_type}
    if prediction_type == "epsilon":
        raise UserError(
            f"has the tensor {_ZERO_SNR}, for zero terminal SNR, but its header says that it predicts "
            "epsilon, which cannot be trained so; mend the file where it was made"
        )
    return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def write_process(scheduler: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata by which a single file says what `read_process` reads."""
    velocity = scheduler.get("prediction_type") == "v_prediction"
    markers = {_V_PREDICTION: velocity, _ZERO_SNR: bool(scheduler.get("rescale_betas_zero_snr"))}
    empty = Tensor((0,), np.dtype("float32"), lambda: np.zeros(0, np.float32))
    metadata = dict.fromkeys(_SPECIFICATIONS, "v" if velocity else "epsilon")
    return {name: empty for name, present in markers.items() if present}, metadata


def _usual_names(single: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> Mapping[str, Tensor]:
    """Renames the tensors of a single file to the names of the published files.

    Web user interfaces saved OpenAI's CLIP without "text_model."; SD-Turbo has Stable Diffusion 2's tower
    where XL has its first.
    """
    root = layouts["text_encoder"].root
    turbo = "conditioner.embedders.0."
    renamed = {}
    for name in single:
        if root.endswith(".transformer.") and name.startswith(root) and _BARE_TEXT.match(name, len(root)):
            renamed[name] = f"{root}text_model.{name.removeprefix(root)}"
        elif root == "cond_stage_model.model." and name.startswith(f"{turbo}model."):
            renamed[name] = f"cond_stage_model.{name.removeprefix(turbo)}"
    return {renamed.get(name, name): tensor for name, tensor in single.items()}


def _find_family(names: Collection[str]) -> str | None:
    for prefix, family in (
        ("conditioner.embedders.1.", "XL"),
        ("cond_stage_model.model.", "2"),
        ("cond_stage_model.transformer.", "1"),
    ):
        if any(name.startswith(prefix) for name in names):
            return family
    return None


def _name_family(layouts: Mapping[str, Layout]) -> str:
    if "text_encoder_2" in layouts:
        return "XL"
    return "2" if layouts["text_encoder"].root.endswith(".model.") else "1"


def split(
    single: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> dict[str, dict[str, Tensor]]:
    """Returns the components of a single file under torch's names; one of which it has no tensor is absent.

    Args:
      single: tensors of the single file.
      layouts: of all components.
      shapes: component -> name -> shape of every tensor that it needs.

    Raises:
      UserError: a tensor that is missing, belongs nowhere, or has another shape.
    """
    single = _usual_names(single, layouts)
    found, wanted = _find_family(single), _name_family(layouts)
    if found not in (None, wanted):
        raise UserError(f"is Stable Diffusion {found}, but --base is {wanted}; name a base of the same kind")
    if not any(name.startswith(layouts["unet"].root) for name in single):
        raise UserError(
            f"holds no tensor {layouts['unet'].root}*, so it is not a checkpoint in the original layout; "
            "a component of a diffusers folder belongs into such a folder"
        )
    present = {
        component: layout
        for component, layout in layouts.items()
        if any(name.startswith(layout.root) for name in single)
    }
    components: dict[str, dict[str, Tensor]] = {}
    rest = {name for name in single if not _BY_THE_WAY.fullmatch(name)}
    for component, layout in present.items():
        components[component] = {}
        for name, shape in shapes[component].items():
            place = layout.place(name)
            if place.name not in single:
                raise UserError(
                    f"tensor {place.name} is missing; is --base of the same architecture ({component})?"
                )
            stored = single[place.name]
            if stored.shape not in _stored_shapes(shape, place):
                raise UserError(
                    f"tensor {place.name} has shape {stored.shape}, --base asks for "
                    f"{_stored_shapes(shape, place)[0]}; is it of the same architecture ({component})?"
                )
            components[component][name] = Tensor(shape, stored.dtype, _take(stored, place, shape))
            rest.discard(place.name)
        unused = re.compile(re.escape(layout.root) + layout.passed_over)
        rest = {name for name in rest if not unused.fullmatch(name)}
    if rest:
        raise UserError(
            f"{len(rest)} tensor(s) that --base does not ask for, first {min(rest)}; "
            "is it of the same architecture?"
        )
    return components


def _stored_shapes(shape: tuple[int, ...], place: Place) -> list[tuple[int, ...]]:
    """Returns the shapes under which a tensor may stand in the single file; the first is the usual one."""
    match place.kind:
        case "1x1":
            return [(*shape, 1, 1), (*shape, 1), shape]
        case "transposed":
            return [shape[::-1]]
        case "third":
            return [(3 * shape[0], *shape[1:])]
    return [shape]


def _take(stored: Tensor, place: Place, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        value = stored.read()
        if place.kind == "transposed":
            return value.T
        if place.kind == "third":
            return value[place.part * shape[0] : (place.part + 1) * shape[0]]
        return value.reshape(shape)

    return read


def join(components: Mapping[str, Mapping[str, Tensor]], layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """Returns the inverse of `split`."""
    single = {}
    stacked: dict[str, list[Tensor]] = {}  # the thirds, in order
    for component, tensors in components.items():
        for name, tensor in tensors.items():
            place = layouts[component].place(name)
            if place.kind == "third":
                stacked.setdefault(place.name, [tensor] * 3)[place.part] = tensor
            else:
                shape = _stored_shapes(tensor.shape, place)[0]
                single[place.name] = Tensor(shape, tensor.dtype, _give(tensor, place, shape))
    for name, parts in stacked.items():
        shape = _stored_shapes(parts[0].shape, Place(name, "third"))[0]
        single[name] = Tensor(shape, parts[0].dtype, _stack(parts))
    return single


def _give(tensor: Tensor, place: Place, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: tensor.read().T if place.kind == "transposed" else tensor.read().reshape(shape)


def _stack(parts: list[Tensor]) -> Callable[[], np.ndarray]:
    return lambda: np.concatenate([part.read() for part in parts])
