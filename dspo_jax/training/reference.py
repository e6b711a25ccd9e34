"""A frozen reference that is another model than the start of the policy."""

import dataclasses

from dspo_jax.errors import UserError
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.same_kind import find_fault, have_same_weights, weights_digest
from dspo_jax.training.settings import Settings


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
        return {"reference.model": f"weights of the digest {weights_digest(self.pipe)}"}


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
        other = load_pipeline(name, **pipe.text)
    except (UserError, FileNotFoundError) as error:
        raise type(error)(f"config.reference.model = {name!r}: {error}") from error
    if fault := find_fault(pipe, other, "config.model"):
        raise UserError(
            f"config.reference.model = {name!r}: {fault}; name a model of the same kind as config.model, "
            "such as what that was trained from"
        )
    encoder = pipe.stored_encoder
    if pipe.stored_states is not None and encoder and not have_same_weights(pipe, other, encoder):
        raise UserError(
            f"config.reference.model = {name!r}: its {encoder} has other weights than config.model's, whose "
            "states the data store; encode the data with --config.text.store_t5=False"
        )
    differing = [each for each in pipe.components if not have_same_weights(pipe, other, each)]
    return Reference(other, tuple(differing))


def check_reference(settings: Settings, *, needed: bool) -> None:
    """Refuses keys of a reference that would not be read.

    Args:
      settings: of the run.
      needed: whether the method reads a reference.

    Raises:
      UserError: by key.
    """
    if settings.reference.decay and not settings.reference.every:
        raise UserError(
            f"config.reference.decay = {settings.reference.decay:g}: a reference that does not move, as "
            "config.reference.every = 0, is no average; set the decay to 0, or --config.reference.every to "
            "the updates between two moves"
        )
    if needed:
        return
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
