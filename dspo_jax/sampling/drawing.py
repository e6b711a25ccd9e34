"""Draws prompts from models into a folder of images, and goes on where it was stopped."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, UInt8
from PIL import Image

from dspo_jax.errors import UserError
from dspo_jax.images.decode import decode_image
from dspo_jax.images.image_files import BadRow
from dspo_jax.images.resize import prepare_image
from dspo_jax.monitoring.progress import Progress
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.pipelines.loading import Adapted
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.same_kind import weights_digest
from dspo_jax.sampling.decoding import Decoder, refuse_non_finite
from dspo_jax.sampling.folder import (
    claim_output,
    note_rewards,
    place_images,
    save_image,
    write_manifest,
    write_sheets,
)
from dspo_jax.sampling.image_sampler import ImageRequest, ImageSampler, initial_noise
from dspo_jax.sampling.noise_optimizer import NoiseOptimizer
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Rendering

_TEXT = ("max_chunks", "clip_skip", "max_sequence_length")  # noted by model, as each run has its own


def sample(
    models: Mapping[str, str | Path | Adapted],
    prompts: Sequence[Prompt],
    out: Path,
    rendering: Rendering,
    *,
    seeds: Sequence[int],
    init_latents: np.ndarray | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Draws every prompt with every seed from every model, except images that are there already.

    Args:
      models: heading of its columns -> model directory, as `load_pipeline` takes it.
      prompts: rows of the contact sheet; those with an image are edited.
      out: gets a folder of images for each model, manifest.jsonl and contact_sheet.png.
      rendering: how images are drawn and written.
      seeds: each a column under each model.
      init_latents: standard normal [prompts, h, w, C] to start from in place of noise of the seed; an error
        names the file of a `np.memmap`.
      overwrite: whether images of other settings that are there may be deleted.

    Returns:
      The (first) contact sheet's path; None in other processes than the first.

    Raises:
      UserError: a setting, or the content of `out`, is refused; a model draws what is not finite.
      FileNotFoundError: a model is missing.
    """
    if rendering.optimize_noise and any(prompt.image for prompt in prompts):
        raise UserError(
            "--optimize_noise: an image that is edited does not come from noise alone; give no image"
        )
    if init_latents is not None and len(seeds) > 1:
        raise UserError(f"--seeds: {len(seeds)} of them, but --init_latents are those of one; give one seed")
    pipes = {label: rendering.drawing.load(path) for label, path in models.items()}
    for label, pipe in pipes.items():
        rendering = dataclasses.replace(rendering, drawing=rendering.drawing.suited_to(pipe))
        try:
            rendering.drawing.make_sampler(pipe)
        except UserError as error:
            raise UserError(f"{label}: {error}") from error
    shapes = {label: (len(prompts), *rendering.latent_shape(pipe)) for label, pipe in pipes.items()}
    negatives = [rendering.load_negative(pipe) for pipe in pipes.values()]
    if init_latents is not None:
        init_latents = _read_latents(init_latents, shapes)
    if processes.is_first():
        settings = _settings(models, pipes, prompts, rendering, init_latents)
        negative = negatives[0] if negatives else None
        settings["negative_model"] = negative and {"path": rendering.negative_model, "step": negative.step}
        settings["negative_sha256"] = negative and weights_digest(negative)
        claim_output(out, settings, overwrite=overwrite)
    processes.wait_for_all("output folder claimed")
    requests = [ImageRequest(prompt.text, i, seed) for i, prompt in enumerate(prompts) for seed in seeds]
    files = place_images(out, list(models), requests, rendering.image_format)
    # Each process draws a part of the images by itself.
    mine = requests[jax.process_index() :: jax.process_count()]
    with Progress(
        "sample", len(mine) * len(models), first="compiling", active=processes.is_first()
    ) as progress:
        done = 0
        for label, pipe in pipes.items():
            missing = [request for request in mine if not files[label][request].exists()]
            done += len(mine) - len(missing)
            progress.update(done)
            if not missing:
                continue
            files[label][missing[0]].parent.mkdir(parents=True, exist_ok=True)
            optimizer = NoiseOptimizer(pipe, rendering, local_mesh()) if rendering.optimize_noise else None
            batches = draw_batches(
                pipe,
                missing,
                rendering,
                init_latents=init_latents,
                images=[prompt.image for prompt in prompts],
                model=models[label],
                optimizer=optimizer,
            )
            with ThreadPoolExecutor() as pool:  # to compress an image can take longer than to draw it
                saving: list[Future[None]] = []
                for batch in batches:
                    for saved in saving:
                        saved.result()
                    if optimizer is not None:
                        for request, _ in batch:
                            note_rewards(files[label][request], *optimizer.rewards[request])
                    saving = [
                        pool.submit(save_image, image, files[label][request]) for request, image in batch
                    ]
                    done += len(batch)
                    progress.update(done)
                for saved in saving:
                    saved.result()
    while not all(file.exists() for of_model in files.values() for file in of_model.values()):
        time.sleep(1.0)  # for the other processes
    if not processes.is_first():
        return None
    write_manifest(out, models, prompts, files, rendering)
    return write_sheets(out, prompts, seeds, files)


