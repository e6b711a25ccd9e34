"""Images a second of the emoji model, here and by diffusers in torch, in one run.

    python -m benchmarks.sample

Both draw the same prompts from the same noise with DDIM and guidance, batch after batch, and decode; the
first batch, which compiles, is timed by itself. Needs torch (the `test` extra).
"""

import time
from collections.abc import Sequence

import diffusers
import jax
import numpy as np
import torch
from absl import flags

from benchmarks import measuring
from dspo_jax import cli
from dspo_jax.parallel.mesh import use_cpu_cores
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.sampling.drawing import draw_batches
from dspo_jax.sampling.image_sampler import ImageRequest, initial_noise
from dspo_jax.sampling.rendering import Drawing, Rendering

PROMPT = "smiling face with sunglasses"


def ours(model: str, requests: Sequence[ImageRequest], rendering: Rendering) -> tuple:
    """Returns images [N, H, W, 3], and the seconds that each batch took."""
    pipe = load_pipeline(model)
    seconds, images = [], []
    started = time.perf_counter()
    for batch in draw_batches(pipe, requests, rendering):
        images += [image for _, image in batch]
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return np.stack(images), seconds


def theirs(model: str, requests: Sequence[ImageRequest], rendering: Rendering) -> tuple:
    """Returns the same by diffusers, on a device of the same kind."""
    device = measuring.torch_device(jax.default_backend())
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        model, torch_dtype=torch.float32, local_files_only=True
    )
    pipe.to(device)
    pipe.scheduler = diffusers.DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    shape, batch_size = rendering.latent_shape(load_pipeline(model)), rendering.batch_size
    noise = np.array(initial_noise(requests, shape)).transpose(0, 3, 1, 2)
    seconds, images = [], []
    for start in range(0, len(requests), batch_size):
        started = time.perf_counter()
        part = requests[start : start + batch_size]
        drawn = pipe(
            [request.prompt for request in part],
            latents=torch.tensor(noise[start : start + batch_size], device=device),
            num_inference_steps=rendering.drawing.steps,
            guidance_scale=rendering.drawing.guidance_scale,
            height=shape[0] * pipe.vae_scale_factor,
            width=shape[1] * pipe.vae_scale_factor,
            output_type="np",
        ).images
        images += list((drawn * 255).round().astype(np.uint8))
        seconds.append(time.perf_counter() - started)
    return np.stack(images), seconds


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    del argv
    use_cpu_cores()
    values = flags.FLAGS
    model, batch_size = values.model, values.batch_size
    drawing = Drawing(steps=values.steps, guidance_scale=4.0)
    rendering = Rendering(drawing, batch_size=batch_size, compute_dtype="float32")
    requests = [ImageRequest(PROMPT, i, 0) for i in range(batch_size * (values.batches + 1))]
    print(
        f"{model}: batches of {batch_size}, {values.steps} steps of DDIM, "
        f"{jax.device_count()} {jax.default_backend()} device(s)"
    )
    results = {}
    for name, draw in (("dspo_jax", ours), ("diffusers, torch", theirs)):
        images, seconds = draw(model, requests, rendering)
        speed = batch_size * len(seconds[1:]) / sum(seconds[1:])
        results[name] = images, speed
        print(f"{name:<18}{speed:8.2f} images/s; the first batch {seconds[0]:.1f} s", flush=True)
    (a, fast), (b, slow) = results.values()
    difference = np.abs(a.astype(int) - b).mean()
    print(f"ratio {fast / slow:.2f}; mean difference of the images {difference:.3f} of 255 levels")


if __name__ == "__main__":
    flags.DEFINE_string("model", "examples/emoji/model", "A diffusers folder.")
    flags.DEFINE_integer("batch_size", 16, "Images in a batch.")
    flags.DEFINE_integer("batches", 4, "Timed batches, after the first.")
    flags.DEFINE_integer("steps", 25, "DDIM steps.")
    cli.run(main)
