"""Imports a model: a folder, a hub id or a single-file checkpoint becomes a checked diffusers folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from dspo_jax.conversion import single_file
from dspo_jax.errors import UserError
from dspo_jax.files import appear, refuse_existing
from dspo_jax.json_files import JsonObject
from dspo_jax.pipelines.loading import Adapted, load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.schedules.process import SchedulerConfig
from dspo_jax.schedules.variance_preserving import Schedule
from dspo_jax.weights import file_kinds, lora_files, model_dir, tensors
from dspo_jax.weights.component_files import find_weights, open_stored, weights_file
from dspo_jax.weights.components import open_component
from dspo_jax.weights.layout import cast, torch_shapes
from dspo_jax.weights.original_layout import make_layouts
from dspo_jax.weights.tensors import Tensor

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# Of the schedulers that are computed here, those of diffusers that read rescale_betas_zero_snr.
_KNOW_ZERO_SNR = (
    *("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
)


def import_model(
    model: str | Path,
    out: Path,
    *,
    base: str | Path | None = None,
    process: Mapping[str, str | bool] = {},
    loras: Sequence[str] = (),
) -> None:
    """Writes a complete diffusers folder, in safetensors only, that `encode`, `train` and `sample` take.

    Every tensor is checked by name and shape against its config.json before anything is written; `out`
    appears when it is complete. From a folder or the hub, files are copied byte for byte, without what is
    there more than once (other formats, other precisions).

    Args:
      model: a diffusers folder; a hub id; or a `.safetensors` file in the original layout of Stable
        Diffusion 1, 2, 3 or XL.
      out: must not exist.
      base: for a single file, which holds weights only: a diffusers folder or hub id of the same
        architecture. Its configs, tokenizers and schedule are taken, and the components that the file lacks.
        Where the file lacks none, the base needs no weights.
      process: for a single file that does not say it itself: `prediction_type` and `rescale_betas_zero_snr`
        of its scheduler_config.json, in the place of the base's.
      loras: LoRA files whose products are added to the weights, `FILE` or `FILE:WEIGHT` each; of a folder the
        components that they change are written anew then.

    Raises:
      FileNotFoundError: a file of the model is missing, or there as a pickle only.
      OSError: the hub cannot be reached, or the disk is too small.
      UserError: a tensor is missing, left over or of another shape; a config of another class; a
        truncated file; the file says another process than `process`; a LoRA of another model.
    """
    refuse_existing(out)
    path = Path(model)
    if path.suffix in _PICKLES:
        raise UserError(f"{path}: a pickle, which is not read; convert it to .safetensors where it was made")
    if path.suffix == ".safetensors":
        if path.is_file():
            _refuse_other_kinds(path)
        if base is None:
            raise UserError(
                f"{path}: a single file holds no configs and no tokenizer; name a diffusers folder of the "
                "same architecture with --base"
            )
        _import_single(path, model_dir.find_model(base), out, process, loras)
        return
    if base is not None:
        raise UserError(f"--base={base}: only a single .safetensors file needs one")
    for key, value in process.items():
        raise UserError(
            f"--{key}={value}: is of a single .safetensors file; a folder says it in scheduler_config.json"
        )
    _import_folder(model_dir.find_model(model), out, loras)


def _import_folder(folder: Path, out: Path, loras: Sequence[str]) -> None:
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: a training run; use `convert export --run={folder}`")
    pipe = load_pipeline(Adapted(folder, tuple(loras)))  # checks whether all of its parts fit together
    networks = pipe.networks
    classes = model_dir.list_components(model_dir.read_json(folder / "model_index.json"))
    unusable = model_dir.find_unusable(folder, classes)
    for name, class_name in classes.items():
        if name in networks:
            open_component(folder / name, networks[name])
        elif name not in unusable and find_weights(folder / name, class_name):
            open_stored(folder / name, class_name)
    if loras:
        changed = {name: open_component(folder / name, networks[name]) for name in _find_changed(pipe)}
        readme = folder / "README.md"
        card = readme.read_text(encoding="utf-8") if readme.is_file() else f"# {out.name}\n"
        model_dir.write_folder(out, folder, _fold(pipe, changed, out), f"{card}\n{_describe(loras)}\n")
        return
    files = model_dir.list_files(folder)
    model_dir.require_space(out, sum((folder / file).stat().st_size for file in files))
    with appear(out) as partial:
        model_dir.copy_model(folder, files, partial)


def _refuse_other_kinds(path: Path) -> None:
    kind = file_kinds.find_kind(tensors.open_file(path))
    if kind:
        raise UserError(f"{path}: is {kind}")


def _find_changed(pipe: Pipeline) -> set[str]:
    """Returns the components that a pipeline's LoRA files add to."""
    return {component for lora in pipe.loras for component in lora.modules}


