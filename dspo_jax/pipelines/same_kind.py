"""Whether two models can take each other's place, and whether they have the same weights."""

import hashlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from dspo_jax.files import sha256
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.stored import comparable
from dspo_jax.weights.component_files import find_weights
from dspo_jax.weights.lora_files import LoRA


def find_fault(pipe: Pipeline, other: Pipeline, name: str) -> str | None:
    """Says why two models cannot denoise the same latents under the same captions; None if they can.

    Args:
      pipe, other: the models, whose weights may differ.
      name: what the message calls `pipe`.
    """
    for component, network in pipe.networks.items():
        found = other.networks.get(component)
        if found is None or (found.class_name, found.settings) != (network.class_name, network.settings):
            return f"its {component} is of another architecture than {name}'s"
    ours, theirs = pipe.schedule, other.schedule
    if ours.prediction_type != theirs.prediction_type:
        return f"predicts {theirs.prediction_type}, and {name} {ours.prediction_type}"
    if not ours.is_same(theirs):
        return f"its noise schedule is not {name}'s"
    made, needed = comparable(other.fingerprint(), pipe.fingerprint())
    for key in sorted((made.keys() | needed.keys()) - {"model"}):
        if made.get(key) != needed.get(key):
            part = "tokenizers are" if key.startswith(("caption", "token", "pad", "t5")) else "VAE is"
            return f"its {part} not {name}'s ({key} = {made.get(key)!r}, not {needed.get(key)!r})"
    return None


def have_same_weights(pipe: Pipeline, other: Pipeline, name: str) -> bool:
    """Tells whether a component of two models has the same weights, as files; not where a LoRA is added."""
    if any(
        name in each.trained or any(name in lora.modules for lora in each.loras) for each in (pipe, other)
    ):
        return False
    ours, theirs = (find_weights(each.path / name, each.networks[name].class_name) for each in (pipe, other))
    return [file.resolve() for file in ours] == [file.resolve() for file in theirs] or (
        sha256(*ours) == sha256(*theirs)
    )


def weights_digest(pipe: Pipeline) -> str:
    """Returns a digest that changes when the weights of any network of a model do.

    It covers the start of each trained array, and of each file the size and 4 KiB at 256 places, as files
    of gigabytes would take too long to read.
    """
    return _digest(pipe, tuple(pipe.networks), pipe.trained, pipe.loras)


def component_digest(pipe: Pipeline, component: str) -> str:
    """Returns a digest that changes when the weights of one network of a model do; see `weights_digest`."""
    loras = [added for added in pipe.loras if component in added.modules]
    return _digest(pipe, (component,), pipe.trained.get(component, {}), loras)


def _digest(pipe: Pipeline, components: Sequence[str], trained: PyTree, loras: Sequence[LoRA]) -> str:
    digest = hashlib.sha256()
    for component in components:
        for file in find_weights(pipe.path / component, pipe.networks[component].class_name):
            size = file.stat().st_size
            digest.update(f"{component} {size}".encode())
            with file.open("rb") as content:
                for place in range(256):
                    content.seek(size * place // 256)
                    digest.update(content.read(4096))
    for leaf in jax.tree.leaves(trained):
        digest.update(np.asarray(leaf.reshape(-1)[:1024]).tobytes())
    for added in loras:
        digest.update(f"{sha256(added.path)} {added.weight}".encode())
    return digest.hexdigest()
