"""An optimizer of optax beside code that may not mix dtypes."""

import jax
import optax


def promote_dtypes(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, whose update mixes dtypes (Adam's decay ** count) whatever the test allows."""

    def update(*arguments):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*arguments)

    return optax.GradientTransformation(optimizer.init, update)
