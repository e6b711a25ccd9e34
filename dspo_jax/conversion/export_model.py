"""Exports a training run: as a diffusers folder, a single file, or adapters alone.

Adapter files have PEFT's names, as diffusers writes them, or kohya's, as most are shared. Source: diffusers'
`save_lora_weights`.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from dspo_jax.conversion import single_file
from dspo_jax.conversion.model_card import GRID, find_grid, make_card
from dspo_jax.conversion.model_spec import make_metadata
from dspo_jax.errors import UserError
from dspo_jax.files import appear, refuse_existing
from dspo_jax.hub_cache import hide_folders, is_hub_id, split_hub_id
from dspo_jax.models import lora
from dspo_jax.models.model import Model
from dspo_jax.pipelines.families import NETWORKS
from dspo_jax.weights import model_dir
from dspo_jax.weights.component_files import weights_file
from dspo_jax.weights.components import fold_adapters, open_component, read_models
from dspo_jax.weights.layout import DTYPES, cast, flatten, to_torch
from dspo_jax.weights.lora_files import METADATA_KEY
from dspo_jax.weights.lora_names import name_as_kohya
from dspo_jax.weights.model_dir import find_model, read_json
from dspo_jax.weights.original_layout import make_layouts
from dspo_jax.weights.saved_params import SavedParams, read_base, read_run_config, read_scale
from dspo_jax.weights.stable_diffusion_3_layout import transformer_layout
from dspo_jax.weights.tensors import Tensor, write_tensors


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    base: str | Path | None = None,
    adapters: str | None = None,
) -> int:
    """Writes a training run as a complete model: its base, with the trained components replaced.

    Adapters are added to their layers' kernels. Everything else is the base's, bit for bit. Tensors are read
    and written one at a time; the result appears under its name when it is complete.

    Args:
      run: the workdir.
      out: a diffusers folder or, if it ends in `.safetensors`, a single file in the original layout, with its
        model card beside it as NAME.md; must not exist, nor the card.
      step: which checkpoint; None means the newest.
      dtype: of the trained components; None means as the base has them.
      base: the model that the run started from (folder or hub id), if it is no longer where the run found it.
      adapters: of a run with LoRA: write no model but its adapters, "diffusers" or "kohya", into one file,
        which the base need not be here for, but for kohya's names of a transformer.

    Returns:
      The exported step.

    Raises:
      FileNotFoundError: no such run, checkpoint or base.
      OSError: the disk is too small.
      UserError: `out` exists, the base is another model, a weight is not finite or does not fit `dtype`, or
        there are no adapters.
    """
    single = out.suffix == ".safetensors"
    refuse_existing(out)
    if single:
        refuse_existing(_card_of(out))
    if adapters and not single:
        raise UserError(f"--out={out}: adapters are one file; give it a name that ends in .safetensors")
    with SavedParams(run / "checkpoints", step) as saved:
        components = sorted({path.partition(".")[0] for path in saved.arrays})
        name = str(base or read_base(run))
        title = f"{run.resolve().name} step {saved.step}"
        scale = read_scale(read_run_config(run))
        if adapters:
            folder = _cached(name)
            card = make_card(run, name, folder, saved.step, file=out.name, adapters=adapters)
            metadata: dict[str, str] = {}
            models = {}
            if (folder / "model_index.json").is_file():
                ranks = {leaf.shape[-1] for path, leaf in saved.arrays.items() if ".lora_A." in path}
                alphas = {rank: scale.of(rank) * rank for rank in ranks}  # kohya's
                models = read_models(folder, NETWORKS)
                metadata = make_metadata(models, folder, title, _describe(name), alphas)
            values = _adapter_tensors(saved, components, scale, adapters, models, dtype, out)
            if adapters == "diffusers":
                metadata |= _make_configs(saved, scale)
            _write_file(out, values, card, metadata)
            return saved.step
        folder = find_model(name)
        models = read_models(folder, NETWORKS)
        trained = {
            component: _trained_tensors(saved, component, scale, folder / component, models, out, dtype)
            for component in components
        }
        if single:
            card = make_card(run, name, folder, saved.step, file=out.name)
            metadata = make_metadata(models, folder, title, _describe(name))
            _write_single(out, folder, trained, models, card, metadata)
        else:
            grid = find_grid(run, saved.step)
            card = make_card(run, name, folder, saved.step)
            model_dir.write_folder(out, folder, trained, card, {GRID: grid} if grid else {})
    return saved.step


def _card_of(file: Path) -> Path:
    """Returns where the model card of an exported file is written."""
    return file.with_suffix(".md")


def _describe(base: str) -> str:
    """Returns a sentence for the header of a file."""
    return f"Trained with dspo_jax from {hide_folders(base)}"


def _cached(name: str) -> Path:
    """Returns a model's folder, of a hub id as much of it as is in the cache: nothing is downloaded."""
    if not is_hub_id(name):
        return Path(name)
    import huggingface_hub  # slow to import, and needed here only

    repository, revision = split_hub_id(name)
    for file in ("model_index.json", "README.md"):
        found = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return Path(name)


