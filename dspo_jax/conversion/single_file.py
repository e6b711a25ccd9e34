"""Single-file checkpoints to components and back, both ways by the names of weights/original_layout.py.

A single `.safetensors` file with `model.diffusion_model.*`, `first_stage_model.*` and `cond_stage_model.*`
(SDXL: `conditioner.embedders.*`, Stable Diffusion 3: `text_encoders.*`) is what Stable Diffusion was
published as and most fine-tunes are shared as.
"""

import re
from collections.abc import Callable, Collection, Container, Mapping

import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.weights.places import Layout, Place, swap_halves
from dspo_jax.weights.tensors import Tensor

# Tensors of such files besides the weights: running averages, the noise schedule, the discriminator that the
# VAE was trained with, and what CLIP's image side needs of the text side.
_BY_THE_WAY = re.compile(
    r"model_ema\..*|.*alphas_cumprod.*|betas|posterior_.*|logvar|lvlb_weights|scale_factor|denoiser\.sigmas"
    r"|first_stage_model\.loss\..*"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(.*\.)?"
    r"(position_ids|logit_scale|attn_mask|text_projection(\.weight)?)"
    r"|text_encoders\.\w+\.(logit_scale|spiece_model|transformer\.(.*\.)?position_ids)"
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
_BARE_3 = re.compile(r"joint_blocks\.\d+\.")
_SCALED = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|weight_scale)")  # of numbers in 8 bits
_BARE_TEXT = re.compile(r"(embeddings|encoder|final_layer_norm)\.")


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


def is_flow(scheduler: Mapping[str, object]) -> bool:
    """Tells whether a scheduler_config.json is of rectified flow, which has one kind of prediction."""
    named = str(scheduler.get("_class_name", ""))
    return named.startswith("FlowMatch") or bool(scheduler.get("use_flow_sigmas"))


def write_process(scheduler: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata by which a single file says what `read_process` reads.

    Of rectified flow it says nothing: programs know it by the names of the weights.
    """
    if is_flow(scheduler):
        return {}, {}
    velocity = scheduler.get("prediction_type") == "v_prediction"
    markers = {_V_PREDICTION: velocity, _ZERO_SNR: bool(scheduler.get("rescale_betas_zero_snr"))}
    empty = Tensor((0,), np.dtype("float32"), lambda: np.zeros(0, np.float32))
    metadata = dict.fromkeys(_SPECIFICATIONS, "v" if velocity else "epsilon")
    return {name: empty for name, present in markers.items() if present}, metadata


def _usual_names(single: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> Mapping[str, Tensor]:
    """Renames the tensors of a single file to the names of the published files.

    Web user interfaces saved OpenAI's CLIP without "text_model."; SD-Turbo has Stable Diffusion 2's tower
    where XL has its first; and a file of Stable Diffusion 3's transformer alone may have no prefix.
    """
    if "transformer" in layouts:
        return _usual_names_of_3(single, layouts)
    root = layouts["text_encoder"].root
    turbo = "conditioner.embedders.0."
    renamed = {}
    for name in single:
        if root.endswith(".transformer.") and name.startswith(root) and _BARE_TEXT.match(name, len(root)):
            renamed[name] = f"{root}text_model.{name.removeprefix(root)}"
        elif root == "cond_stage_model.model." and name.startswith(f"{turbo}model."):
            renamed[name] = f"cond_stage_model.{name.removeprefix(turbo)}"
    return {renamed.get(name, name): tensor for name, tensor in single.items()}


def _usual_names_of_3(single: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> Mapping[str, Tensor]:
    root = layouts["transformer"].root
    if not any(name.startswith(root) for name in single) and any(map(_BARE_3.match, single)):
        single = {f"{root}{name}": tensor for name, tensor in single.items()}
    if "text_encoder_3" not in layouts:
        return single
    shared, copy = (
        f"{layouts['text_encoder_3'].root}{name}.weight" for name in ("shared", "encoder.embed_tokens")
    )
    if copy in single and shared not in single:
        return {shared if name == copy else name: tensor for name, tensor in single.items()}
    return single


def _find_family(names: Collection[str]) -> str | None:
    for prefix, family in (
        ("conditioner.embedders.1.", "XL"),
        ("cond_stage_model.model.", "2"),
        ("cond_stage_model.transformer.", "1"),
        ("model.diffusion_model.joint_blocks.", "3"),
    ):
        if any(name.startswith(prefix) for name in names):
            return family
    return None


def _name_family(layouts: Mapping[str, Layout]) -> str:
    if "transformer" in layouts:
        return "3"
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
    scaled = next(filter(_SCALED.fullmatch, single), None)
    if scaled is not None:
        raise UserError(f"has the tensor {scaled}, of weights in 8 bits; take a file in float16 or bfloat16")
    single = _usual_names(single, layouts)
    found, wanted = _find_family(single), _name_family(layouts)
    if found not in (None, wanted):
        raise UserError(f"is Stable Diffusion {found}, but --base is {wanted}; name a base of the same kind")
    root = layouts["transformer" if "transformer" in layouts else "unet"].root
    if not any(name.startswith(root) for name in single):
        raise UserError(
            f"holds no tensor {root}*, so it is not a checkpoint in the original layout; "
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
            if place.kind == "identity":
                dtype = next(tensor.dtype for key, tensor in single.items() if key.startswith(layout.root))
                components[component][name] = Tensor(shape, dtype, _identity(shape, dtype))
                continue
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
        if place.kind == "swapped":
            return swap_halves(value)
        if place.kind == "third":
            return value[place.part * shape[0] : (place.part + 1) * shape[0]]
        return value.reshape(shape)

    return read


def join(components: Mapping[str, Mapping[str, Tensor]], layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """Returns the inverse of `split`.

    Raises:
      UserError: a tensor that the file cannot hold, as another value than this one is meant.
    """
    single = {}
    stacked: dict[str, list[Tensor]] = {}  # the thirds, in order
    for component, tensors in components.items():
        for name, tensor in tensors.items():
            place = layouts[component].place(name)
            if place.kind == "identity":
                if not np.array_equal(tensor.read(), _identity(tensor.shape, tensor.dtype)()):
                    raise UserError(f"{component}.{name} is not the identity, which such a file always means")
            elif place.kind == "third":
                stacked.setdefault(place.name, [tensor] * 3)[place.part] = tensor
            else:
                shape = _stored_shapes(tensor.shape, place)[0]
                single[place.name] = Tensor(shape, tensor.dtype, _give(tensor, place, shape))
    for name, parts in stacked.items():
        shape = _stored_shapes(parts[0].shape, Place(name, "third"))[0]
        single[name] = Tensor(shape, parts[0].dtype, _stack(parts))
    return single


def _give(tensor: Tensor, place: Place, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        value = tensor.read()
        if place.kind == "transposed":
            return value.T
        return swap_halves(value) if place.kind == "swapped" else value.reshape(shape)

    return read


def _identity(shape: tuple[int, ...], dtype: np.dtype) -> Callable[[], np.ndarray]:
    return lambda: np.eye(*shape, dtype=dtype)


def _stack(parts: list[Tensor]) -> Callable[[], np.ndarray]:
    return lambda: np.concatenate([part.read() for part in parts])