def _fold(
    pipe: Pipeline, components: Mapping[str, Mapping[str, Tensor]], out: Path
) -> dict[str, dict[str, Tensor]]:
    """Returns components with a pipeline's LoRA files added, each tensor in the dtype that it had."""
    folded = {}
    for component, stored in components.items():
        added = dict(stored)
        for lora in pipe.loras:
            added = lora_files.fold(added, lora, component)
        file = weights_file(out / component, pipe.networks[component].class_name)
        folded[component] = {name: cast(name, added[name], stored[name].dtype, file) for name in stored}
    return folded


def _describe(loras: Sequence[str]) -> str:
    """Returns a sentence for the model's card."""
    added = (f"`{path.name}` with weight {weight:g}" for path, weight in map(lora_files.parse_lora, loras))
    return f"LoRA added with `python -m dspo_jax.convert import`: {', '.join(added)}."


def _import_single(
    path: Path, base: Path, out: Path, process: Mapping[str, str | bool], loras: Sequence[str]
) -> None:
    pipe = load_pipeline(Adapted(base, tuple(loras)))
    networks = pipe.networks
    single = tensors.open_file(path)
    try:
        said = single_file.read_process(single, tensors.read_metadata(path))
        for key in said.keys() & process.keys():
            if said[key] != process[key]:
                raise UserError(f"says {key} = {said[key]}, not --{key}={process[key]}; leave the flag out")
        if single_file.is_flow(pipe.scheduler_config):
            if process:
                raise UserError(f"--{next(iter(process))}: is not of rectified flow; leave the flag out")
            said = {}
        changes = _change_process(pipe.scheduler_config, {**said, **process})
        layouts = make_layouts({name: model.complete_config() for name, model in networks.items()})
        shapes = {name: torch_shapes(model) for name, model in networks.items()}
        replaced = single_file.split(single, layouts, shapes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    from_file = ", ".join(sorted(replaced))
    for name in networks.keys() - replaced.keys():
        logging.info("%s has no %s: the one of %s is taken", path, name, base)
        opened = open_component(base / name, networks[name])
        if name in _find_changed(pipe):
            replaced[name] = opened
    added = f"{_describe(loras)}\n\n" if loras else ""
    card = (
        f"# {path.stem}\n\nImported with `python -m dspo_jax.convert import`: "
        f"{from_file} from the single file `{path.name}`, everything else (configs, "
        f"tokenizers, schedule) from `{base.name}`.\n\n{added}"
        f"The licences of {'all' if loras else 'both'} apply.\n"
    )
    model_dir.write_folder(out, base, _fold(pipe, replaced, out), card, changes=changes)


def _change_process(base: SchedulerConfig, wanted: Mapping[str, str | bool]) -> dict[str, JsonObject]:
    """Returns the keys of the base's files that get other values, for `write_folder`.

    Zero terminal SNR comes with timesteps that begin at the last one (Lin et al. 2023), and with DDIM where
    the base's scheduler, in diffusers, does not know it.
    """
    now = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, **base}
    changed: JsonObject = {key: value for key, value in wanted.items() if now[key] != value}
    if not changed:
        return {}
    index: JsonObject = {}
    if changed.get("rescale_betas_zero_snr"):
        changed["timestep_spacing"] = "trailing"
        if base.get("_class_name") not in _KNOW_ZERO_SNR:
            changed |= {"_class_name": "DDIMScheduler", "clip_sample": False}
            index["scheduler"] = ["diffusers", "DDIMScheduler"]
    Schedule.from_config({**base, **changed})
    logging.info("scheduler_config.json: %s", ", ".join(f"{key} = {value}" for key, value in changed.items()))
    return {"scheduler/scheduler_config.json": changed} | ({"model_index.json": index} if index else {})