def _trained_tensors(
    saved: SavedParams,
    component: str,
    scale: lora.Scale,
    folder: Path,
    models: Mapping[str, Model],
    out: Path,
    dtype: str | None,
) -> dict[str, Tensor]:
    """Returns a component of a checkpoint under torch's names, in `dtype` or as `folder` stores it."""
    fix = "name the model that the run started from with --base"
    if component not in models:
        raise UserError(f"{saved.path}: holds {component}, which is absent in {folder.parent}; {fix}")
    leaves = _saved_leaves(saved, component)
    adapted = bool(lora.find_ranks(dict(leaves)))
    if not adapted:
        wanted = flatten(models[component].abstract_params())
        for path in sorted(leaves.keys() | wanted.keys()):
            have = leaves[path].shape if path in leaves else None
            want = tuple(wanted[path].shape) if path in wanted else None
            if have != want:
                raise UserError(
                    f"{saved.path}: {component}.{path} is {have or 'absent'} there and {want or 'absent'} in "
                    f"{folder}; {fix}"
                )
    stored = open_component(folder, models[component])
    try:
        tensors = fold_adapters(stored, leaves, scale) if adapted else to_torch(leaves)
    except UserError as error:
        raise UserError(f"{saved.path}: {error} in {folder}; {fix}") from error
    file = weights_file(out / component, models[component].class_name)
    named = {name: cast(name, tensor, _dtype(dtype, stored[name]), file) for name, tensor in tensors.items()}
    return named | {name: stored[name] for name in models[component].buffer_shapes()}


def _saved_leaves(saved: SavedParams, component: str) -> dict[str, Tensor]:
    """Returns a component's leaves in a checkpoint, by path."""

    def leaf_tensor(path: str, array: jax.ShapeDtypeStruct) -> Tensor:
        return Tensor(tuple(array.shape), np.dtype(array.dtype), lambda: saved.read(path))

    return {
        path.partition(".")[2]: leaf_tensor(path, array)
        for path, array in saved.arrays.items()
        if path.startswith(f"{component}.")
    }


def _dtype(asked: str | None, tensor: Tensor) -> np.dtype:
    return DTYPES[asked] if asked else tensor.dtype


def _write_single(
    out: Path,
    base: Path,
    replaced: Mapping[str, Mapping[str, Tensor]],
    models: Mapping[str, Model],
    card: str,
    metadata: Mapping[str, str],
) -> None:
    """Writes a single-file checkpoint in the original layout: `base` with some components replaced.

    Raises:
      OSError: the disk is too small.
      UserError: a component that such a file cannot hold.
    """
    components = {name: open_component(base / name, model) for name, model in models.items()} | dict(replaced)
    try:
        single = single_file.join(
            components,
            make_layouts({name: model.complete_config() for name, model in models.items()}),
        )
    except UserError as error:
        raise UserError(f"--out={out}: {error}; export a folder instead") from error
    # Without them web user interfaces and ComfyUI take the model for one of epsilon.
    markers, _ = single_file.write_process(read_json(base / "scheduler" / "scheduler_config.json"))
    _write_file(out, single | markers, card, metadata)


