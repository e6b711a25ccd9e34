"""Rematerialisation: which activations of a block are kept for its backward pass, and which are recomputed.

"none" keeps every intermediate result. "blocks" keeps a block's inputs only and runs the block again before
its backward pass, which costs up to a further forward pass (Chen et al. 2016, arXiv 1604.06174). "dots" keeps
the outputs of linear layers, convolutions and the TPU's attention kernel as well, so that norms, activations
and the products and softmax of plain attention are computed again, and little arithmetic. None of them
changes what is computed.
"""

import jax
from flax import nnx
from jax.extend.core import Primitive, primitives
from jaxtyping import PyTree

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.kernels import flash

POLICIES = ("none", "blocks", "dots")


def check_policy(policy: str) -> None:
    """Refuses a name that is not in `POLICIES` by a UserError; for before a trace, which would add to it."""
    if policy not in POLICIES:
        raise UserError(spelling.unknown("config.remat", policy, POLICIES))


def run_block(block: nnx.Module, policy: str, *inputs: jax.Array) -> PyTree:
    """Runs `block(*inputs)`, rematerialised as `policy` says; "none" adds nothing to the program.

    Raises:
      UserError: an unknown policy.
    """
    check_policy(policy)
    if policy == "none":
        return block(*inputs)
    graph, state = nnx.split(block)

    def run(state: nnx.State, *inputs: jax.Array) -> PyTree:
        return nnx.merge(graph, state)(*inputs)

    policies = jax.checkpoint_policies
    layer_outputs = policies.save_from_both_policies(
        _is_layer_output, policies.save_only_these_names(flash.RESIDUALS)
    )
    saveable = layer_outputs if policy == "dots" else policies.nothing_saveable
    return jax.checkpoint(run, policy=saveable)(state, *inputs)


def _is_layer_output(primitive: Primitive, *args: object, **params: object) -> bool:
    # Attention's products have batch dimensions, linear layers have none.
    is_linear = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive is primitives.conv_general_dilated_p or is_linear(primitive, *args, **params)
