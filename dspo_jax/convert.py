"""safetensors <-> parameter tree, one table driving both directions; CLI: models in, trained runs out.

    python -m dspo_jax.convert import --model=DIR_OR_HUB_ID --out=model
    python -m dspo_jax.convert import --model=fine_tune.safetensors --base=DIR --out=model
    python -m dspo_jax.convert export --run=runs/emoji --out=exported
    python -m dspo_jax.convert export --run=runs/emoji --out=exported.safetensors
    python -m dspo_jax.convert export --run=runs/lora --out=adapters.safetensors --lora=diffusers

A parameter's path is its state-dict name except for the last part (`kernel`, `scale` and `embedding` are
torch's `weight`), and kernels are transposed. Nothing else differs, so nothing else is written down here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import traverse_util

from dspo_jax import cli, json_files, model_dir
from dspo_jax.component_files import open_stored, stored_name, weights_file
from dspo_jax.files import write_json
from dspo_jax.locks import reserve
from dspo_jax.model_dir import read_json
from dspo_jax.models import Model, Params, build_model, lora
from dspo_jax.tensors import Tensor, write_tensors

# How torch stores each kind of leaf: (last part of its path, axes) -> (torch's name, order of the axes).
_LAYOUT: dict[tuple[str, int], tuple[str, tuple[int, ...]]] = {
    ("kernel", 4): ("weight", (3, 2, 0, 1)),  # convolution: HWIO -> OIHW
    ("kernel", 2): ("weight", (1, 0)),  # linear: IO -> OI
    ("scale", 1): ("weight", (0,)),  # norm
    ("embedding", 2): ("weight", (0, 1)),
    ("bias", 1): ("bias", (0,)),
    # Of BLIP's image encoder.
    ("cls_token", 3): ("cls_token", (0, 1, 2)),
    ("pos_embed", 3): ("pos_embed", (0, 1, 2)),
    # Of CLIP, which keeps them outside any layer.
    ("class_embedding", 1): ("class_embedding", (0,)),
    ("logit_scale", 0): ("logit_scale", ()),
}

# Components that parameters are read of; others (a safety checker) are carried along.
_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
ADAPTER_FORMATS = ("diffusers", "kohya")
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": jax.numpy.dtype("bfloat16"),
}


def flatten(params: Params) -> dict[str, Any]:
    """A nested tree as {"a.b.c": leaf}."""
    return traverse_util.flatten_dict(params, sep=".")


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(leaves, sep=".")


def leaf_tensors(params: Params) -> dict[str, Tensor]:
    """The leaves of a tree in memory, by path."""

    def tensor(leaf: Any) -> Tensor:
        return Tensor(tuple(leaf.shape), np.dtype(leaf.dtype), lambda: np.asarray(leaf))

    return {path: tensor(leaf) for path, leaf in flatten(params).items()}


def torch_layout(path: str, ndim: int) -> tuple[str, tuple[int, ...]]:
    """Torch's name of the leaf at `path`, which has `ndim` axes, and their order there."""
    parent, dot, leaf = path.rpartition(".")
    name, axes = _LAYOUT[leaf, ndim]
    return f"{parent}{dot}{name}", axes


def torch_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Name and shape of each of a model's tensors, as torch has them."""
    shapes = {}
    for path, leaf in flatten(model.abstract_params()).items():
        name, axes = torch_layout(path, len(leaf.shape))
        shapes[name] = tuple(leaf.shape[axis] for axis in axes)
    return shapes


