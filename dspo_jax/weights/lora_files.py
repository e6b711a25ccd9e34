"""LoRA files as people share them: names of PEFT and diffusers, of kohya and of LyCORIS' LoCon.

Each names some layers of a model, and adds scale * up @ down to the weight of each; scale is alpha / rank.
PEFT's DoRA brings the weights of each output to a length of its own after that.
Sources of the names: diffusers' `save_lora_weights` and `load_lora_weights`, in their old forms too; PEFT's
`get_peft_model_state_dict`; networks/lora.py of kohya-ss/sd-scripts; lycoris/modules/locon.py of LyCORIS.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspo_jax import json_files
from dspo_jax.errors import UserError
from dspo_jax.models.lora import fold as fold_weight
from dspo_jax.models.model import Model
from dspo_jax.weights import tensors
from dspo_jax.weights.layout import torch_shapes
from dspo_jax.weights.lora_names import Target, name_layers
from dspo_jax.weights.tensors import Tensor

METADATA_KEY = "lora_adapter_metadata"
"""Entry of a header in which diffusers keeps PEFT's configs of an adapter, as JSON."""

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_PARTS = re.compile(
    r"(?P<layer>.+)\.(?:"
    r"(?P<down>lora_A(?:\.\w+)?\.weight|lora_down\.weight|lora(?:_linear_layer)?\.down\.weight)"
    r"|(?P<up>lora_B(?:\.\w+)?\.weight|lora_up\.weight|lora(?:_linear_layer)?\.up\.weight)"
    r"|(?P<mid>lora_mid\.weight)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.\w+){0,2})"
    r"|(?P<alpha>alpha))"
)
# What diffusers called the layers of attention before it used PEFT.
_OLD_NAMES = (
    (re.compile(r"\.self_attn\.to_(q|k|v|out)_lora\."), r".self_attn.\1_proj.lora."),
    (re.compile(r"\.processor\.to_(q|k|v)_lora\."), r".to_\1.lora."),
    (re.compile(r"\.processor\.to_out_lora\."), ".to_out.0.lora."),
)
# Adapters that are no LoRA, and the tensors that they are told by.
_OTHERS = (
    ("DoRA under LyCORIS' names", r".*\.dora_scale"),
    ("LoKr", r".*\.lokr_\w+"),
    ("LoHa", r".*\.hada_\w+"),
    ("OFT", r".*\.b?oft_\w+(\..*)?"),
    ("GLoRA", r".*\.[ab][12]\.weight"),
    ("IA3", r".*\.(on_input|ia3_\w+(\..*)?)"),
    ("trained norms", r".*\.[wb]_norm"),
    ("trained biases or whole weights", r".*\.(diff|diff_b|set_weight|bias)"),
)


@dataclasses.dataclass(frozen=True)
class Module:
    """What a file adds to one weight: scale * up @ down; of DoRA the sum has lengths of its own.

    Attributes:
      down: [r, in], of a convolution [r, in, k, k].
      up: [out, r], of a convolution [out, r, 1, 1].
      scale: alpha / r, or alpha / sqrt(r) where a file says that it is rank-stabilised.
      magnitude: [out] of DoRA, else None.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    def product(self) -> np.ndarray:
        """Computes scale * up @ down, float32, in the shape of the weight.

        Raises:
          UserError: a number of the file is not finite.
        """
        down, up = (np.asarray(half.read(), np.float32) for half in (self.down, self.up))
        added = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        return np.float32(self.scale) * added.reshape(len(up), *down.shape[1:])


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A LoRA file that has been opened for a model.

    Attributes:
      path: of the file.
      weight: what all that it adds is multiplied by.
      modules: component -> name of the weight as torch has it -> what is added.
    """

    path: Path
    weight: float
    modules: Mapping[str, Mapping[str, Module]]


def parse_lora(text: str, key: str = "--lora=") -> tuple[Path, float]:
    """Parses `FILE` or `FILE:WEIGHT` to (file, weight); the weight is 1 unless it is given.

    `key` is what an error has before the text.

    Raises:
      UserError: the weight is no finite number, or the file is a pickle or a folder.
    """
    name, colon, number = text.rpartition(":")
    if not colon or number.endswith(".safetensors"):
        name, number = text, "1"
    try:
        weight = float(number)
    except ValueError as error:
        raise UserError(f"{key}{text}: {number!r} is no weight; write FILE.safetensors:0.8") from error
    if not math.isfinite(weight):
        raise UserError(f"{key}{text}: the weight must be a finite number, as in FILE.safetensors:0.8")
    path = Path(name)
    if path.suffix in _PICKLES:
        raise UserError(f"{key}{text}: a pickle, which is not read; give a .safetensors file")
    if path.is_dir():
        raise UserError(f"{key}{text}: a folder; name the .safetensors file in it")
    return path, weight


