"""The networks of a diffusers folder: architectures and weights, read and written."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.files import write_json
from dspo_jax.models import lora
from dspo_jax.models.config import NetworkConfig
from dspo_jax.models.model import Model, Params, build_model
from dspo_jax.weights import lora_files, model_dir
from dspo_jax.weights.component_files import open_stored, stored_name, weights_file
from dspo_jax.weights.layout import (
    DTYPES,
    cast,
    flatten,
    leaf_tensors,
    to_torch,
    torch_layout,
    torch_shapes,
    unflatten,
)
from dspo_jax.weights.lora_files import LoRA
from dspo_jax.weights.model_dir import read_json
from dspo_jax.weights.tensors import Tensor, write_tensors


def read_config(folder: Path) -> NetworkConfig:
    """Parses `folder/config.json`."""
    return read_json(folder / "config.json")


def read_model(folder: Path, default_class: str = "none named") -> Model:
    """Builds the architecture of `folder/config.json`, of `default_class` where no class is named."""
    config = read_config(folder)
    named = config.get("_class_name") or config.get("architectures") or default_class
    class_name = named[0] if isinstance(named, list) else named
    try:
        return build_model(class_name, config)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error


def open_component(folder: Path, model: Model) -> dict[str, Tensor]:
    """Returns a component's tensors under torch's names, whole or in shards, checked but not read.

    Args:
      folder: holds the safetensors file or files.
      model: the architecture; its paths and shapes decide what they must hold.

    Raises:
      FileNotFoundError: no safetensors file (pickled `.bin` files are never read).
      UserError: a truncated file, a missing or extra tensor, a shape that does not fit.
    """
    path = weights_file(folder, model.class_name)
    stored = open_stored(folder, model.class_name)
    opened = {}
    for name, shape in torch_shapes(model).items():
        tensor = stored.pop(stored_name(name, stored), None)
        if tensor is None:
            raise UserError(f"{path}: tensor {name} is missing; is config.json of the same model?")
        if tensor.shape != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {tensor.shape}, config.json asks for {shape}; "
                "is it of the same model?"
            )
        opened[name] = tensor
    # A constant in old CLIP files, and a copy in those of T5.
    copies = ("position_ids", "encoder.embed_tokens.weight")
    extra = sorted(name for name in stored if not name.endswith(copies))
    if extra:
        raise UserError(
            f"{path}: {len(extra)} tensor(s) that config.json does not ask for, first {extra[0]}; "
            "is it of the same model?"
        )
    return opened


def fold_adapters(
    stored: Mapping[str, Tensor], leaves: Mapping[str, Tensor], scale: lora.Scale
) -> dict[str, Tensor]:
    """Adds adapters to their layers' kernels, which become float32, under torch's names.

    Args:
      stored: the component's tensors under torch's names.
      leaves: the adapters' leaves by path.
      scale: of what they add.

    Raises:
      UserError: an adapter of a layer that the component has not, or has in another shape.
    """

    def add(kernel: Tensor, layer: str, axes: tuple[int, ...]) -> Tensor:
        lora_A, lora_B = (leaves[f"{layer}.{matrix}.kernel"] for matrix in ("lora_A", "lora_B"))
        magnitude = leaves.get(f"{layer}.lora_magnitude_vector")
        factor = np.float32(scale.of(lora_A.shape[-1]))

        def read() -> np.ndarray:
            added = lora.product(lora_A.read(), lora_B.read()).transpose(axes)
            lengths = None if magnitude is None else magnitude.read()
            return lora.fold(kernel.read().astype(np.float32), factor * added, lengths)

        return Tensor(kernel.shape, np.dtype("float32"), read)

    folded = dict(stored)
    for layer in lora.find_ranks(dict(leaves)):
        lora_A, lora_B = (leaves[f"{layer}.{matrix}.kernel"] for matrix in ("lora_A", "lora_B"))
        name, axes = torch_layout(f"{layer}.kernel", len(lora_A.shape))
        shape = (*lora_A.shape[:-1], lora_B.shape[-1])
        want = tuple(shape[axis] for axis in axes)
        have = stored[name].shape if name in stored else None
        if have != want:
            raise UserError(f"an adapter for {name} {want}, which is {have or 'absent'}")
        folded[name] = add(stored[name], layer, axes)
    return folded


def read_params(
    folder: Path,
    model: Model,
    dtype: str | None = None,
    trained: Params | None = None,
    loras: Sequence[LoRA] = (),
) -> Params:
    """Reads a component's weights as a tree of NumPy arrays.

    Args:
      folder: holds the safetensors file or files; its name is the component's.
      model: the architecture; its paths and shapes decide what they must hold.
      dtype: "float32", "float16" or "bfloat16"; None keeps the stored one.
      trained: what a run trained: a tree of adapters to add, `lora.scaled`, or the whole component in place
        of the files.
      loras: files that are opened for the model, to add.

    Raises:
      FileNotFoundError, UserError: as `open_component`; or the adapters are of another model.
    """
    whole = trained and not lora.find_ranks(trained)
    stored = to_torch(leaf_tensors(trained)) if trained and whole else open_component(folder, model)
    opened = stored
    if trained and not whole:
        try:
            opened = fold_adapters(stored, leaf_tensors(trained), lora.Scale())
        except UserError as error:
            raise UserError(f"{folder}: {error}; is it the model that the run started from?") from error
    for each in loras:
        opened = lora_files.fold(opened, each, folder.name)
    leaves = {}
    for path, abstract in flatten(model.abstract_params()).items():
        name, axes = torch_layout(path, len(abstract.shape))
        value = opened[name].read().transpose(np.argsort(axes))
        leaves[path] = value.astype(DTYPES[dtype] if dtype else stored[name].dtype, copy=False)
    return unflatten(leaves)


def read_buffers(folder: Path, model: Model) -> dict[str, np.ndarray]:
    """Reads what a component's files hold beside parameters, by name: `Model.buffer_shapes`, as stored.

    Raises:
      FileNotFoundError, UserError: as `open_component`.
    """
    names = model.buffer_shapes()
    opened = open_component(folder, model) if names else {}
    return {name: opened[name].read() for name in names}


def write_params(
    folder: Path,
    model: Model,
    params: Params,
    dtype: str | None = None,
    like: Path | None = None,
    buffers: Mapping[str, np.ndarray] = {},
) -> None:
    """Writes a component: config.json and its safetensors file, in shards where it is large.

    Args:
      folder: created if need be.
      model: the architecture.
      params: nested tree as `Model.abstract_params`.
      dtype: stored dtype; None keeps each leaf's own.
      like: a component folder whose tensor names are to be kept (those of transformers 5 lack a prefix).
      buffers: what `model.buffer_shapes` names, stored as it is whatever `dtype` says.

    Raises:
      OSError: the disk is full.
      UserError: a value that is not finite or overflows `dtype`.
      ValueError: `buffers` are not those of the model.
    """
    if buffers.keys() != model.buffer_shapes().keys():
        raise ValueError(f"{folder}: buffers {sorted(buffers)}, not {sorted(model.buffer_shapes())}")
    file = weights_file(folder, model.class_name)
    stored = open_stored(like, model.class_name) if like else {}
    tensors = {
        stored_name(name, stored): cast(name, tensor, DTYPES[dtype] if dtype else tensor.dtype, file)
        for name, tensor in to_torch(leaf_tensors(params)).items()
    } | leaf_tensors(dict(buffers))
    for tensor in tensors.values():
        tensor.read()  # refuse before anything is written: it is all in memory anyway
    write_json(folder / "config.json", dict(model.config), sort_keys=True)
    write_tensors(file, tensors)


def read_models(folder: Path, names: Iterable[str]) -> dict[str, Model]:
    """Returns the architectures of the components `names` of a diffusers folder, without absent ones.

    Raises:
      UserError: a config.json that is not supported, or of another class than model_index.json says.
    """
    components = model_dir.list_components(read_json(folder / "model_index.json"))
    models = {name: read_model(folder / name, components[name]) for name in names if name in components}
    for name, model in models.items():
        if model.class_name != components[name]:
            raise UserError(
                f"{folder / name / 'config.json'}: is of class {model.class_name}, but model_index.json "
                f"says {components[name]}; correct the one that is wrong, or fetch the model again"
            )
    return models
