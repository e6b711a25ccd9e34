"""Models as values: a `Model` is an architecture; its parameters are a nested dict passed to every call."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from dspo_jax.errors import UserError
from dspo_jax.json_files import shown
from dspo_jax.models import lora, quantized
from dspo_jax.models.blip import BLIPVQA, ImageReward, read_blip_vqa_config, read_image_reward_config
from dspo_jax.models.clip import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    read_clip_config,
    read_projecting_clip_config,
)
from dspo_jax.models.clip_vision import CLIPModel, read_clip_model_config
from dspo_jax.models.config import NetworkConfig
from dspo_jax.models.mmdit import (
    POSITIONS,
    SD3Transformer2D,
    make_positions,
    position_shape,
    read_mmdit_config,
)
from dspo_jax.models.t5 import T5Encoder, read_t5_config
from dspo_jax.models.unet import UNet2DCondition, read_unet_config
from dspo_jax.models.vae import AutoencoderKL, AutoencoderTiny, read_tiny_vae_config, read_vae_config

Params = lora.Params

COMPUTE_DTYPES = ("float32", "bfloat16")
"""Dtypes that networks compute in, by name."""

_Read = Callable[[NetworkConfig], NetworkConfig]
_Shape = Callable[[NetworkConfig], tuple[int, ...]]
_Make = Callable[[NetworkConfig], np.ndarray]

# The check of a class's config, and its builder. Two functions, because JAX appends a paragraph of its own to
# an error that is raised while it traces.
_CLASSES: dict[str, tuple[_Read, Callable[..., nnx.Module]]] = {
    "UNet2DConditionModel": (read_unet_config, UNet2DCondition),
    "SD3Transformer2DModel": (read_mmdit_config, SD3Transformer2D),
    "AutoencoderKL": (read_vae_config, AutoencoderKL),
    "AutoencoderTiny": (read_tiny_vae_config, AutoencoderTiny),
    "CLIPTextModel": (read_clip_config, CLIPTextModel),
    "CLIPTextModelWithProjection": (read_projecting_clip_config, CLIPTextModelWithProjection),
    "T5EncoderModel": (read_t5_config, T5Encoder),
    "ImageReward": (read_image_reward_config, ImageReward),
    "BLIP_VQA": (read_blip_vqa_config, BLIPVQA),
    "CLIPModel": (read_clip_model_config, CLIPModel),
}

# Class -> name of what its files hold beside parameters -> shape by the settings, and a fresh model's array.
_BUFFERS: dict[str, dict[str, tuple[_Shape, _Make]]] = {
    "SD3Transformer2DModel": {POSITIONS: (position_shape, make_positions)},
}
# Class -> key of the number of its blocks, or of the heads of each.
_BLOCKS = {"SD3Transformer2DModel": "num_layers"}
_HEADS = {"SD3Transformer2DModel": "num_attention_heads", "T5EncoderModel": "num_heads"}


class _SameKey(nnx.Rngs):
    """A stand-in for `nnx.Rngs` without a draw counter, where only shapes are asked for.

    Under a trace the counter's every update looks through the whole program so far, so that a model with
    thousands of parameters takes a minute to describe.
    """

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def _as_jax(leaf: object) -> object:
    """The modules take no NumPy arrays: theirs would index and add by NumPy's rules."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _string_keys(tree: PyTree) -> PyTree:
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _nnx_keys(tree: PyTree) -> PyTree:
    """Undoes `_string_keys`: NNX numbers the entries of its lists with integers."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _nnx_keys(v) for k, v in tree.items()}


@dataclasses.dataclass(frozen=True)
class Model:
    """An architecture built from a config.json.

    Attributes:
      class_name: class in diffusers or transformers.
      config: the parsed config.json.
      settings: the config with defaults and with lists for each level, as the modules read it.

    Parameters may hold adapters (models/lora.py) besides what `abstract_params` names, and quantized kernels
    (models/quantized.py) in their place.
    """

    class_name: str
    config: NetworkConfig = dataclasses.field(hash=False)
    settings: NetworkConfig = dataclasses.field(repr=False, hash=False, compare=False)
    # Adapters and quantized layers -> (graph, state of shapes), made when they are first met.
    _variants: dict[tuple[object, ...], tuple[nnx.GraphDef, nnx.State]] = dataclasses.field(
        default_factory=dict, repr=False, hash=False, compare=False
    )

    def complete_config(self) -> NetworkConfig:
        """Returns the config with the keys that it leaves out, and lists for each level, as in `settings`."""
        return {**self.config, **self.settings}

    def abstract_params(self) -> Params:
        """Returns the parameter tree as `jax.ShapeDtypeStruct` leaves; its paths are the state-dict names."""
        return _string_keys(nnx.to_pure_dict(self._variant({})[1]))

    @property
    def num_blocks(self) -> int:
        """Number of blocks of a transformer that denoises, any of which a pass may skip; 0 of others."""
        key = _BLOCKS.get(self.class_name)
        return 0 if key is None else int(self.settings[key])

    @property
    def split_heads(self) -> int | None:
        """Attention heads of each layer, between which alone a mesh may split a transformer or T5."""
        key = _HEADS.get(self.class_name)
        return None if key is None else int(self.settings[key])

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Lists name and shape of the arrays that a model's files hold beside its parameters.

        They are nothing to train, decay, average or adapt, and a caller passes to `apply` what it needs of
        them, e.g. `mmdit.crop_positions`.
        """
        made = _BUFFERS.get(self.class_name, {})
        return {name: shape(self.settings) for name, (shape, _) in made.items()}

    def make_buffers(self) -> dict[str, np.ndarray]:
        """Computes the arrays of `buffer_shapes` for fresh parameters."""
        made = _BUFFERS.get(self.class_name, {})
        return {name: make(self.settings) for name, (_, make) in made.items()}

    def init(self, key: jax.Array) -> Params:
        """Draws fresh float32 parameters. Pure, but do not jit it: as one program it compiles for minutes."""
        _, build = _CLASSES[self.class_name]
        module = build(self.settings, rngs=nnx.Rngs(key))
        return _string_keys(nnx.to_pure_dict(nnx.state(module, nnx.Param)))

    def apply(self, params: Params, *args: PyTree, method: str = "__call__", **kwargs: PyTree) -> PyTree:
        """Calls `method` of the module with `params`; computes in the dtype of its inputs and parameters."""
        params, args, kwargs = jax.tree.map(_as_jax, (params, args, kwargs))
        graph, shapes = self._variant(lora.find_adapters(params), quantized.find_quantized(params))
        state = jax.tree.map(lambda leaf: leaf, shapes)
        nnx.replace_by_pure_dict(state, _nnx_keys(params))
        return getattr(nnx.merge(graph, state), method)(*args, **kwargs)

    def _variant(
        self, adapters: Mapping[str, lora.Adapter], in_bytes: tuple[str, ...] = ()
    ) -> tuple[nnx.GraphDef, nnx.State]:
        def build() -> nnx.Module:
            module = _CLASSES[self.class_name][1](self.settings, rngs=_SameKey())
            lora.attach(module, adapters, rngs=_SameKey())
            quantized.attach(module, in_bytes)
            return module

        key = (*sorted(adapters.items()), *in_bytes)
        if key not in self._variants:
            self._variants[key] = nnx.split(nnx.eval_shape(build), nnx.Param)
        return self._variants[key]


def build_model(class_name: object, config: NetworkConfig) -> Model:
    """Returns the model that a config.json describes.

    Args:
      class_name: `_class_name` of a diffusers config, or `architectures[0]` of a transformers one.
      config: the parsed config.json.

    Raises:
      UserError: an unknown class or a config value that is not implemented, by name.
    """
    if not isinstance(class_name, str) or class_name not in _CLASSES:
        raise UserError(f"model class {shown(class_name)} is not supported; supported: {', '.join(_CLASSES)}")
    read, _ = _CLASSES[class_name]
    return Model(class_name, dict(config), read(config))