def open_lora(text: str, models: Mapping[str, Model], key: str = "--lora=") -> LoRA:
    """Opens `FILE` or `FILE:WEIGHT` for a model, and checks every name and shape; only alphas are read.

    Args:
      text: as `parse_lora` takes it.
      models: architectures of the components that may be adapted: the denoiser and the text encoders.
      key: what an error has before the text.

    Raises:
      FileNotFoundError: no such file.
      UserError: it is damaged, no LoRA, or of another model.
    """
    path, weight = parse_lora(text, key)
    stored = tensors.open_file(path)
    _refuse_others(path, stored)
    configs = _read_configs(path)
    shapes = {component: torch_shapes(model) for component, model in models.items()}
    modules: dict[str, dict[str, Module]] = {}
    for (component, layer), (tensor_name, parts) in _group(path, stored, name_layers(models)).items():
        name = f"{layer}.weight"
        try:
            scale = _read_scale(parts, configs, component, layer)
            module = _make_module(parts, shapes[component][name], scale)
        except UserError as error:
            raise UserError(f"{path}: tensor {tensor_name}: {error}") from error
        modules.setdefault(component, {})[name] = _checked(path, tensor_name, module)
    return LoRA(path, weight, modules)


def _refuse_others(path: Path, stored: Mapping[str, Tensor]) -> None:
    for kind, pattern in _OTHERS:
        for key in stored:
            if re.fullmatch(pattern, key):
                raise UserError(
                    f"{path}: holds {kind} (tensor {key}), but LoRA, LoCon and PEFT's DoRA alone are read; "
                    "merge it into its model with the program that it was made for, and name the merged model"
                )


def _group(
    path: Path, stored: Mapping[str, Tensor], layers: Mapping[str, Sequence[Target]]
) -> dict[tuple[str, str], tuple[str, dict[str, Tensor]]]:
    """Returns (component, layer) -> (a tensor's name for messages, its "down", "up", "mid" and "alpha").

    Raises:
      UserError: a name that is unknown or twice the same.
    """
    groups: dict[tuple[str, str], tuple[str, dict[str, Tensor]]] = {}
    for key, tensor in stored.items():
        name = key.removeprefix("base_model.model.").replace(".base_model.model.", ".")
        for old, new in _OLD_NAMES:
            name = old.sub(new, name)
        match = _PARTS.fullmatch(name)
        if match is None:
            raise UserError(
                f"{path}: tensor {key}: not of a LoRA as it is known here, which has lora_A and lora_B, "
                "lora_down, lora_up, lora_mid and alpha"
            )
        if match["layer"] not in layers:
            raise UserError(
                f"{path}: tensor {key}: the model has no such layer; is the LoRA for a model of this kind?"
                f"{_name_base(path)}"
            )
        part = str(match.lastgroup)
        for target in layers[match["layer"]]:
            parts = groups.setdefault((target.component, target.layer), (key, {}))[1]
            if part in parts:
                raise UserError(f"{path}: tensor {key}: of a layer that is adapted under another name, too")
            parts[part] = target.cut(tensor) if part in ("up", "magnitude") else tensor
    if not groups:
        raise UserError(f"{path}: holds no tensors; fetch the file again")
    return groups


def _name_base(path: Path) -> str:
    """Says of which model a file is by its header, after a refusal; nothing where it does not say it."""
    metadata = tensors.read_metadata(path)
    said = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version")
    return f" Its header says {json_files.shown(said)}" if said else ""


def _make_module(parts: Mapping[str, Tensor], shape: tuple[int, ...], scale: float) -> Module:
    """Makes the module of a weight of the given shape.

    Raises:
      UserError: a half does not fit.
    """
    down = _compose(parts["down"], parts["mid"]) if "mid" in parts else parts["down"]
    rank = down.shape[0]
    up_shape = (shape[0], rank, *(1 for _ in shape[2:]))
    magnitude = parts.get("magnitude")
    if magnitude is not None:
        magnitude = _flatten(magnitude, shape[0])
    return Module(_reshape(down, (rank, *shape[1:])), _reshape(parts["up"], up_shape), scale, magnitude)


def _flatten(magnitude: Tensor, outputs: int) -> Tensor:
    """Returns DoRA's magnitudes as [out]; those of a convolution are stored [1, out, 1, 1]."""
    if math.prod(magnitude.shape) != outputs or outputs not in magnitude.shape:
        raise UserError(
            f"of magnitudes {magnitude.shape}, where the model asks for ({outputs},); is the LoRA of another "
            "model?"
        )
    return Tensor((outputs,), magnitude.dtype, lambda: magnitude.read().reshape(outputs))


