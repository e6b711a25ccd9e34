"""Attention to 77 tokens of text, compiled for an NVIDIA GPU: written out, and by cuDNN's padded kernel.

    python -m benchmarks.text_attention --topology=h100         # needs dspo_jax[plan-gpu], no GPU

A whole layer in bfloat16 with its four projections, forward and backward, as a training step has it:
gradients of the weights and of the image's activations, none of the text. Prints how much the instructions
of the compiled program read and write, and what they are. What cuDNN moves within its kernel is not known.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from dspo_jax import cli
from dspo_jax.kernels import attention
from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models.transformer_blocks import Attention
from dspo_jax.parallel.mesh import make_mesh, replicated
from dspo_jax.planning import absent_gpu
from dspo_jax.planning.works import read_works

TOKENS = 77
# Positions of the image, heads, size of a head, width of the text.
CASES = {
    "SD1.5 64x64": (4096, 8, 40, 768),
    "SD1.5 32x32": (1024, 8, 80, 768),
    "SD1.5 16x16": (256, 8, 160, 768),
    "SD1.5 8x8": (64, 8, 160, 768),
    "SDXL 64x64": (4096, 10, 64, 2048),
    "SDXL 32x32": (1024, 20, 64, 2048),
}
ATTENTION_KERNELS = "__cudnn$fmha"
REARRANGED = ("transpose", "convert", "copy", "pad", "slice", "concatenate")


def lower_layer(device: Any, case: tuple[int, int, int, int], images: int) -> jax.stages.Lowered:
    """Lowers forward and backward of one layer, for a device of `absent_gpu.find_devices`."""
    queries, heads, size, width = case
    features = heads * size
    mesh = make_mesh({}, [device])
    layer = nnx.eval_shape(lambda: Attention(features, heads, size, context_features=width, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(layer)

    def both(params: Any, x: jax.Array, text: jax.Array, gradient: jax.Array) -> Any:
        out, backward = jax.vjp(lambda params, x: nnx.merge(graph, params)(x, text), params, x)
        return out, backward(gradient)

    def placed(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=replicated(mesh))

    image, text = placed((images, queries, features)), placed((images, TOKENS, width))
    params = jax.tree.map(lambda leaf: placed(leaf.shape), params)
    with absent_gpu.as_if_here(device):
        return absent_gpu.lower(jax.jit(on_mesh(both, mesh)), params, image, text, image)


def describe_instructions(text: str) -> str:
    """Counts the instructions and bytes of a compiled program, in a line."""
    found = read_works(text)

    def several(words: Sequence[str]) -> tuple[int, float]:
        works = [work for work in found if any(word in work.what for word in words)]
        return sum(work.times for work in works), sum(work.times * work.bytes for work in works) / 1e6

    instructions, everything = several([""])
    kernels, _ = several([ATTENTION_KERNELS])
    products, _ = several(["matmul"])
    moves, moved = several(REARRANGED)
    return (
        f"{everything:7.1f} MB by {instructions:2} instructions: {kernels} attention kernels, {products:2} "
        f"products, {moves:2} that rearrange or convert ({moved:.1f} MB)"
    )


def main(argv: Sequence[str]) -> None:
    """Prints a line for each case and backend."""
    del argv
    values = flags.FLAGS
    device = absent_gpu.find_devices(values.topology)[0]
    print(f"one {device.device_kind}, {values.images} images, jax {jax.__version__}")
    for name, case in CASES.items():
        for backend in ("plain", "cudnn"):
            os.environ[attention.VARIABLE] = backend
            program = absent_gpu.compile_lowered(lower_layer(device, case, values.images))
            memory: Any = program.memory_analysis()
            line = describe_instructions(program.as_text() or "")
            print(
                f"{name:<12}{backend:<6} {line}; temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    flags.DEFINE_string("topology", "h100", "The card, e.g. h100 or a100-40.")
    flags.DEFINE_integer("images", 4, "In the batch.", lower_bound=1)
    cli.run(main)
