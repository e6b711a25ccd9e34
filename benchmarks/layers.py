"""Layers whose form `dspo_jax.models` chooses by the device: each form, forward and backward.

    python -m benchmarks.layers                              # timed on the device that is here
    python -m benchmarks.layers --topology=v5p:2x2x1         # compiled for one that is not; needs libtpu
    python -m benchmarks.layers --topology=h100              # the same; needs dspo_jax[plan-gpu]

bfloat16, one device. Norms are compiled within what surrounds them in a UNet: alone they have no neighbour to
read or write their input.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from benchmarks import programs
from dspo_jax import cli
from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models import blocks
from dspo_jax.models.norms import LayerNorm
from dspo_jax.models.transformer_blocks import FeedForward
from dspo_jax.parallel.mesh import make_mesh

# Channels and the side before doubling.
DOUBLED = ((1280, 16), (640, 32), (256, 32), (128, 16))
# Kind of norm, channels and side, of the outer levels of SD1.5 and SDXL.
NORMS = (
    ("group", 320, 64),
    ("group", 640, 32),
    ("group", 320, 128),
    ("layer", 320, 64),
    ("layer", 640, 32),
    ("layer", 640, 64),
    ("layer", 1280, 32),
)

Form = tuple[str, Callable[..., jax.Array], Sequence[Any]]  # its name, function and arguments


def two_passes(norm: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Returns a norm with its variance about the mean, as of float32."""
    return lambda x: norm(x.astype(jnp.float32)).astype(x.dtype)


def doubled(images: int, channels: int, side: int) -> Iterator[Form]:
    """The convolution of `Upsample2D`."""
    shapes = ((images, side, side, channels), (3, 3, channels, channels))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        padding = ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(
            blocks.double(x), kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    yield "3 x 3 of what is doubled", plain, arrays
    yield "four of 2 x 2", blocks.convolve_doubled, arrays


def normed(images: int, channels: int, side: int, kind: str) -> Iterator[Form]:
    """A block of two group norms and convolutions, or a layer norm and the feed-forward layer behind it."""
    rngs = nnx.Rngs(0)
    module: nnx.Module
    if kind == "group":
        module = blocks.ResnetBlock2D(channels, channels, temb=None, groups=32, epsilon=1e-5, rngs=rngs)
        shape: tuple[int, ...] = (images, side, side, channels)
    else:
        module = nnx.List([LayerNorm(channels), FeedForward(channels, rngs=rngs)])
        shape = (images, side * side, channels)
    definition, weights = nnx.split(module)
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), weights)

    def apply(change: Callable[..., Any]) -> Callable[..., jax.Array]:
        def run(x: jax.Array, weights: Any) -> jax.Array:
            layer: Any = nnx.merge(definition, weights)
            if kind == "layer":
                norm, feed_forward = layer
                return x + feed_forward(change(norm)(x))
            h = layer.conv1(nnx.silu(change(layer.norm1)(x)))
            return x + layer.conv2(nnx.silu(change(layer.norm2)(h)))

        return run

    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16), weights]
    yield "variance in two passes", apply(two_passes), arrays
    yield "from the mean of squares", apply(lambda norm: norm), arrays


def measure(device: Any) -> None:
    """Prints a line for each layer and form."""
    values = flags.FLAGS
    mesh = make_mesh({}, [device])
    print(f"one {device.device_kind}, {values.images} images, jax {jax.__version__}")
    cases = {f"double {c} to {2 * side}": doubled(values.images, c, side) for c, side in DOUBLED}
    cases |= {f"{kind} norm {c} at {side}": normed(values.images, c, side, kind) for kind, c, side in NORMS}
    for name, forms in cases.items():
        if values.only not in name:
            continue
        for form, function, arguments in forms:
            function = on_mesh(function, mesh)
            forward = programs.compile_for(device, function, arguments)
            gradient = jax.eval_shape(function, *arguments)
            whole = programs.compile_for(
                device, programs.forward_and_backward(function), (gradient, *arguments)
            )
            print(f"{name:<22}{form:<26}{programs.describe_program(whole, device)}", flush=True)
            print(f"{'':<22}{'  forward alone':<26}{programs.describe_program(forward, device)}", flush=True)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    with programs.chosen_device() as device:
        measure(device)


if __name__ == "__main__":
    programs.define_flags(images=32)
    cli.run(main)
