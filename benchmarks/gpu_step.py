"""Programs of a run, compiled for an NVIDIA GPU that is not here: the step, and what is done between steps.

    python -m benchmarks.gpu_step --config configs/sd15_dspo.py --published sd15 --topology h100 --pairs 2
    python -m benchmarks.gpu_step --config configs/own_pairs_sdxl_lora.py --published sdxl --part judge

Needs `jax[cuda12]` and no GPU, and many minutes for a full-size model. Prints the memory of the program, its
attention kernels and what its instructions read and write; no time, which nobody knows without a GPU.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import absent_gpu
from dspo_jax import cli
from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.monitoring.devices import in_units
from dspo_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from dspo_jax.pipelines import published
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.training.costs import abstract_batch
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_adapters, make_state, make_task
from dspo_jax.training.step import compile_step


def lower_step(config: ConfigDict, pipe: Pipeline, size: int, mesh: Mesh) -> jax.stages.Lowered:
    """Returns the step that `train` compiles, lowered for CUDA; within `absent_gpu.as_if_here`.

    Args:
      config: of the run.
      pipe: the model, whose weights are not read.
      size: side of the images in pixels.
      mesh: devices of `absent_gpu.find_devices`.
    """
    task = make_task(parse(config), pipe)
    state, reference = make_state(task, mesh, make_adapters(parse(config), pipe), abstract=True)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    batch = abstract_batch(task, 2, (size, size), config.batch_size, mesh)
    return absent_gpu.lower(compile_step(state), state, reference, batch, key)


def lower_judge(config: ConfigDict, pipe: Pipeline, size: int, mesh: Mesh) -> jax.stages.Lowered:
    """Returns the networks as the validation runs them for a batch; arguments as of `lower_step`."""
    dtype, batch = config.compute_dtype, config.validation.batch_size
    params = {
        name: abstract(pipe.networks[name].abstract_params(), replicated(mesh), dtype)
        for name in pipe.components
    }
    side, split = size // pipe.vae_scale_factor, batch_sharding(mesh)
    conditioning = {
        name: jax.ShapeDtypeStruct((batch, *leaf.shape), leaf.dtype, sharding=split)
        for name, leaf in pipe.conditioning_shapes(2).items()
    }
    noisy = jax.ShapeDtypeStruct((batch, 2, side, side, pipe.latent_channels), "float32", sharding=split)
    timesteps = jax.ShapeDtypeStruct((batch, 2), "int32", sharding=split)

    def predict(params: Any, noisy: Any, timesteps: Any, conditioning: Any) -> Any:
        return pipe.predict_pairs(params, noisy.astype(dtype), timesteps, conditioning)

    return absent_gpu.lower(jax.jit(on_mesh(predict, mesh)), params, noisy, timesteps, conditioning)


def lower_decode(config: ConfigDict, pipe: Pipeline, size: int, mesh: Mesh) -> jax.stages.Lowered:
    """Returns the VAE's decoder for one picture, as samples are decoded; arguments as of `lower_step`."""
    del config
    whole, side = replicated(mesh), size // pipe.vae_scale_factor
    params = {"vae": abstract(pipe.networks["vae"].abstract_params(), whole, "float32")}
    latents = jax.ShapeDtypeStruct((1, side, side, pipe.latent_channels), "float32", sharding=whole)
    return absent_gpu.lower(jax.jit(on_mesh(pipe.decode, mesh)), params, latents)


def abstract(params: Any, sharding: Any, dtype: str) -> Any:
    """Returns the shapes of parameters in a dtype, where `sharding` puts them."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding), params)


PARTS = {"step": lower_step, "judge": lower_judge, "decode": lower_decode}


def main(argv: Sequence[str]) -> None:
    """Prints what the compiled program needs and holds."""
    del argv
    values, config = flags.FLAGS, flags.FLAGS.config
    device = absent_gpu.find_devices(values.topology)[0]
    pipe = published.architecture(values.published)
    if values.pairs:
        config.batch_size = config.validation.batch_size = values.pairs
        config.accumulation = 1
    with absent_gpu.as_if_here(device):
        lowered = PARTS[values.part](config, pipe, pipe.image_side, make_mesh({}, [device]))
    start = time.perf_counter()
    program = absent_gpu.compile_lowered(lowered)
    memory: Any = program.memory_analysis()
    what = {
        "step": f"{config.objective.name}, {config.batch_size} pairs in {config.accumulation} part(s)",
        "judge": f"held-out pairs, {config.validation.batch_size} in one call",
        "decode": "a picture's decoding",
    }
    print(f"{values.published}: {what[values.part]}, one {device.device_kind}")
    print(
        f"arguments {in_units(memory.argument_size_in_bytes)}, temporaries "
        f"{in_units(memory.temp_size_in_bytes)}; compiled in {time.perf_counter() - start:.0f} s"
    )
    found = absent_gpu.traffic(program.as_text() or "")
    print(f"{sum(size for _, size in found.values()) / 1e9:.1f} GB by instructions outside of loops:")
    for kind, (count, size) in sorted(found.items(), key=lambda item: -item[1][1]):
        print(f"  {kind:<40}{count:>6}{size / 1e9:>8.2f} GB")


if __name__ == "__main__":
    cli.define_config("The run.", "configs/sd15_dspo.py")
    flags.DEFINE_enum("published", "sd15", published.MODELS, "The model, without weights.")
    flags.DEFINE_enum("part", "step", tuple(PARTS), "What is compiled: also held-out pairs, or a picture.")
    flags.DEFINE_string("topology", "h100", "The card: h100 or a100.")
    flags.DEFINE_integer(
        "pairs", None, "In a batch that is not split (default: the recipe's).", lower_bound=1
    )
    cli.run(main)
