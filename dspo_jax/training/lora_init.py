"""The adapters of a run at its start: from a LoRA file, and the magnitudes of DoRA."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dspo_jax.errors import UserError
from dspo_jax.files import sha256
from dspo_jax.models import lora
from dspo_jax.models.model import Model, Params
from dspo_jax.parallel.mesh import replicated
from dspo_jax.training.lora_settings import LoraSettings
from dspo_jax.training.task import Task
from dspo_jax.weights.layout import flatten, torch_layout, unflatten
from dspo_jax.weights.lora_files import LoRA, Module, open_lora, parse_lora

KEY = "config.lora.init = "
"""What errors say before the value."""


def read_adapters(
    settings: LoraSettings, networks: Mapping[str, Model], trained: Sequence[str], fresh: Params | None
) -> Params:
    """Reads a LoRA file as adapters by component, float32, which add in the run what the file adds.

    B is multiplied by the factor alpha / rank of the file and by the weight, and divided by the run's factor.

    Args:
      settings: of the run; `init` is `FILE` or `FILE:WEIGHT`, PEFT's or kohya's.
      networks: that a file may have adapters for.
      trained: names of those whose adapters are trained.
      fresh: adapters of the layers and the rank that the config asks for; None takes those of the file.

    Raises:
      FileNotFoundError: no such file.
      UserError: it is no LoRA of the networks, has adapters of others than are trained, other layers or
        ranks than `fresh`, or is DoRA where the run is not.
    """
    assert settings.init is not None
    opened = open_lora(settings.init, networks, key=KEY)
    for component in opened.modules:
        if component not in trained:
            raise UserError(
                f"{opened.path}: has adapters of {component}, which is not trained; set "
                "config.train_text_encoder=True, or train from a model that has the file added to it (python "
                "-m dspo_jax.convert import --lora)"
            )
    for component in trained:
        if component not in opened.modules:
            raise UserError(
                f"{opened.path}: holds nothing for {component}, which is trained; name another file in "
                "config.lora.init, or set config.train_text_encoder=False for a LoRA of the denoiser alone"
            )
    if not settings.dora and any(
        module.magnitude is not None for modules in opened.modules.values() for module in modules.values()
    ):
        raise UserError(f"{opened.path}: is DoRA; set config.lora.dora=True to train it as such")
    if fresh is not None:
        _check_fits(opened, fresh)
    for component, modules in opened.modules.items():
        ranks = sorted({module.down.shape[0] for module in modules.values()})
        logging.info(
            "%s: starts from adapters of %d layers of %s, of rank %s",
            opened.path,
            len(modules),
            component,
            " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))),
        )
    return {
        component: _make_tree(modules, opened.weight, settings.scale)
        for component, modules in opened.modules.items()
    }


def _check_fits(opened: LoRA, fresh: Params) -> None:
    """Refuses other layers or ranks than the config asks for."""
    for component, tree in fresh.items():
        wanted = lora.find_ranks(tree)
        found = {
            name.removesuffix(".weight"): module.down.shape[0]
            for name, module in opened.modules[component].items()
        }
        for layer in sorted(wanted.keys() | found.keys()):
            if wanted.get(layer) != found.get(layer):
                have, want = (
                    f"rank {ranks[layer]}" if layer in ranks else "no adapter" for ranks in (found, wanted)
                )
                raise UserError(
                    f"{opened.path}: has {have} for {component}.{layer}, but config.lora.rank and "
                    f"config.lora.targets ask for {want}; set config.lora.rank=0 to train what the file has"
                )


def _make_tree(modules: Mapping[str, Module], weight: float, scale: lora.Scale) -> Params:
    leaves: dict[str, np.ndarray] = {}
    for name, module in modules.items():
        layer = name.removesuffix(".weight")
        factor = np.float32(weight * module.scale / scale.of(module.down.shape[0]))
        down, up = (np.asarray(half.read(), np.float32) for half in (module.down, module.up))
        for matrix, value in (("lora_A", down), ("lora_B", factor * up)):
            path = f"{layer}.{matrix}.kernel"
            leaves[path] = value.transpose(np.argsort(torch_layout(path, value.ndim)[1]))
        if module.magnitude is not None:
            leaves[f"{layer}.lora_magnitude_vector"] = np.asarray(module.magnitude.read(), np.float32)
    return unflatten(leaves)


def find_magnitudes(task: Task, whole: Params, mesh: Mesh, *, abstract: bool) -> Params:
    """Computes DoRA's magnitudes at the start of a run, on the host: those that change nothing.

    Args:
      task: of the run.
      whole: kernels and adapters by component, on the devices.
      mesh: the devices.
      abstract: return shapes, which then are those of `whole`.
    """
    assert task.adapters is not None
    find = partial(lora.find_magnitudes, scale=task.adapters)
    if abstract:
        return jax.eval_shape(find, whole)
    return jax.device_get(jax.jit(find, out_shardings=replicated(mesh))(whole))


def without_products(adapters: Params) -> Params:
    """Returns adapters that add nothing, B being zero, for a reference that is another model.

    Without magnitudes, which are then the reference's own.
    """
    return {
        component: unflatten(
            {
                path: np.zeros_like(leaf) if path.endswith("lora_B.kernel") else leaf
                for path, leaf in flatten(tree).items()
                if not path.endswith("lora_magnitude_vector")
            }
        )
        for component, tree in adapters.items()
    }


def digest(text: str) -> str:
    """Returns the digest by which a run knows its file again; the weight is in the config."""
    return sha256(parse_lora(text, key=KEY)[0])
