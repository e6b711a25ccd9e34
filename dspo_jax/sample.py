"""Prompts to images: DDIM with classifier-free guidance, a contact sheet and a manifest.

    python -m dspo_jax.sample --model examples/emoji/model --model runs/emoji --prompts "red heart" --out out

Each model draws every prompt from the same initial noise, which depends on (seed, number of the prompt) only.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from PIL import Image, ImageDraw, ImageFont

from dspo_jax import cli, samplers
from dspo_jax.metrics import Progress
from dspo_jax.models import Params
from dspo_jax.pipeline import Pipeline, load_pipeline
from dspo_jax.sharding import batch_sharding, replicated

_LABEL_HEIGHT = 14
_MARGIN = 4


@dataclasses.dataclass(frozen=True)
class Job:
    """One image to draw."""

    prompt: str
    prompt_index: int
    seed: int


class Sampler:
    """Draws images with one model; compiled once for a batch size."""

    def __init__(
        self,
        pipe: Pipeline,
        *,
        steps: int,
        guidance_scale: float,
        negative_prompt: str = "",
        compute_dtype: str = "float32",
        mesh: Mesh | None = None,
    ):
        """Prepares the program.

        Args:
          pipe: the model.
          steps: DDIM steps, each one pass of the UNet over the batch twice (with and without the prompt).
          guidance_scale: s in uncond + s (cond - uncond); 1 is no guidance.
          negative_prompt: what the unconditional half is given.
          compute_dtype: of the UNet; what stands between its passes is float32.
          mesh: splits the batch over these devices, over all processes, which must then all call alike; None
            is one device.
        """
        self._pipe, self._mesh, self._dtype = pipe, mesh, compute_dtype
        negative = pipe.tokenize([negative_prompt])
        sampler = samplers.make_sampler("ddim", pipe.schedule, pipe.scheduler_config, steps)

        def draw(params: Any, tokens: jax.Array, latents: jax.Array) -> jax.Array:
            # Without and with the prompt side by side, so that both are on the device that holds the latents.
            both = jnp.stack([jnp.broadcast_to(negative, tokens.shape), tokens], axis=1)
            text = pipe.encode_text(params, both.reshape(-1, *tokens.shape[1:]))
            doubled = 2 * latents.shape[0]
            height, width = (side * pipe.vae_scale_factor for side in latents.shape[1:3])
            whole = jnp.asarray([[height, width, 0, 0, height, width]] * doubled)

            def predict(x: jax.Array, t: jax.Array) -> jax.Array:
                noisy = jnp.repeat(x, 2, axis=0).astype(compute_dtype)
                output = pipe.predict(params, noisy, jnp.full(doubled, t), text, whole).astype(jnp.float32)
                uncond, cond = jnp.moveaxis(output.reshape(-1, 2, *x.shape[1:]), 1, 0)
                return uncond + guidance_scale * (cond - uncond)

            return sampler.run(predict, sampler.start(latents))

        self._draw = jax.jit(draw, out_shardings=replicated(mesh) if mesh else None)

    @functools.cached_property
    def _stored_params(self) -> Params:
        components = ("unet", *self._pipe.text_encoders)
        return jax.device_put({name: self._pipe.read_params(name, self._dtype) for name in components})

    def sample_latents(
        self, prompts: Sequence[str], latents: jax.Array | np.ndarray, params: Params | None = None
    ) -> jax.Array:
        """Final latents [B, h, w, C] (UNet units, float32), which with a mesh every device holds whole.

        Args:
          prompts: B of them; with a mesh a multiple of the ways it splits a batch.
          latents: standard normal noise [B, h, w, C], with a mesh the same in every process.
          params: UNet and text encoders by component in the compute dtype; None is the model's own weights.
        """
        inputs: tuple[Any, ...] = (self._pipe.tokenize(prompts), latents)
        if self._mesh is not None:
            sharding = batch_sharding(self._mesh)
            whole = [np.asarray(array) for array in inputs]
            inputs = tuple(
                jax.make_array_from_callback(array.shape, sharding, array.__getitem__) for array in whole
            )
        return self._draw(self._stored_params if params is None else params, *inputs)

    def sample(self, prompts: Sequence[str], latents: jax.Array) -> np.ndarray:
        """Images [B, H, W, 3] uint8, drawn with the model's own weights."""
        return self._pipe.decode_pixels(self.sample_latents(prompts, latents))


def initial_latents(jobs: Sequence[Job], side: int, channels: int) -> jax.Array:
    """Standard normal noise [B, side, side, channels] that depends on a job's seed and prompt number only."""

    def draw(seed: jax.Array, prompt_index: jax.Array) -> jax.Array:
        return jax.random.normal(
            jax.random.fold_in(jax.random.key(seed), prompt_index), (side, side, channels)
        )

    return jax.vmap(draw)(
        jnp.asarray([job.seed for job in jobs]), jnp.asarray([job.prompt_index for job in jobs])
    )