def _write_file(out: Path, tensors: Mapping[str, Tensor], card: str, metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file, however large, and its model card; both appear when they are complete."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    model_dir.require_space(out, size)
    with appear(_card_of(out)) as partial_card, appear(out) as partial:
        partial_card.write_text(card, encoding="utf-8")
        write_tensors(partial, tensors, max_shard_bytes=size, metadata=metadata)


def _adapter_tensors(
    saved: SavedParams,
    components: Sequence[str],
    scale: lora.Scale,
    style: str,
    models: Mapping[str, Model],
    dtype: str | None,
    file: Path,
) -> dict[str, Tensor]:
    """Returns the adapters of a checkpoint as `style` names them; `file` is for messages.

    `models` are the base's networks by component; empty where the base is not here.
    """
    leaves = {component: _saved_leaves(saved, component) for component in components}
    if not all(lora.find_ranks(dict(each)) for each in leaves.values()):
        raise UserError(f"{saved.path}: holds no adapters, as the run was without LoRA; leave out --lora")
    if style == "kohya" and any(path.endswith("lora_magnitude_vector") for path in saved.arrays):
        raise UserError(
            f"{saved.path}: holds DoRA, for which kohya's names have no place that diffusers reads; take "
            "--lora=diffusers, or leave out --lora for the whole model"
        )
    tensors = {component: to_torch(each) for component, each in leaves.items()}
    if style == "diffusers":
        named = _name_as_diffusers(tensors)
    else:
        layouts = {}
        if "transformer" in tensors:
            if not models:
                raise UserError(
                    f"--out={file}: kohya's names follow from the config of the model that the run started "
                    "from, which is not here; name it with --base"
                )
            layouts["transformer"] = transformer_layout(models["transformer"].complete_config())
        named = name_as_kohya(tensors, scale, layouts)
    return {name: cast(name, tensor, _dtype(dtype, tensor), file) for name, tensor in named.items()}


def _make_configs(saved: SavedParams, scale: lora.Scale) -> dict[str, str]:
    """Returns the entry of a header in which diffusers looks for PEFT's configs."""
    configs: dict[str, object] = {}
    dora = any(path.endswith("lora_magnitude_vector") for path in saved.arrays)
    shapes = traverse_util.unflatten_dict(saved.arrays, sep=".")
    for component, tree in shapes.items():
        # Without the prefix, which transformers 5 leaves out: PEFT compares the ends of names.
        ranks = {layer.removeprefix("text_model."): rank for layer, rank in lora.find_ranks(tree).items()}
        usual = statistics.mode(ranks.values())
        others = {layer: rank for layer, rank in ranks.items() if rank != usual}
        config = {
            **{"r": usual, "lora_alpha": scale.alpha_of(usual), "rank_pattern": others},
            "alpha_pattern": {layer: scale.alpha_of(rank) for layer, rank in others.items()},
            **{"target_modules": sorted(ranks), "bias": "none"},
            **{"use_dora": dora, "use_rslora": scale.rank_stabilised},
        }
        configs |= {f"{component}.{key}": value for key, value in config.items()}
    return {METADATA_KEY: json.dumps(configs, sort_keys=True)}


def _name_as_diffusers(components: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors of an adapter file as diffusers names them.

    Args:
      components: component -> its adapters' tensors under torch's names, `LAYER.lora_A.weight` [r, in],
        `LAYER.lora_B.weight` [out, r] and of DoRA `LAYER.lora_magnitude_vector` [out].
    """
    return {
        f"{component}.{_spell(name)}": _as_peft(name, tensor, tensors)
        for component, tensors in components.items()
        for name, tensor in tensors.items()
    }


def _spell(name: str) -> str:
    """Returns the name of an adapter's tensor with which diffusers finds it in text encoders, too.

    PEFT's own `lora_magnitude_vector` is passed over by transformers 5, which adds the adapter's name alone.
    """
    return f"{name}.weight" if name.endswith("lora_magnitude_vector") else name


def _as_peft(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns a tensor as PEFT stores it: DoRA's magnitudes of a convolution are [1, out, 1, 1]."""
    layer, _, part = name.rpartition(".")
    if part != "lora_magnitude_vector":
        return tensor
    window = tensors[f"{layer}.lora_A.weight"].shape[2:]
    shape = (1, *tensor.shape, *(1 for _ in window)) if window else tensor.shape
    return Tensor(shape, tensor.dtype, lambda: tensor.read().reshape(shape))


ADAPTER_FORMATS = ("diffusers", "kohya")
