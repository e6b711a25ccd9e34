"""Settings of drawing latents and of rendering them as image files, as frozen values."""

import dataclasses
import math
from pathlib import Path

import jax

from dspo_jax import samplers, spelling
from dspo_jax.errors import UserError
from dspo_jax.models.model import COMPUTE_DTYPES
from dspo_jax.pipelines.loading import Adapted, load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.same_kind import find_fault, have_same_weights

FORMATS = ("png", "webp")


@dataclasses.dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance of Stability's Stable Diffusion 3.5 medium, as diffusers computes it.

    At calls i of the network with start * n < i < stop * n, of n, scale * (v(prompt) - v(prompt, without the
    layers)) is added to what guidance gives.

    Attributes:
      layers: numbers of the denoiser's blocks, from 0; Stability names 7, 8 and 9.
      scale, start, stop: the defaults are diffusers'.
    """

    layers: tuple[int, ...]
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def __post_init__(self) -> None:
        """Refuses what is no such guidance.

        Raises:
          UserError: by the flag of the commands.
        """
        if not math.isfinite(self.scale):
            raise UserError(f"--skip_layer_scale={self.scale}: must be a finite number")
        if not 0 <= self.start <= self.stop <= 1:
            raise UserError(
                f"--skip_layer_start={self.start:g} --skip_layer_stop={self.stop:g}: must be shares of the "
                "calls between 0 and 1, the first not above the second"
            )

    def calls(self, count: int) -> list[int]:
        """Returns the numbers of those calls of the network, of so many, that have the guidance."""
        return [call for call in range(count) if self.start * count < call < self.stop * count]

    def check(self, pipe: Pipeline, count: int) -> None:
        """Refuses a model without the layers, and a sampler of so many calls that none has the guidance.

        Raises:
          UserError: by the flag of the commands.
        """
        flag = f"--skip_layers={','.join(map(str, self.layers))}"
        blocks = pipe.networks[pipe.denoiser].num_blocks
        if not blocks:
            raise UserError(f"{flag}: its {pipe.denoiser} has no blocks that could be skipped; leave it out")
        if not all(0 <= layer < blocks for layer in self.layers):
            raise UserError(f"{flag}: its {pipe.denoiser} has blocks 0 to {blocks - 1}; name some of these")
        if not self.calls(count):
            raise UserError(
                f"{flag}: of {count} calls of the network none lies between the shares --skip_layer_start="
                f"{self.start:g} and --skip_layer_stop={self.stop:g}; take more --steps, or a later stop"
            )


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Settings of sampling, from noise to latents.

    Attributes:
      sampler: one of `samplers.SAMPLERS`; None is the one that suits most uses of the model's process, "ddim"
        or, of rectified flow, "flow_euler".
      steps: of the sampler, each one pass of the UNet over the batch, or with guidance over twice the batch.
      guidance_scale: s in uncond + s (cond - uncond). At 1 or less there is no guidance, and the prompt alone
        is run, as in diffusers' pipelines.
      guidance_interval: smallest and largest timestep that is guided (Kynkäänniemi et al. 2024,
        arXiv:2404.07724, whose interval is of noise levels); at the others the scale is 1.
      guidance_rescale: from 0 to 1, how far the guided prediction takes the standard deviation of the one
        under the prompt (Lin et al. 2023, arXiv 2305.08891, Eq. 15-16); 0 leaves it as guided.
      skip_layer_guidance: see `SkipLayers`; None is none.
      negative_prompt: what the unconditional half is given. None is the empty text, but zeros in place of its
        states for an SDXL whose model_index.json says `force_zeros_for_empty_prompt`, as in diffusers.
      strength: of editing an image, in (0, 1]: the share of the steps that is taken, from the image with the
        noise of the first of them (SDEdit, Meng et al. 2022, as in diffusers' image-to-image pipelines).
      max_chunks: longest prompt, in chunks of 75 tokens. None is what a run was trained with, or 1, which
        cuts longer prompts, of a diffusers folder.
      clip_skip: see `Pipeline`; None in the same way.
      max_sequence_length: see `Pipeline`; None in the same way, of a folder of Stable Diffusion 3 256.
      eta: of samplers "ddim" and "flow_ancestral", from 0, where they are deterministic, to 1, where each
        step adds as much noise as "ddpm"; of "flow_grpo" its a.
    """

    sampler: str | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    guidance_interval: tuple[int, int] = (0, 1000)
    guidance_rescale: float = 0.0
    skip_layer_guidance: SkipLayers | None = None
    negative_prompt: str | None = None
    strength: float = 1.0
    eta: float = 0.0
    max_chunks: int | None = None
    clip_skip: int | None = None
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        """Refuses what no model can draw with.

        Raises:
          UserError: by the flag of the commands.
        """
        if self.sampler is not None and self.sampler not in samplers.SAMPLERS:
            raise UserError(spelling.unknown("--sampler", self.sampler, samplers.SAMPLERS))
        samplers.check_eta(self.sampler, self.eta)
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"--guidance_scale={self.guidance_scale}: must be a finite number")
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"--guidance_rescale={self.guidance_rescale}: must be between 0 and 1")
        first, last = self.guidance_interval
        if first > last:
            raise UserError(f"--guidance_interval={first},{last}: the first must not be above the last")
        if self.skip_layer_guidance is not None and self.guidance_scale <= 1:
            raise UserError(
                "--skip_layers: is a part of guidance, of which there is none at --guidance_scale="
                f"{self.guidance_scale:g}; give a scale above 1"
            )

    def load(self, model: str | Path | Adapted) -> Pipeline:
        """Reads a model whose prompts are encoded so; arguments and errors as `load_pipeline`."""
        return load_pipeline(
            model,
            max_chunks=self.max_chunks,
            clip_skip=self.clip_skip,
            max_sequence_length=self.max_sequence_length,
        )

    def choose_sampler(self, pipe: Pipeline) -> str:
        """Returns the name of the sampler for a model."""
        return self.sampler or samplers.samplers_of(pipe.schedule)[0]

    def suited_to(self, pipe: Pipeline) -> "Drawing":
        """Returns the settings with the sampler for a model by name."""
        return dataclasses.replace(self, sampler=self.choose_sampler(pipe))

    def make_sampler(self, pipe: Pipeline) -> samplers.Sampler:
        """Makes the sampler for a model.

        Raises:
          UserError: it reverses another process, or does not do what the model's scheduler config asks for;
            or the model has no such layers as are skipped, or they would be skipped in no step.
        """
        sampler = samplers.make_sampler(
            self.choose_sampler(pipe),
            pipe.schedule,
            pipe.scheduler_config,
            self.steps,
            strength=self.strength,
            eta=self.eta,
        )
        if self.skip_layer_guidance is not None:
            self.skip_layer_guidance.check(pipe, len(sampler.timesteps))
        return sampler


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Settings of rendering, from prompts to image files, without the models, prompts and seeds.

    Attributes:
      drawing: from noise to latents.
      size: height and width in pixels; None is what the model was made for.
      batch_size: images in one call, over the devices of a process; filled up to a multiple of them.
      compute_dtype: of UNet and text encoders, one of `COMPUTE_DTYPES`; None is bfloat16 on an accelerator,
        else float32. The VAE is float32.
      image_format: one of `FORMATS`; webp without loss.
      vae_tile, preview_vae: `tile` and `preview` of `decoding.Decoder`.
      optimize_noise: a reward that the initial noise of each image is optimised for (DOODL), as
        `load_differentiable` takes it; "" leaves it as drawn.
      optimize_steps: updates of the noise.
      rewards_folder: holds the reward's weights.
      negative_model: a model of the same kind, as `Drawing.load` takes it, whose denoiser predicts the
        unconditional half of guidance (Diffusion-NPO); None is the model itself.
    """

    drawing: Drawing = Drawing()
    size: tuple[int, int] | None = None
    batch_size: int = 16
    compute_dtype: str | None = None
    image_format: str = "png"
    vae_tile: int = 1024
    preview_vae: str | None = None
    optimize_noise: str = ""
    optimize_steps: int = 50
    rewards_folder: str = "rewards"
    negative_model: str | None = None

    def __post_init__(self) -> None:
        """Refuses what no model can render with.

        Raises:
          UserError: by the flag of the commands.
        """
        if self.batch_size < 1:
            raise UserError(f"--batch_size={self.batch_size}: must be at least 1")
        if self.vae_tile < 0:
            raise UserError(f"--vae_tile={self.vae_tile}: must be 0 (never) or a side in pixels")
        if self.optimize_steps < 1:
            raise UserError(f"--optimize_steps={self.optimize_steps}: must be at least 1")
        if self.image_format not in FORMATS:
            raise UserError(spelling.unknown("--format", self.image_format, FORMATS))
        if self.compute_dtype not in (None, *COMPUTE_DTYPES):
            raise UserError(spelling.unknown("--compute_dtype", self.compute_dtype, COMPUTE_DTYPES))

        if self.negative_model and self.drawing.guidance_scale <= 1:
            raise UserError(
                f"--negative_model={self.negative_model}: is a half of guidance, and --guidance_scale="
                f"{self.drawing.guidance_scale:g} has none; give a scale above 1"
            )
        if self.negative_model and self.optimize_noise:
            raise UserError(
                f"--negative_model={self.negative_model}: does not go with --optimize_noise; give one of them"
            )

    def load_negative(self, pipe: Pipeline) -> Pipeline | None:
        """Opens the negative model for a model, or returns None where there is none.

        Raises:
          UserError, FileNotFoundError: it is missing, of another kind, or has text encoders of its own.
        """
        if self.negative_model is None:
            return None
        flag = f"--negative_model={self.negative_model}"
        try:
            other = self.drawing.load(self.negative_model)
        except (UserError, FileNotFoundError) as error:
            raise type(error)(f"{flag}: {error}") from error
        fault = find_fault(pipe, other, f"--model={pipe.path}")
        for name in pipe.components:
            if fault is None and name != pipe.denoiser and not have_same_weights(pipe, other, name):
                fault = f"its {name} has other weights, and only its {pipe.denoiser} would be used"
        if fault:
            raise UserError(f"{flag}: {fault}; name a model of the same kind, such as an npo run of it")
        return other

    def choose_dtype(self) -> str:
        """Returns the compute dtype on the devices that are here."""
        if self.compute_dtype:
            return self.compute_dtype
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def latent_shape(self, pipe: Pipeline) -> tuple[int, int, int]:
        """Returns shape [h, w, C] of the latents of one image of a model.

        Raises:
          UserError: the VAE cannot make images of this size.
        """
        if self.size is None:
            return *pipe.latent_size, pipe.latent_channels
        multiple = pipe.side_multiple
        for name, pixels in zip(("height", "width"), self.size, strict=True):
            if pixels < multiple or pixels % multiple:
                raise UserError(
                    f"--{name}={pixels}: must be a positive multiple of {multiple} for this model"
                )
        height, width = (pixels // pipe.vae_scale_factor for pixels in self.size)
        return height, width, pipe.latent_channels
