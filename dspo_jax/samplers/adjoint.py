"""Gradients of a sampler's result with respect to the network: a written adjoint, in one step's memory.

Differentiating the scan over the steps would keep the activations of every call of the network. Here the
forward scan keeps the states x_0 .. x_{n-1} alone; the backward pass takes one vector-Jacobian product of one
step at a time, from the last step to the first that passes a gradient, which may be drawn at random: DRaFT
with any K (Clark et al. 2024), AlignProp (Prabhudesai et al. 2023) and the gradient with respect to the
initial noise (DOODL, Wallace et al. 2023) are one compiled program.

An image that is not finite passes no gradient. A cotangent of zero is not enough, as 0 x NaN is NaN: what the
network reads of it in the backward pass is replaced by zeros.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PyTree

Step = Callable[
    [PyTree, PyTree, Float[Array, "B h w C"], Int32[Array, ""]],
    tuple[Float[Array, "B h w C"], Float[Array, " B"]],
]
"""`(theta, constants, x_i, i) -> (x_{i+1}, penalty of the step [B])`, pure, made of `Sampler.transition`."""


def run_with_gradients(
    step: Step,
    theta: PyTree,
    constants: PyTree,
    x: Float[Array, "B h w C"],
    attached: Bool[Array, " n"],
    kept: Float[Array, " n"],
    walk: Step | None = None,
) -> tuple[Float[Array, "B h w C"], Float[Array, " B"]]:
    """Takes n steps, through which gradients flow to `theta` and to `x`.

    A step that is not attached takes its prediction as a constant: it gives `theta` no gradient, and passes
    that of x_{i+1} on to x_i by `kept[i]`. Nothing is passed on before the first attached step, and `x` has a
    gradient only where that is step 0. An image of which x_n is not finite has none at all.

    Args:
      step: one step. Its vector-Jacobian product is computed with whatever rematerialisation it has.
      theta: arrays of floats with respect to which to differentiate; the gradients of the steps are added up
        in the dtype of x, float32.
      constants: what else the step reads; no gradient flows into it.
      x: x_0, [B, h, w, C].
      attached: [n], the steps whose predictions get a gradient; it may be traced.
      kept: [n], d x_{i+1} / d x_i with the prediction held fixed (`Sampler.kept`).
      walk: the step where it is not attached, whose penalty is not read; `step` unless it is given.

    Returns:
      x_n, and the sum of the penalties of the attached steps, [B].
    """
    calls = jnp.arange(attached.shape[0], dtype=jnp.int32)

    def forward(
        theta: PyTree, constants: PyTree, x: jax.Array, attached: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        def take(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[Any, jax.Array]:
            x, total = carry
            operands = (theta, constants, x, i)
            after, penalty = jax.lax.cond(attached[i], step, walk, *operands) if walk else step(*operands)
            return (after, total + jnp.where(attached[i], penalty, 0.0)), x

        result, states = jax.lax.scan(take, (x, jnp.zeros(x.shape[0], x.dtype)), calls)
        return result, (theta, constants, states, attached, _are_finite(result[0]))

    def backward(residuals: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
        theta, constants, states, attached, finite = residuals
        adjoint, of_penalty = (_keep(finite, cotangent) for cotangent in cotangents)
        first = jnp.argmax(attached)

        def through(i: jax.Array, adjoint: jax.Array, grads: PyTree) -> tuple[jax.Array, PyTree]:
            x = _keep(finite, states[i])
            _, pull = jax.vjp(lambda theta, x: step(theta, constants, x, i), theta, x)
            of_theta, adjoint = pull((adjoint, of_penalty))
            return adjoint, jax.tree.map(lambda total, new: total + new.astype(total.dtype), grads, of_theta)

        def past(i: jax.Array, adjoint: jax.Array, grads: PyTree) -> tuple[jax.Array, PyTree]:
            return kept[i] * adjoint, grads

        def back(number: jax.Array, carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
            i = len(calls) - 1 - number
            return jax.lax.cond(attached[i], through, past, i, *carry)

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, states.dtype), theta)
        adjoint, grads = jax.lax.fori_loop(0, len(calls) - first, back, (adjoint, zeros))
        grads = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), grads, theta)
        return grads, None, jnp.where(attached[0], adjoint, 0.0), None

    run = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    run.defvjp(forward, backward)
    result: tuple[jax.Array, jax.Array] = run(theta, constants, x, attached)
    return result


def checkpoint_images(
    function: Callable[[PyTree, Float[Array, "B h w C"]], PyTree], theta: PyTree, x: Float[Array, "B h w C"]
) -> PyTree:
    """Evaluates a function of images; the backward pass computes it again, as `jax.checkpoint` does.

    Args:
      function: `(theta, x) -> arrays [B, ...]`, each row of which follows from that of `x`. A row in which
        anything is not finite passes no gradient.
      theta: arrays of floats.
      x: [B, h, w, C].

    Returns:
      What the function returns.
    """

    def forward(theta: PyTree, x: jax.Array) -> tuple[PyTree, Any]:
        result = function(theta, x)
        finite = jnp.stack([_are_finite(leaf) for leaf in jax.tree.leaves(result)]).all(0)
        return result, (theta, x, finite)

    def backward(residuals: Any, cotangents: PyTree) -> tuple[PyTree, jax.Array]:
        theta, x, finite = residuals
        _, pull = jax.vjp(function, theta, _keep(finite, x))
        of_theta, of_x = pull(jax.tree.map(lambda leaf: _keep(finite, leaf), cotangents))
        return of_theta, _keep(finite, of_x)

    run = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    run.defvjp(forward, backward)
    return run(theta, x)


def _are_finite(x: jax.Array) -> jax.Array:
    """Returns which rows are finite, [B]."""
    return jnp.isfinite(x).all(tuple(range(1, x.ndim)))


def _keep(which: jax.Array, x: jax.Array) -> jax.Array:
    """Replaces all other rows by zeros."""
    return jnp.where(which.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
