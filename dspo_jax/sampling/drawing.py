"""Draws prompts from models into a folder of images, and goes on where it was stopped."""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.images.decode import decode_image
from dspo_jax.images.image_files import BadRow
from dspo_jax.images.resize import prepare_image
from dspo_jax.monitoring.progress import Progress
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.sampling.decoding import Decoder
from dspo_jax.sampling.folder import claim_output, place_images, save_image, write_manifest, write_sheets
from dspo_jax.sampling.image_sampler import Drawing, ImageSampler, Job, initial_noise, refuse_non_finite
from dspo_jax.sampling.prompts import Prompt


def sample(
    models: Mapping[str, str | Path],
    prompts: Sequence[Prompt],
    out: Path,
    *,
    seeds: Sequence[int],
    drawing: Drawing,
    batch_size: int,
    size: tuple[int, int] | None = None,
    init_latents: np.ndarray | None = None,
    compute_dtype: str | None = None,
    image_format: str = "png",
    vae_tile: int = 0,
    preview_vae: str | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Draws every prompt with every seed from every model: what is not there yet.

    Args:
      models: heading of its columns -> model directory.
      prompts: rows of the contact sheet; those with an image are edited.
      out: gets a folder of images for each model, manifest.jsonl and contact_sheet.png.
      seeds: each a column under each model.
      drawing: how.
      batch_size: images in one call, over the devices of a process; filled up to a multiple of them.
      size: height and width in pixels; None is what the model was made for.
      init_latents: standard normal [prompts, h, w, C] to start from in place of noise of the seed.
      compute_dtype: of UNet and text encoders; None is bfloat16 on an accelerator, else float32.
      image_format: one of `sample_folder.FORMATS`; webp without loss.
      vae_tile, preview_vae: see `Decoder`.
      overwrite: whether images of other settings that are there may be deleted.

    Returns:
      The (first) contact sheet's path; None in other processes than the first.

    Raises:
      ValueError: a setting, or the content of `out`, is refused; a model draws what is not finite.
      FileNotFoundError: a model is missing.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size}: must be at least 1")
    if init_latents is not None and len(seeds) > 1:
        raise UserError(f"--seeds: {len(seeds)} of them, but --init_latents are those of one; give one seed")
    if compute_dtype is None:
        compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    pipes = {label: load_pipeline(path) for label, path in models.items()}
    sizes = {label: _latent_size(pipe, size) for label, pipe in pipes.items()}
    for label, shape in sizes.items():
        if init_latents is not None and init_latents.shape != (len(prompts), *shape):
            raise UserError(
                f"--init_latents: of shape {init_latents.shape}, but {label} needs {(len(prompts), *shape)}"
            )
    if init_latents is not None:
        with np.errstate(over="ignore"):
            init_latents = np.array(init_latents, np.float32)
        if not np.isfinite(init_latents).all():
            raise UserError(
                "--init_latents: holds numbers that are not finite in float32; give standard normal noise"
            )
    settings = {
        "models": [{"path": str(path), "step": pipes[label].step} for label, path in models.items()],
        "weights_sha256": [pipe.weights_digest() for pipe in pipes.values()],
        "prompts_sha256": _digest(prompts),
        "init_latents_sha256": None
        if init_latents is None
        else hashlib.sha256(init_latents.tobytes()).hexdigest(),
        **{key: getattr(drawing, key) for key in Drawing.__dataclass_fields__},
        "size": list(size) if size else None,
        "compute_dtype": compute_dtype,
        "format": image_format,
        "vae_tile": vae_tile,
        "preview_vae": preview_vae,
    }
    if processes.is_first():
        claim_output(out, settings, overwrite=overwrite)
    processes.wait_for_all("output folder claimed")
    jobs = [Job(prompt.text, i, seed) for i, prompt in enumerate(prompts) for seed in seeds]
    files = place_images(out, list(models), jobs, image_format)
    # Each process draws a part of the images by itself.
    mine = jobs[jax.process_index() :: jax.process_count()]
    with Progress("sample", len(mine) * len(models), active=processes.is_first()) as progress:
        done = 0
        for label, pipe in pipes.items():
            missing = [job for job in mine if not files[label][job].exists()]
            done += len(mine) - len(missing)
            progress.update(done)
            if not missing:
                continue
            files[label][missing[0]].parent.mkdir(parents=True, exist_ok=True)
            batches = draw_batches(
                pipe,
                missing,
                drawing,
                batch_size=batch_size,
                size=sizes[label],
                init_latents=init_latents,
                images=[prompt.image for prompt in prompts],
                compute_dtype=compute_dtype,
                vae_tile=vae_tile,
                preview_vae=preview_vae,
                model=models[label],
            )
            with ThreadPoolExecutor() as pool:  # to compress an image can take longer than to draw it
                saving: list[Future[None]] = []
                for batch in batches:
                    for saved in saving:
                        saved.result()
                    saving = [pool.submit(save_image, image, files[label][job]) for job, image in batch]
                    done += len(batch)
                    progress.update(done)
                for saved in saving:
                    saved.result()
    while not all(file.exists() for of_model in files.values() for file in of_model.values()):
        time.sleep(1.0)  # for the other processes
    if not processes.is_first():
        return None
    write_manifest(out, models, files, drawing)
    return write_sheets(out, prompts, seeds, files)


