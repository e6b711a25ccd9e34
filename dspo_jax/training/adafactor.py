"""Adafactor's second moments, factored as in the released trainers."""

import jax
import jax.numpy as jnp
import optax

_DECAY_RATE = 0.8
_EPSILON = 1e-30


def scale_by_released_factored_rms() -> optax.GradientTransformation:
    """Divides gradients by the root of their second moment, factored over torch's last two axes.

    These are the two axes of a matrix and the height and width of a convolution's kernel, however long they
    are: transformers.optimization.Adafactor, without its clipping, rate and weight decay. Of a 3 x 3 kernel
    it keeps 6 numbers of 9, and of a 1 x 1 kernel, whose factors are the moment itself, the moment once.
    `optax.scale_by_factored_rms` factors the two largest axes, if both are at least 128.

    Decay 1 - n^-0.8 at update n, counted from 1, and 1e-30 added to the squares (Shazeer and Stern 2018,
    arXiv 1804.04235), as in both. Kernels are [height, width, in, out]; the state is optax's.
    """

    def init(params: optax.Params) -> optax.FactoredState:
        leaves, tree = jax.tree.flatten(params)
        moments = zip(*map(_zero_moments, leaves), strict=True) if leaves else ((), (), ())
        return optax.FactoredState(
            jnp.zeros([], jnp.int32), *(jax.tree.unflatten(tree, each) for each in moments)
        )

    def update(
        gradients: optax.Updates, state: optax.FactoredState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.FactoredState]:
        del params
        count = state.count + 1
        decay = 1 - count.astype(jnp.float32) ** -_DECAY_RATE
        leaves, tree = jax.tree.flatten(gradients)
        moments = zip(*map(jax.tree.leaves, (state.v_row, state.v_col, state.v)), strict=True)
        scaled = [_scale(decay, gradient, *of_it) for gradient, of_it in zip(leaves, moments, strict=True)]
        updates, *new = (jax.tree.unflatten(tree, each) for each in zip(*scaled, strict=True))
        return updates, optax.FactoredState(count, *new)

    return optax.GradientTransformation(init, update)


def _factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the two axes that a parameter's moment is factored over, or None where it is kept whole."""
    if len(shape) < 2:
        return None
    axes = (0, 1) if len(shape) == 4 else (len(shape) - 2, len(shape) - 1)
    return None if 1 in (shape[axes[0]], shape[axes[1]]) else axes


def _zero_moments(param: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes row, column and whole moments of zero; an unused one has a single number, as in optax."""
    unused, axes = jnp.zeros((1,), param.dtype), _factored_axes(param.shape)
    if axes is None:
        return unused, unused, jnp.zeros_like(param)
    row, column = (
        jnp.zeros(tuple(size for axis, size in enumerate(param.shape) if axis != gone), param.dtype)
        for gone in reversed(axes)
    )
    return row, column, unused


def _scale(
    decay: jax.Array, gradient: jax.Array, row: jax.Array, column: jax.Array, whole: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the scaled gradient, and the moments updated by it."""

    def average(moment: jax.Array, square: jax.Array) -> jax.Array:
        return decay * moment + (1 - decay) * square

    square, axes = gradient**2 + _EPSILON, _factored_axes(gradient.shape)
    if axes is None:
        whole = average(whole, square)
        return gradient * jax.lax.rsqrt(whole), row, column, whole
    first, second = axes
    row, column = average(row, square.mean(second)), average(column, square.mean(first))
    of_row = jax.lax.rsqrt(row / row.mean(first, keepdims=True))
    scales = jnp.expand_dims(of_row, second) * jnp.expand_dims(jax.lax.rsqrt(column), first)
    return gradient * scales, row, column, whole