def to_torch(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves of a parameter tree, by path, as torch's tensors."""

    def transposed(leaf: Tensor, axes: tuple[int, ...]) -> Tensor:
        shape = tuple(leaf.shape[axis] for axis in axes)
        return Tensor(shape, leaf.dtype, lambda: leaf.read().transpose(axes))

    layouts = {path: torch_layout(path, len(leaf.shape)) for path, leaf in leaves.items()}
    return {name: transposed(leaves[path], axes) for path, (name, axes) in layouts.items()}


def cast(name: str, tensor: Tensor, dtype: np.dtype[Any], file: Path) -> Tensor:
    """`tensor` in another dtype, refused when it is read and does not fit; `file` is for that message."""

    def read() -> np.ndarray:
        value = tensor.read()
        with np.errstate(over="ignore"):
            stored = value.astype(dtype, copy=False)
        if not np.isfinite(stored.astype(np.float32, copy=False)).all():
            overflows = np.isfinite(value.astype(np.float32, copy=False)).all()
            fault = f"overflows {dtype}; use float32 or bfloat16" if overflows else "is not finite"
            raise ValueError(f"{file}: tensor {name} {fault}")
        return stored

    return Tensor(tensor.shape, dtype, read)


def read_config(folder: Path) -> dict[str, Any]:
    """Parse `folder/config.json`."""
    return read_json(folder / "config.json")


def read_base(run: Path) -> str:
    """The model that a training run started from, as its config.json names it.

    Raises:
      FileNotFoundError, ValueError: the file is missing, damaged or names none.
    """
    path, fix = run / "config.json", "put back the config that the run was started with"
    return json_files.member(read_json(path, fix), "model", str, path, fix)


def read_model(folder: Path, default_class: str = "none named") -> Model:
    """The architecture described by `folder/config.json`, of `default_class` where that names no class."""
    config = read_config(folder)
    named = config.get("_class_name") or config.get("architectures") or default_class
    class_name = named[0] if isinstance(named, list) else named
    try:
        return build_model(class_name, config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def open_component(folder: Path, model: Model) -> dict[str, Tensor]:
    """A component's tensors under torch's names, whole or in shards, checked but not read.

    Args:
      folder: holds the safetensors file or files.
      model: the architecture; its paths and shapes decide what they must hold.

    Raises:
      FileNotFoundError: no safetensors file (pickled `.bin` files are never read).
      ValueError: a truncated file, a missing or extra tensor, a shape that does not fit.
    """
    path = weights_file(folder, model.class_name)
    stored = open_stored(folder, model.class_name)
    opened = {}
    for name, shape in torch_shapes(model).items():
        tensor = stored.pop(stored_name(name, stored), None)
        if tensor is None:
            raise ValueError(f"{path}: tensor {name} is missing; is config.json of the same model?")
        if tensor.shape != shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {tensor.shape}, config.json asks for {shape}; "
                "is it of the same model?"
            )
        opened[name] = tensor
    # A constant in old CLIP files.
    extra = sorted(name for name in stored if not name.endswith("position_ids"))
    if extra:
        raise ValueError(
            f"{path}: {len(extra)} tensor(s) that config.json does not ask for, first {extra[0]}; "
            "is it of the same model?"
        )
    return opened


def fold_adapters(stored: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A component under torch's names, with adapters added to their layers' kernels, which become float32.

    Args:
      stored: the component's tensors under torch's names.
      leaves: the adapters' leaves by path.

    Raises:
      ValueError: an adapter of a layer that the component has not, or has in another shape.
    """

    def add(kernel: Tensor, lora_A: Tensor, lora_B: Tensor, axes: tuple[int, ...]) -> Tensor:
        def read() -> np.ndarray:
            added = lora.product(lora_A.read(), lora_B.read()).transpose(axes)
            return kernel.read().astype(np.float32) + added

        return Tensor(kernel.shape, np.dtype("float32"), read)

    folded = dict(stored)
    for layer in lora.find_ranks(dict(leaves)):
        lora_A, lora_B = (leaves[f"{layer}.{matrix}.kernel"] for matrix in ("lora_A", "lora_B"))
        name, axes = torch_layout(f"{layer}.kernel", len(lora_A.shape))
        shape = (*lora_A.shape[:-1], lora_B.shape[-1])
        want = tuple(shape[axis] for axis in axes)
        have = stored[name].shape if name in stored else None
        if have != want:
            raise ValueError(f"an adapter for {name} {want}, which is {have or 'absent'}")
        folded[name] = add(stored[name], lora_A, lora_B, axes)
    return folded


def read_params(
    folder: Path, model: Model, dtype: str | None = None, adapters: Params | None = None
) -> Params:
    """Read a component's weights as a tree of NumPy arrays.

    Args:
      folder: holds the safetensors file or files.
      model: the architecture; its paths and shapes decide what they must hold.
      dtype: "float32", "float16" or "bfloat16"; None keeps the stored one.
      adapters: a tree of adapters to add.

    Raises:
      FileNotFoundError, ValueError: as `open_component`; or the adapters are of another model.
    """
    stored = open_component(folder, model)
    try:
        opened = fold_adapters(stored, leaf_tensors(adapters)) if adapters else stored
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; is it the model that the run started from?") from error
    leaves = {}
    for path, abstract in flatten(model.abstract_params()).items():
        name, axes = torch_layout(path, len(abstract.shape))
        value = opened[name].read().transpose(np.argsort(axes))
        leaves[path] = value.astype(DTYPES[dtype] if dtype else stored[name].dtype, copy=False)
    return unflatten(leaves)


def write_params(
    folder: Path, model: Model, params: Params, dtype: str | None = None, like: Path | None = None
) -> None:
    """Write a component: config.json and its safetensors file, in shards where it is large.

    Args:
      folder: created if need be.
      model: the architecture.
      params: nested tree as `Model.abstract_params`.
      dtype: stored dtype; None keeps each leaf's own.
      like: a component folder whose tensor names are to be kept (those of transformers 5 lack a prefix).

    Raises:
      OSError: the disk is full.
      ValueError: a value that is not finite or overflows `dtype`.
    """

    file = weights_file(folder, model.class_name)
    stored = open_stored(like, model.class_name) if like else {}
    tensors = {
        stored_name(name, stored): cast(name, tensor, DTYPES[dtype] if dtype else tensor.dtype, file)
        for name, tensor in to_torch(leaf_tensors(params)).items()
    }
    for tensor in tensors.values():
        tensor.read()  # refuse before anything is written: it is all in memory anyway
    write_json(folder / "config.json", dict(model.config), sort_keys=True)
    write_tensors(file, tensors)


def read_models(folder: Path) -> dict[str, Model]:
    """The architectures of a diffusers folder's networks, by component.

    Raises:
      ValueError: a config.json that is not supported, or of another class than model_index.json says.
    """
    components = model_dir.list_components(read_json(folder / "model_index.json"))
    networks = {name: kind for name, kind in components.items() if name in _NETWORKS}
    models = {name: read_model(folder / name, kind) for name, kind in networks.items()}
    for name, model in models.items():
        if model.class_name != components[name]:
            raise ValueError(
                f"{folder / name / 'config.json'}: is of class {model.class_name}, but model_index.json "
                f"says {components[name]}; correct the one that is wrong, or fetch the model again"
            )
    return models


_COMMANDS = {"import": ("model", "base", "out"), "export": ("run", "step", "dtype", "base", "lora", "out")}


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    settings = flags.FLAGS
    command = argv[1]
    for name in ("model", "run", "step", "dtype", "base", "lora"):
        if name not in _COMMANDS[command] and settings[name].present:
            raise ValueError(f"--{name}={settings[name].value}: not an option of {command}")
    needed = _COMMANDS[command][0]
    if settings[needed].value is None:
        raise ValueError(f"--{needed} is missing: name what to {command}")
    out = Path(settings.out)
    with reserve(out):
        # Imported here, as both import this file.
        if command == "import":
            from dspo_jax.import_model import import_model

            import_model(settings.model, out, base=settings.base)
            print(f"{out}: diffusers folder of {settings.model}")
        else:
            from dspo_jax.export_model import export

            step = export(
                Path(settings.run),
                out,
                step=settings.step,
                dtype=settings.dtype,
                base=settings.base,
                adapters=settings.lora,
            )
            kind = "single-file checkpoint" if out.suffix == ".safetensors" else "diffusers folder"
            kind = f"adapters for {settings.lora}" if settings.lora else kind
            print(f"{out}: {kind} of {settings.run} at step {step}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "import: a diffusers folder, a hub id, or a .safetensors checkpoint.")
    flags.DEFINE_string("run", None, "export: workdir of the training run.")
    flags.DEFINE_string("out", None, "What to write; must not exist.", required=True)
    flags.DEFINE_string(
        "base",
        None,
        "import of a single file: a diffusers folder or hub id of the same architecture. "
        "export: the model that the run started from; default: where the run found it.",
    )
    flags.DEFINE_integer("step", None, "export: which checkpoint; default: the newest.")
    flags.DEFINE_enum(
        "dtype", None, list(DTYPES), "export: of the trained components; default: as in the base model."
    )
    flags.DEFINE_enum(
        "lora",
        None,
        ADAPTER_FORMATS,
        "export of a run with LoRA: only the adapters, as diffusers or as kohya names them; "
        "default: the whole model with the adapters added.",
    )
    cli.run(main, commands=tuple(_COMMANDS))
