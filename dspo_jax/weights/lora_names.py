"""Names of layers in LoRA files: PEFT's and diffusers', and kohya's, in which "_" stands for every dot.

Sources: networks/lora.py and lora_sd3.py of kohya-ss/sd-scripts; the keys that ComfyUI reads (comfy/lora.py).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dspo_jax.models.lora import Scale
from dspo_jax.models.model import Model
from dspo_jax.weights.layout import flatten
from dspo_jax.weights.original_layout import unet_layout
from dspo_jax.weights.places import Layout, Place, swap_halves
from dspo_jax.weights.stable_diffusion_3_layout import transformer_layout
from dspo_jax.weights.tensors import Tensor

_LAYOUTS = {"unet": unet_layout, "transformer": transformer_layout}
# What kohya's names of a component begin with; those of others for Stable Diffusion 3 are OneTrainer's and
# SimpleTuner's.
_ROOTS = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_", "lora_transformer_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}


class Target(NamedTuple):
    """A layer that a name stands for, or of which it has a third or the halves in another order.

    Attributes:
      component, layer: which layer, as torch names it.
      place: of its weight among the rows of what the name stands for.
    """

    component: str
    layer: str
    place: Place

    def cut(self, rows: Tensor) -> Tensor:
        """Returns the part of the rows, an array [out, ...], that is the layer's."""
        if self.place.kind == "swapped":
            return Tensor(rows.shape, rows.dtype, lambda: swap_halves(rows.read()))
        if self.place.kind != "third" or not rows.shape or rows.shape[0] % 3:
            return rows  # where it has another shape than the layer, it is refused by that
        size = rows.shape[0] // 3
        first = self.place.part * size
        return Tensor((size, *rows.shape[1:]), rows.dtype, lambda: rows.read()[first : first + size])


def name_layers(models: Mapping[str, Model]) -> dict[str, list[Target]]:
    """Returns every name that files have for linear layers and convolutions -> what it stands for.

    Args:
      models: architectures by component: the denoiser and the text encoders.
    """
    found: dict[str, list[Target]] = {}
    encoders = [component for component in models if component.startswith("text_encoder")]
    for component, model in models.items():
        layout = None
        if component in _LAYOUTS:
            layout = _LAYOUTS[component](model.complete_config())
        for path in flatten(model.abstract_params()):
            if not path.endswith(".kernel"):
                continue
            layer = path.removesuffix(".kernel")
            target, _ = _find(component, layer, None)
            names = {layer: target, layer.removeprefix("text_model."): target}
            if layout is not None:
                target, there = _find(component, layer, layout)
                names[there] = target
            for name, target in names.items():
                spellings = [f"{component}.{name}"]
                spellings += [f"{root}{name.replace('.', '_')}" for root in _ROOTS.get(component, ())]
                if component not in encoders or len(encoders) == 1:
                    spellings.append(name)
                for spelling in spellings:
                    found.setdefault(spelling, []).append(target)
    return found


def name_as_kohya(
    components: Mapping[str, Mapping[str, Tensor]], scale: Scale, layouts: Mapping[str, Layout]
) -> dict[str, Tensor]:
    """Returns adapters under kohya's names; every layer also has its `alpha`.

    Layers that are one in the file (queries, keys and values of Stable Diffusion 3) have the same products
    there: each has rows of its own in the file's down, and a block of its own in the file's up.

    Args:
      components: component -> its adapters under torch's names, `LAYER.lora_A.weight` [r, in] and
        `LAYER.lora_B.weight` [out, r].
      scale: of what they add.
      layouts: component -> its names in the file, where they are not diffusers'.
    """
    several = "text_encoder_2" in components
    named: dict[str, Tensor] = {}
    for component, tensors in components.items():
        layout = layouts.get(component)
        root = "lora_te1_" if several and component == "text_encoder" else _ROOTS[component][0]
        joined: dict[str, list[_Adapter]] = {}
        for name, down in tensors.items():
            layer, _, matrix = name.rpartition(".lora_")
            if matrix == "A.weight":
                target, there = _find(component, layer, layout)
                adapter = _Adapter(target, down, tensors[f"{layer}.lora_B.weight"])
                joined.setdefault(there, []).append(adapter)
        for there, adapters in joined.items():
            key = f"{root}{there.replace('.', '_')}"
            named |= {f"{key}.{name}": tensor for name, tensor in _join(adapters, scale).items()}
    return named


class _Adapter(NamedTuple):
    target: Target
    down: Tensor
    up: Tensor


def _join(adapters: Sequence[_Adapter], scale: Scale) -> dict[str, Tensor]:
    """Returns down, up and alpha of a layer of the file from those of the layers that it is."""
    adapters = sorted(adapters, key=lambda each: each.target.place.part)
    target, down, up = adapters[0]
    factor = scale.of(down.shape[0])
    rank = sum(each.down.shape[0] for each in adapters)
    if target.place.kind == "swapped":
        up = target.cut(up)
    elif target.place.kind == "third":
        rows, dtype = up.shape[0], up.dtype

        def spread() -> np.ndarray:
            whole, column = np.zeros((3 * rows, rank), dtype), 0
            for each in adapters:
                row, r = each.target.place.part * rows, each.down.shape[0]
                # The file has one factor for all, and ranks may differ.
                block = each.up.read() * np.asarray(scale.of(r) / factor, dtype)
                whole[row : row + rows, column : column + r] = block
                column += r
            return whole

        up = Tensor((3 * rows, rank), dtype, spread)
        down = Tensor(
            (rank, *down.shape[1:]),
            down.dtype,
            lambda: np.concatenate([each.down.read() for each in adapters]),
        )
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": _scalar(factor * rank)}


def _find(component: str, layer: str, layout: Layout | None) -> tuple[Target, str]:
    """Returns a layer and the name in the file of what it is, or of what it is a part of."""
    if layout is None:
        return Target(component, layer, Place(layer)), layer
    place = layout.place(f"{layer}.weight")
    return Target(component, layer, place), place.name.removeprefix(layout.root).removesuffix(".weight")


def _scalar(value: float) -> Tensor:
    return Tensor((), np.dtype("float32"), lambda: np.asarray(value, np.float32))
