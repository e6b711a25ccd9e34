"""Values of `config.offload`: the parts of a run that can lie in the host's memory, and refusals."""

from collections.abc import Sequence

from dspo_jax.errors import UserError
from dspo_jax.limits import Limit

MOMENTS, REFERENCE = "moments", "reference"

OFFLOADS = Limit(
    f"may hold {MOMENTS!r} (the optimizer's state) and {REFERENCE!r} (the frozen copy of what is trained), "
    f"as in --config.offload=\"('{MOMENTS}', '{REFERENCE}')\"",
    lambda names: set(names) <= {MOMENTS, REFERENCE},
)


def check_offload(offload: Sequence[str], *, adapters: bool, needs_reference: bool, method: str) -> None:
    """Refuses to put a reference into the host's memory that a step does not have.

    Args:
      offload: `config.offload`.
      adapters: whether adapters alone are trained.
      needs_reference: whether the loss runs the reference.
      method: name of the objective or the like, for messages.

    Raises:
      UserError: by key.
    """
    if REFERENCE not in offload:
        return
    key = f"config.offload = {list(offload)}"
    if adapters:
        raise UserError(
            f"{key}: with config.lora the reference is the base that the policy runs too, and no copy of its "
            f"own; leave {REFERENCE!r} out, or set --config.reference_dtype=int8 for a smaller base"
        )
    if not needs_reference:
        raise UserError(f"{key}: a step of {method!r} runs no reference; leave {REFERENCE!r} out")