def _read_latents(
    latents: np.ndarray, shapes: Mapping[str, tuple[int, ...]]
) -> Float32[np.ndarray, "prompts h w C"]:
    """Returns the noise to start from in float32, if it has the shape that each model needs and is finite."""
    where = f"--init_latents={latents.filename}" if isinstance(latents, np.memmap) else "--init_latents"
    for label, shape in shapes.items():
        if latents.shape != shape:
            raise UserError(f"{where}: of shape {latents.shape}, but {label} needs {shape}")
    with np.errstate(over="ignore"):
        latents = np.array(latents, np.float32)
    if not np.isfinite(latents).all():
        raise UserError(f"{where}: holds numbers that are not finite in float32; give standard normal noise")
    return latents


def _settings(
    models: Mapping[str, str | Path | Adapted],
    pipes: Mapping[str, Pipeline],
    prompts: Sequence[Prompt],
    rendering: Rendering,
    init_latents: np.ndarray | None,
) -> dict[str, object]:
    """Returns the content of settings.json: images whose settings differ in a key are not of this run."""
    drawing = dataclasses.asdict(rendering.drawing)
    if drawing["skip_layer_guidance"] is None:  # which older folders do not name
        del drawing["skip_layer_guidance"]
    return {
        "models": [
            {"path": str(path), "step": pipes[label].step, **_text(pipes[label])}
            for label, path in models.items()
        ],
        "weights_sha256": [weights_digest(pipe) for pipe in pipes.values()],
        "prompts_sha256": _digest(prompts),
        "init_latents_sha256": None
        if init_latents is None
        else hashlib.sha256(init_latents.tobytes()).hexdigest(),
        **{key: value for key, value in drawing.items() if key not in _TEXT},
        "size": rendering.size,
        "compute_dtype": rendering.choose_dtype(),
        "format": rendering.image_format,
        "vae_tile": rendering.vae_tile,
        "preview_vae": rendering.preview_vae,
        "optimize_noise": rendering.optimize_noise,
        "optimize_steps": rendering.optimize_steps if rendering.optimize_noise else 0,
    }


def _text(pipe: Pipeline) -> dict[str, int | None]:
    """Returns how a model reads prompts where that is not the default, which older folders do not name."""
    defaults = dict(zip(_TEXT, (1, 1, pipe.family.conditioner.default_length), strict=True))
    return {key: value for key, value in pipe.text.items() if value != defaults[key]}


def draw(pipe: Pipeline, prompt: str, rendering: Rendering | None = None, *, seed: int = 0) -> Image.Image:
    """Draws one image, for a notebook.

    Args:
      pipe: the model.
      prompt: the text.
      rendering: how; the defaults of `Rendering` unless it is given.
      seed: of the noise.

    Raises:
      UserError: as `draw_batches`.
    """
    rendering = dataclasses.replace(rendering or Rendering(), batch_size=1)
    ((_, image),) = next(draw_batches(pipe, [ImageRequest(prompt, 0, seed)], rendering))
    return Image.fromarray(image)


