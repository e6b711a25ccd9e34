"""A frozen reference that is another model than the start of the policy."""

import dataclasses

import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.files import sha256
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.stored import comparable
from dspo_jax.training.settings import Settings
from dspo_jax.weights.component_files import find_weights


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """The model of `config.reference.model`.

    Attributes:
      pipe: the model; None where nothing but shapes is wanted, which are those of the policy.
      differing: the components whose weights are not those of the policy's start.
    """

    pipe: Pipeline | None
    differing: tuple[str, ...]

    def pins(self) -> dict[str, str]:
        """Tells the weights apart that a run is compared with, by the key that names them."""
        assert self.pipe is not None
        return {"reference.model": f"weights of the digest {self.pipe.weights_digest()}"}


def open_reference(name: str, pipe: Pipeline) -> Reference:
    """Opens a reference, whose weights are not yet read into memory.

    Args:
      name: as `load_pipeline` takes it.
      pipe: the model that the policy starts from.

    Raises:
      UserError, FileNotFoundError: no such model, or one that is of another architecture, predicts something
        else, or has another schedule, VAE or tokenizer.
    """
    try:
        other = load_pipeline(name, max_chunks=pipe.max_chunks, clip_skip=pipe.clip_skip)
    except (UserError, FileNotFoundError) as error:
        raise type(error)(f"config.reference.model = {name!r}: {error}") from error
    if fault := _find_fault(pipe, other):
        raise UserError(
            f"config.reference.model = {name!r}: {fault}; name a model of the same kind as config.model, "
            "such as what that was trained from"
        )
    differing = [each for each in pipe.components if not _have_same_weights(pipe, other, each)]
    return Reference(other, tuple(differing))


def refuse_reference(settings: Settings) -> None:
    """Refuses the keys of a reference that the method does not read.

    Raises:
      UserError: by key.
    """
    if settings.reference.every:
        raise UserError(
            f"config.reference.every = {settings.reference.every}: {settings.method!r} reads no reference "
            "that could move; set it to 0"
        )
    if settings.reference.model:
        raise UserError(
            f"config.reference.model = {settings.reference.model!r}: {settings.method!r} reads no reference; "
            "leave it unset"
        )


def _find_fault(pipe: Pipeline, other: Pipeline) -> str | None:
    """Says why the two cannot denoise the same latents under the same captions; None if they can."""
    for name, network in pipe.networks.items():
        found = other.networks.get(name)
        if found is None or (found.class_name, found.settings) != (network.class_name, network.settings):
            return f"its {name} is of another architecture than config.model's"
    ours, theirs = pipe.schedule, other.schedule
    if ours.prediction_type != theirs.prediction_type:
        return f"predicts {theirs.prediction_type}, and config.model {ours.prediction_type}"
    if not np.array_equal(ours.alphas_cumprod, theirs.alphas_cumprod):
        return "its noise schedule is not config.model's"
    made, needed = comparable(other.fingerprint(), pipe.fingerprint())
    for key in sorted((made.keys() | needed.keys()) - {"model"}):
        if made.get(key) != needed.get(key):
            part = "tokenizers are" if key.startswith(("caption", "token", "pad")) else "VAE is"
            return f"its {part} not config.model's ({key} = {made.get(key)!r}, not {needed.get(key)!r})"
    return None


def _have_same_weights(pipe: Pipeline, other: Pipeline, name: str) -> bool:
    if name in pipe.trained or name in other.trained:
        return False
    ours, theirs = (find_weights(each.path / name, each.networks[name].class_name) for each in (pipe, other))
    return [file.resolve() for file in ours] == [file.resolve() for file in theirs] or (
        sha256(*ours) == sha256(*theirs)
    )
