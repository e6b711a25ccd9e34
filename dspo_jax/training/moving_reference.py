"""A frozen reference that follows the policy: moved every few updates, or as a moving average."""

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from dspo_jax.kernels.layouts import format_of
from dspo_jax.models import lora
from dspo_jax.models.model import Params
from dspo_jax.parallel.host_memory import to_device
from dspo_jax.training.loop import AfterStep
from dspo_jax.training.step import TrainState
from dspo_jax.training.task import POLICY, Metrics


def moving_part(reference: Params, params: Params) -> Params:
    """Returns the part of the reference that moves: whatever the policy does not share with it.

    Args:
      reference: frozen parameters by component, or their shapes.
      params: trained parameters, or their shapes.
    """
    leaves = flatten_dict(reference)
    paths = flatten_dict(lora.combine(reference.get(POLICY, {}), params))
    return unflatten_dict({path: leaves[path] for path in sorted(paths)})


class MoveReference:
    """A hook that moves the reference: reference = decay * reference + (1 - decay) * policy.

    The reference is one dict that all parts of a run hold; its arrays are replaced in it. Only what is
    trained moves: networks, or adapters; and where the reference began as another model, all that differs.
    A checkpoint has these arrays, as a run cannot make them again.
    """

    def __init__(self, reference: Params, params: Params, *, every: int, decay: float):
        """Takes the reference.

        Args:
          reference: frozen parameters by component, on the devices; changed in place.
          params: trained parameters, or shapes like theirs.
          every: updates between two moves.
          decay: 0 puts the policy in the reference's place.
        """
        self._reference, self._every = reference, every
        part = moving_part(reference, params)
        self._paths = flatten_dict(part).keys()

        def move(part: Params, params: Params) -> Params:
            return jax.tree.map(
                lambda old, new: (decay * old + (1 - decay) * new.astype(old.dtype)).astype(old.dtype),
                to_device(part),
                params,
            )

        self._move = jax.jit(move, donate_argnums=0, out_shardings=jax.tree.map(format_of, part))

    def arrays(self) -> Params:
        """Returns the part of the reference that moves."""
        leaves = flatten_dict(self._reference)
        return unflatten_dict({path: leaves[path] for path in self._paths})

    def set_arrays(self, part: Params) -> None:
        """Puts a part of a checkpoint into the reference."""
        self._reference.update(lora.combine(self._reference, part))

    def due(self, at: AfterStep) -> bool:
        """Tells whether the step is one of every few."""
        return at.step > 0 and at.step % self._every == 0

    def __call__(self, at: AfterStep, state: TrainState, metrics: Metrics) -> None:
        """Moves the reference."""
        del at, metrics
        policy = lora.combine(self._reference.get(POLICY, {}), state.params)
        self.set_arrays(self._move(self.arrays(), policy))