def _compose(down: Tensor, mid: Tensor) -> Tensor:
    """Returns LoCon's 1 x 1 convolution to r channels and the k x k one among these as one."""
    inputs = math.prod(down.shape[1:])
    if len(mid.shape) != 4 or mid.shape[1] != down.shape[0]:
        raise UserError(f"its lora_mid {mid.shape} does not follow its lora_down {down.shape}")

    def read() -> np.ndarray:
        first = down.read().astype(np.float32).reshape(-1, inputs)
        return np.einsum("srhw,ri->sihw", mid.read().astype(np.float32), first)

    return Tensor((mid.shape[0], inputs, *mid.shape[2:]), np.dtype("float32"), read)


def _reshape(half: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a half in the shape that its layer asks for; a window of 1 x 1 may be written or not."""

    def without_window(sides: tuple[int, ...]) -> tuple[int, ...]:
        return sides[:2] if set(sides[2:]) <= {1} else sides

    if without_window(half.shape) != without_window(shape):
        raise UserError(
            f"of a half {half.shape}, where the model asks for {shape}; is the LoRA of another model?"
        )
    return Tensor(shape, half.dtype, lambda: half.read().reshape(shape))


def _checked(path: Path, key: str, module: Module) -> Module:
    """Returns a module whose numbers are refused where they are not finite."""

    def check(half: Tensor) -> Tensor:
        def read() -> np.ndarray:
            value = half.read()
            if not np.isfinite(value.astype(np.float32)).all():
                raise UserError(f"{path}: tensor {key}: its layer has numbers that are not finite")
            return value

        return Tensor(half.shape, half.dtype, read)

    magnitude = None if module.magnitude is None else check(module.magnitude)
    return dataclasses.replace(module, down=check(module.down), up=check(module.up), magnitude=magnitude)


def _read_configs(path: Path) -> dict[str, Any]:
    """Returns PEFT's configs of the adapters: of a component as `unet.KEY`, of a file alone as `KEY`."""
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():
        return json_files.read_object(beside, "fetch the LoRA again")
    try:
        configs = json.loads(tensors.read_metadata(path).get(METADATA_KEY, "{}"))
    except ValueError as error:
        raise UserError(f"{path}: {METADATA_KEY} in its header is not JSON; fetch the file again") from error
    if not isinstance(configs, dict):
        raise UserError(f"{path}: {METADATA_KEY} in its header is no JSON object; fetch the file again")
    return configs


def _read_scale(parts: Mapping[str, Tensor], configs: Mapping[str, Any], component: str, layer: str) -> float:
    """Returns alpha / rank of a layer, by its own tensor or by PEFT's configs; alpha is else the rank.

    Raises:
      UserError: a half is missing, or alpha is no number.
    """
    for part in ("down", "up"):
        if part not in parts:
            raise UserError(f"without its lora_{part}; fetch the file again")
    rank = parts["down"].shape[0] if parts["down"].shape else 0
    if rank == 0:
        raise UserError("of rank 0; fetch the file again")

    def get(key: str) -> Any:
        return configs.get(f"{component}.{key}", configs.get(key))

    alpha: Any = None
    if "alpha" in parts:
        values = parts["alpha"].read().astype(np.float64).ravel()
        alpha = float(values[0]) if values.size == 1 else values.tolist()
    else:
        alpha = get("lora_alpha")
        patterns = get("alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            # PEFT's rule: the first that matches the layer's name, or the end of it.
            try:
                fits = re.fullmatch(rf"(.*\.)?({pattern})", layer)
            except re.error as error:
                raise UserError(f"alpha_pattern {pattern!r}: {error}; fetch the file again") from error
            if fits:
                alpha = value
                break
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"alpha = {json_files.shown(alpha)}: must be a finite number; fetch the file again")
    rank_stabilised = "alpha" not in parts and get("use_rslora") is True
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def fold(stored: Mapping[str, Tensor], lora: LoRA, component: str) -> dict[str, Tensor]:
    """Adds what a LoRA has for a component to its weights, which become float32.

    The weight of a LoRA counts for its products alone, of DoRA before the lengths are taken, as in PEFT.

    Args:
      stored: the component's tensors under torch's names.
      lora: opened for the model.
      component: which component they are.
    """

    def add(weight: Tensor, module: Module) -> Tensor:
        def read() -> np.ndarray:
            added = np.float32(lora.weight) * module.product()
            magnitude = None if module.magnitude is None else module.magnitude.read()
            return fold_weight(weight.read().astype(np.float32), added, magnitude)

        return Tensor(weight.shape, np.dtype("float32"), read)

    modules = lora.modules.get(component, {})
    return {**stored, **{name: add(stored[name], module) for name, module in modules.items()}}