def draw_jobs(
    sampler: Sampler, pipe: Pipeline, jobs: Sequence[Job], batch_size: int, label: str
) -> Iterator[tuple[Job, np.ndarray]]:
    """Yields every job with its image [H, W, 3] uint8. The last batch is filled up: nothing recompiles."""
    side = pipe.unet.config["sample_size"]
    with Progress(f"sample {label}", len(jobs)) as progress:
        for start in range(0, len(jobs), batch_size):
            part = list(jobs[start : start + batch_size])
            full = part + [part[-1]] * (batch_size - len(part))
            latents = initial_latents(full, side, pipe.latent_channels)
            images = sampler.sample([job.prompt for job in full], latents)
            progress.update(start + len(part))
            yield from zip(part, images[: len(part)], strict=True)


def read_prompts(text_or_file: str) -> list[str]:
    """A prompt, or the lines of a .txt file.

    Raises:
      FileNotFoundError: it ends in .txt and there is no such file.
      ValueError: no prompt.
    """
    path = Path(text_or_file)
    if path.suffix != ".txt":
        prompts = [text_or_file.strip()]
    elif path.is_file():
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        raise FileNotFoundError(f"--prompts={path}: no such file")
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"--prompts={text_or_file}: no prompt in it")
    return prompts


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[tuple[str, int]], scale: int = 1
) -> Image.Image:
    """Images in a grid, each row under its prompt, below headings.

    Args:
      rows: (prompt, images [H, W, 3] uint8) with the same number of images in each.
      columns: (heading, how many of the columns it stands over), from the left.
      scale: whole number that the images are enlarged by.
    """
    height, width = (scale * size for size in rows[0][1][0].shape[:2])
    count = len(rows[0][1])
    row_height = _LABEL_HEIGHT + height + _MARGIN
    gaps = _MARGIN * (count + 1) + _MARGIN * (len(columns) - 1)
    size = (count * width + gaps, _LABEL_HEIGHT + len(rows) * row_height + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    lefts, x = [], _MARGIN
    for heading, span in columns:
        draw.text((x, 0), heading, "black", font)
        for _ in range(span):
            lefts.append(x)
            x += width + _MARGIN
        x += _MARGIN
    for number, (prompt, images) in enumerate(rows):
        top = _LABEL_HEIGHT + number * row_height
        draw.text((_MARGIN, top), prompt, "dimgray", font)
        for left, image in zip(lefts, images, strict=True):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top + _LABEL_HEIGHT))
    return sheet


def sample(
    models: Mapping[str, str | Path],
    prompts: Sequence[str],
    out: Path,
    *,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    batch_size: int,
    negative_prompt: str = "",
) -> Path:
    """Draws every prompt with every seed from every model.

    Args:
      models: heading of its columns -> model directory.
      prompts: rows of the contact sheet.
      out: gets a folder of PNG files for each model, manifest.jsonl and contact_sheet.png.
      seeds: each a column under each model.
      steps, guidance_scale, negative_prompt: see `Sampler`.
      batch_size: images in one call.

    Returns:
      The contact sheet's path.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"--{name}={value}: must be at least 1")
    jobs = [Job(prompt, i, seed) for i, prompt in enumerate(prompts) for seed in seeds]
    images: dict[tuple[int, str, int], np.ndarray] = {}
    records = []
    for number, (label, path) in enumerate(models.items()):
        pipe = load_pipeline(path)
        sampler = Sampler(pipe, steps=steps, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
        folder = out / f"{number}-{Path(label).name}"
        folder.mkdir(parents=True, exist_ok=True)
        for job, image in draw_jobs(sampler, pipe, jobs, batch_size, label):
            file = folder / f"{job.prompt_index:04d}_{job.seed}.png"
            Image.fromarray(image).save(file)
            images[job.prompt_index, label, job.seed] = image
            records.append(
                {
                    "model": str(path),
                    "prompt": job.prompt,
                    "seed": job.seed,
                    "file": str(file.relative_to(out)),
                    "sampler": "ddim",
                    "steps": steps,
                    "guidance_scale": guidance_scale,
                }
            )
    with (out / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
        manifest.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    rows = [
        (prompt, [images[i, label, seed] for label in models for seed in seeds])
        for i, prompt in enumerate(prompts)
    ]
    side = rows[0][1][0].shape[0]
    sheet = contact_sheet(rows, [(label, len(seeds)) for label in models], scale=max(1, 128 // side))
    sheet.save(out / "contact_sheet.png")
    return out / "contact_sheet.png"


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    settings = flags.FLAGS
    seeds = [int(seed) for seed in settings.seeds]
    sheet = sample(
        {path: path for path in settings.model},
        read_prompts(settings.prompts),
        Path(settings.out),
        seeds=seeds,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        batch_size=settings.batch_size,
        negative_prompt=settings.negative_prompt,
    )
    print(f"{sheet}")


if __name__ == "__main__":
    flags.DEFINE_multi_string(
        "model", None, "A diffusers folder or a training workdir; may be repeated.", required=True
    )
    flags.DEFINE_string("prompts", None, "A prompt, or a .txt file with one a line.", required=True)
    flags.DEFINE_string("out", None, "Folder to write to.", required=True)
    flags.DEFINE_integer("steps", 50, "DDIM steps.")
    flags.DEFINE_float("guidance_scale", 7.5, "s in uncond + s (cond - uncond); 1 is no guidance.")
    flags.DEFINE_list("seeds", ["0"], "Seeds, separated by commas; one image each.")
    flags.DEFINE_integer("batch_size", 16, "Images drawn at a time.")
    flags.DEFINE_string("negative_prompt", "", "What to steer away from.")
    cli.run(main)