def draw_batches(
    pipe: Pipeline,
    jobs: Sequence[Job],
    drawing: Drawing,
    *,
    batch_size: int,
    size: tuple[int, int, int],
    compute_dtype: str,
    init_latents: np.ndarray | None = None,
    images: Sequence[Path | None] = (),
    vae_tile: int = 0,
    preview_vae: str | None = None,
    model: str | Path | None = None,
) -> Iterator[list[tuple[Job, np.ndarray]]]:
    """Yields every job with its image [H, W, 3] uint8, a batch at a time, from all devices of this process.

    The last batch is filled up, so that nothing is compiled twice. Arguments as for `sample`, but:

    Args:
      size: [h, w, C] of the latents.
      images: by number of the prompt, the file to start from, or None. All prompts have one, or none has.
      model: what an error calls the model; None is the folder that its networks come from.

    Raises:
      ValueError: a picture is not finite (NaN or infinite numbers), or a setting is refused.
    """
    devices = jax.local_devices()
    mesh = make_mesh({"data": len(devices)}, devices)
    batch_size = math.ceil(batch_size / len(devices)) * len(devices)
    sampler = ImageSampler(pipe, drawing, compute_dtype=compute_dtype, mesh=mesh)
    decoder = Decoder(pipe, mesh, tile=vae_tile, preview=preview_vae)
    encode = None
    if any(images):
        vae = {"vae": pipe.read_params("vae", "float32")}
        encode = jax.jit(lambda pixels: pipe.encode_moments(vae, pixels)[..., : size[-1]])
    for start in range(0, len(jobs), batch_size):
        part = list(jobs[start : start + batch_size])
        full = part + [part[-1]] * (batch_size - len(part))
        if init_latents is None:
            noise = np.asarray(initial_noise(full, size))
        else:
            noise = init_latents[[job.prompt_index for job in full]]
        before = None
        if encode is not None:
            pixels = [_read_image(images[job.prompt_index], size, pipe.vae_scale_factor) for job in full]
            before = np.concatenate([encode(one[None]) for one in pixels])
        drawn, finite = decoder(sampler.sample_latents(full, noise, before))
        refuse_non_finite(model or pipe.path, part, finite[: len(part)])
        yield list(zip(part, drawn[: len(part)], strict=True))


def _latent_size(pipe: Pipeline, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """[h, w, C] of latents of images of `size` (height, width)."""
    if size is None:
        return *pipe.latent_size, pipe.latent_channels
    multiple = pipe.vae_scale_factor
    for name, pixels in zip(("height", "width"), size, strict=True):
        if pixels < multiple or pixels % multiple:
            raise UserError(f"--{name}={pixels}: must be a positive multiple of {multiple} for this model")
    height, width = (pixels // pipe.vae_scale_factor for pixels in size)
    return height, width, pipe.latent_channels


def _digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of prompts and input images, the latter by path and size."""
    rows = [(p.text, p.image and [str(p.image), p.image.stat().st_size]) for p in prompts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read_image(path: Path | None, size: tuple[int, int, int], scale: int) -> np.ndarray:
    """The picture to start from, covering the size and cropped to it: [H, W, 3] in [-1, 1]."""
    assert path is not None
    try:
        image = decode_image(path)
    except BadRow as problem:
        raise UserError(f"{path}: {problem}") from problem
    pixels, _ = prepare_image(image, (size[0] * scale, size[1] * scale))
    return pixels.astype(np.float32) / 127.5 - 1