def local_mesh() -> Mesh:
    """Returns a mesh that splits a batch over the devices of this process."""
    devices = jax.local_devices()
    return make_mesh({"data": len(devices)}, devices)


def draw_batches(
    pipe: Pipeline,
    requests: Sequence[ImageRequest],
    rendering: Rendering,
    *,
    init_latents: Float32[np.ndarray, "prompts h w C"] | None = None,
    images: Sequence[Path | None] = (),
    model: str | Path | Adapted | None = None,
    optimizer: NoiseOptimizer | None = None,
) -> Iterator[list[tuple[ImageRequest, UInt8[np.ndarray, "H W 3"]]]]:
    """Draws on all devices of this process; yields each batch of requests with images [H, W, 3] uint8.

    The last batch is filled up, so that nothing is compiled twice.

    Args:
      pipe: the model.
      requests: what to draw.
      rendering: how.
      init_latents: float32 [prompts, h, w, C] to start from in place of noise of the seed.
      images: by number of the prompt, the file to start from, or None. All prompts have one, or none has.
      model: what an error calls the model; None is the folder that its networks come from.
      optimizer: of the noise, where the rendering asks for it; made here unless it is given.

    Raises:
      UserError: a picture is not finite (NaN or infinite numbers), or a setting is refused.
    """
    mesh = local_mesh()
    batch_size = math.ceil(rendering.batch_size / mesh.size) * mesh.size
    if rendering.optimize_noise:  # an image that only fills up a batch would cost as much
        batch_size = min(batch_size, math.ceil(len(requests) / mesh.size) * mesh.size)
    shape = rendering.latent_shape(pipe)
    sampler = ImageSampler(
        pipe,
        rendering.drawing,
        compute_dtype=rendering.choose_dtype(),
        mesh=mesh,
        negative=rendering.load_negative(pipe),
    )
    decoder = Decoder(pipe, mesh, tile=rendering.vae_tile, preview=rendering.preview_vae)
    if rendering.optimize_noise and optimizer is None:
        optimizer = NoiseOptimizer(pipe, rendering, mesh)
    encode = None
    if any(images):
        vae = {"vae": pipe.read_params("vae", "float32")}
        encode = jax.jit(lambda pixels: pipe.encode_moments(vae, pixels)[..., : shape[-1]])
    for start in range(0, len(requests), batch_size):
        part = list(requests[start : start + batch_size])
        full = part + [part[-1]] * (batch_size - len(part))
        numbers = [request.prompt_index for request in full]
        noise = np.asarray(initial_noise(full, shape)) if init_latents is None else init_latents[numbers]
        if optimizer is not None:
            noise = optimizer(full, noise)
        before = None
        if encode is not None:
            pixels = [_read_image(images[number], shape, pipe.vae_scale_factor) for number in numbers]
            before = np.concatenate([encode(one[None]) for one in pixels])
        drawn, finite = decoder(sampler.sample_latents(full, noise, before))
        refuse_non_finite(model or pipe.path, part, finite[: len(part)])
        yield list(zip(part, drawn[: len(part)], strict=True))


def _digest(prompts: Sequence[Prompt]) -> str:
    """Returns SHA-256 of prompts and input images, the latter by path and size."""
    rows = [(p.text, p.image and [str(p.image), p.image.stat().st_size]) for p in prompts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read_image(path: Path | None, shape: tuple[int, int, int], scale: int) -> Float32[np.ndarray, "H W 3"]:
    """Returns the picture to start from, covering the size and cropped to it: [H, W, 3] in [-1, 1]."""
    assert path is not None
    try:
        image = decode_image(path)
    except BadRow as problem:
        raise UserError(f"{path}: {problem}") from problem
    pixels, _ = prepare_image(image, (shape[0] * scale, shape[1] * scale))
    return pixels.astype(np.float32) / 127.5 - 1
