"""Whole pipelines, tiny and of random weights, against diffusers': text to image and image to image."""

import numpy as np
import pytest
from tiny_model import write_model

from dspo_jax.image_sampler import Drawing, ImageSampler, Job, initial_noise
from dspo_jax.pipeline import load_pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

JOBS = [Job("a red heart", 0, 3), Job("b", 1, 3)]
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
}
# Of diffusers' schedulers, which make NumPy arrays of torch tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

OTHER_FAMILIES = [pytest.param(name, marks=pytest.mark.slow) for name in ("sd21", "sdxl")]


@pytest.fixture(scope="module", params=["sd15", *OTHER_FAMILIES])
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / request.param, family=request.param)


@pytest.fixture(scope="module")
def theirs(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def to_torch(array):
    return torch.tensor(np.asarray(array).transpose(0, 3, 1, 2).copy())


def assert_close(ours, theirs):
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_text_to_image(folder, theirs, sampler, size):
    height, width = size
    noise = initial_noise(JOBS, (height // 4, width // 4, 4))
    # The folder's file is of another class, where ours takes this for granted.
    changes = {"skip_prk_steps": True} if sampler == "pndm" else {}
    theirs.scheduler = SCHEDULERS[sampler].from_pretrained(folder, subfolder="scheduler", **changes)
    expected = theirs(
        [job.prompt for job in JOBS],
        latents=to_torch(noise),  # it applies the scheduler's first scale
        num_inference_steps=5,
        guidance_scale=3.0,
        height=height,
        width=width,
        output_type="latent",
    ).images
    drawing = Drawing(sampler=sampler, steps=5, guidance_scale=3.0)
    assert_close(ImageSampler(load_pipeline(folder), drawing).sample_latents(JOBS, noise), expected)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_image_to_image(folder, theirs, sampler, strength, monkeypatch):
    edit = diffusers.AutoPipelineForImage2Image.from_pipe(theirs)
    edit.scheduler = SCHEDULERS[sampler].from_pretrained(folder, subfolder="scheduler")
    edit.set_progress_bar_config(disable=True)
    noise = initial_noise(JOBS, (4, 4, 4))
    image = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    module = type(edit).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: to_torch(noise))
    expected = edit(
        [job.prompt for job in JOBS],
        image=to_torch(image),  # four channels are taken for latents
        strength=strength,
        num_inference_steps=8,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    drawing = Drawing(sampler=sampler, steps=8, guidance_scale=3.0, strength=strength)
    ours = ImageSampler(load_pipeline(folder), drawing).sample_latents(JOBS, noise, image)
    assert_close(ours, expected)
