"""Whole pipelines, tiny and of random weights, against diffusers': text to image and image to image."""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tiny_model import random_params, write_model
from tiny_run import make_config

from dspo_jax.images.resize import Crop
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.sampling.image_sampler import ImageRequest, ImageSampler, initial_noise
from dspo_jax.sampling.rendering import Drawing, Rendering
from dspo_jax.training.losses.preference import draw_noise
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import parse
from dspo_jax.weights.components import write_params

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

REQUESTS = [ImageRequest("a red heart", 0, 3), ImageRequest("b", 1, 3)]
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
}
# Of diffusers' schedulers, which make NumPy arrays of torch tensors.
pytestmark = [
    pytest.mark.ci,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

OTHER_FAMILIES = [pytest.param(name, marks=pytest.mark.slow) for name in ("sd21", "sdxl")]


@pytest.fixture(scope="module", params=["sd15", *OTHER_FAMILIES])
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / request.param, family=request.param)


def load_theirs(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs(folder):
    return load_theirs(folder)


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)])
def sdxl(request, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("models") / "sdxl", family="sdxl")
    index = folder / "model_index.json"
    content = json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": request.param}
    index.write_text(json.dumps(content))
    return folder, load_theirs(folder)


def to_torch(array):
    return torch.tensor(np.asarray(array).transpose(0, 3, 1, 2).copy())


def draw_theirs(theirs, folder, noise, requests=REQUESTS, **arguments):
    """Latents [B, C, h, w] of diffusers' pipeline with DDIM of five steps."""
    theirs.scheduler = SCHEDULERS["ddim"].from_pretrained(folder, subfolder="scheduler")
    return theirs(
        [request.prompt for request in requests],
        latents=to_torch(noise),
        num_inference_steps=5,
        height=16,
        width=16,
        output_type="latent",
        **arguments,
    ).images


def assert_close(ours, theirs, tolerance=1e-4):
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_text_to_image(folder, theirs, sampler, size):
    height, width = size
    noise = initial_noise(REQUESTS, (height // 4, width // 4, 4))
    # The folder's file is of another class, where ours takes this for granted.
    changes = {"skip_prk_steps": True} if sampler == "pndm" else {}
    theirs.scheduler = SCHEDULERS[sampler].from_pretrained(folder, subfolder="scheduler", **changes)
    expected = theirs(
        [request.prompt for request in REQUESTS],
        latents=to_torch(noise),  # it applies the scheduler's first scale
        num_inference_steps=5,
        guidance_scale=3.0,
        height=height,
        width=width,
        output_type="latent",
    ).images
    drawing = Drawing(sampler=sampler, steps=5, guidance_scale=3.0)
    assert_close(ImageSampler(load_pipeline(folder), drawing).sample_latents(REQUESTS, noise), expected)


def test_the_noise_of_eta_depends_on_seed_prompt_and_step_only(folder, theirs, monkeypatch):
    noise, steps = initial_noise(REQUESTS, (4, 4, 4)), iter(range(1, 6))

    def step_noise(*_, **__):
        i = next(steps)
        keys = (
            jax.random.fold_in(jax.random.key(request.seed), request.prompt_index) for request in REQUESTS
        )
        drawn = [jax.random.normal(jax.random.fold_in(key, i), noise.shape[1:]) for key in keys]
        return to_torch(np.stack(drawn))

    monkeypatch.setitem(SCHEDULERS["ddim"].step.__globals__, "randn_tensor", step_noise)
    expected = draw_theirs(theirs, folder, noise, guidance_scale=3.0, eta=0.7)
    assert list(steps) == []
    drawing = Drawing(steps=5, guidance_scale=3.0, eta=0.7)
    assert_close(ImageSampler(load_pipeline(folder), drawing).sample_latents(REQUESTS, noise), expected)


@pytest.fixture(scope="module")
def zero_snr(tmp_path_factory):
    """A tiny SDXL that predicts v with zero terminal SNR, as its scheduler_config.json says."""
    folder = tmp_path_factory.mktemp("models") / "zero_snr"
    write_model(folder, family="sdxl", prediction_type="v_prediction")
    file = folder / "scheduler" / "scheduler_config.json"
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder, load_theirs(folder)


@pytest.mark.parametrize(("sampler", "guidance_rescale"), [("ddim", 0.7), ("euler", 0.7), ("dpmpp_2m", 0.0)])
def test_zero_terminal_snr_and_guidance_rescale_of_sdxl(zero_snr, sampler, guidance_rescale):
    folder, theirs = zero_snr
    theirs.scheduler = SCHEDULERS[sampler].from_pretrained(folder, subfolder="scheduler")
    noise = initial_noise(REQUESTS, (4, 4, 4))
    expected = theirs(
        [request.prompt for request in REQUESTS],
        latents=to_torch(noise),
        num_inference_steps=5,
        guidance_scale=5.0,
        guidance_rescale=guidance_rescale,
        height=16,
        width=16,
        output_type="latent",
    ).images
    assert theirs.scheduler.timesteps[0] == 999
    drawing = Drawing(sampler=sampler, steps=5, guidance_scale=5.0, guidance_rescale=guidance_rescale)
    ours = ImageSampler(load_pipeline(folder), drawing).sample_latents(REQUESTS, noise)
    # Euler's latents begin at 4096 times the noise, where float32 has a number every 4.9e-4.
    assert_close(ours, expected, 1e-3 if sampler == "euler" else 1e-4)


def test_a_training_loss_at_zero_terminal_snr(zero_snr):
    """Diffusion-DPO at the last timestep, where the noised image is the noise and the target is -x_0."""
    folder, theirs = zero_snr
    changes = {"timesteps.first": 999, "timesteps.last": 999, "share_noise": False}
    changes |= {"objective.name": "diffusion_dpo", "objective.beta": 10.0, "caption_dropout": 0.0}
    pipe = load_pipeline(folder)
    task = make_task(parse(make_config(folder, folder, changes)), pipe)
    captions, crops = [request.prompt for request in REQUESTS], [[Crop(20, 24, 0, 2, 16, 16)] * 2] * 2
    moments = np.random.default_rng(0).normal(size=(2, 2, 4, 4, 8)).astype(np.float32)
    batch = jax.device_put(
        {
            **pipe.make_conditioning(captions, crops),
            **{"moments": moments, "index": np.arange(2, dtype=np.uint32)},
            **{"preference": np.ones(2, np.float32), "loser_won": np.zeros(2, bool)},
        }
    )
    reference = {name: pipe.read_params(name, "float32") for name in pipe.components}
    policy = {"unet": jax.tree.map(lambda leaf: 1.1 * leaf, reference["unet"])}
    key = jax.random.key(0)
    loss, _ = jax.jit(lambda policy: task.loss(policy, task, reference, batch, key))(policy)

    latents, noise, timesteps, _ = draw_noise(task.loss.draws, batch, key)
    assert (timesteps == 999).all()
    x0, noise = (to_torch(array.reshape(4, 4, 4, 4)) for array in (latents, noise))
    states, _, pooled, _ = theirs.encode_prompt(captions, do_classifier_free_guidance=False)
    conditions = {
        "encoder_hidden_states": states.repeat_interleave(2, 0),
        "added_cond_kwargs": {
            "text_embeds": pooled.repeat_interleave(2, 0),
            "time_ids": torch.tensor(np.reshape(crops, (4, 6))),
        },
    }

    def errors(unet):
        with torch.no_grad():
            return (unet(noise, 999, **conditions).sample + x0).square().mean((1, 2, 3)).reshape(2, 2)

    moved = copy.deepcopy(theirs.unet)
    for parameter in moved.parameters():
        parameter.data *= 1.1
    drift = errors(moved) - errors(theirs.unet)
    expected = -torch.nn.functional.logsigmoid(-10 / 2 * (drift[:, 0] - drift[:, 1])).mean()
    assert abs(expected - np.log(2)) > 1e-2
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0, 1.5])
def test_guidance_scales_of_one_and_less(folder, theirs, guidance_scale):
    """diffusers guides above 1 only; at 0 it draws with the prompt, as SD-Turbo's card asks for."""
    noise = initial_noise(REQUESTS, (4, 4, 4))
    expected = draw_theirs(theirs, folder, noise, guidance_scale=guidance_scale)
    drawing = Drawing(steps=5, guidance_scale=guidance_scale)
    ours = ImageSampler(load_pipeline(folder), drawing).sample_latents(REQUESTS, noise)
    assert_close(ours, expected)
    others = [dataclasses.replace(request, prompt="c") for request in REQUESTS]
    unlike = draw_theirs(theirs, folder, noise, others, guidance_scale=guidance_scale)
    assert (unlike - expected).abs().max() > 1e-3


@pytest.fixture(scope="module")
def disliked(folder, tmp_path_factory):
    """The model with other weights in its UNet."""
    other = shutil.copytree(folder, tmp_path_factory.mktemp("disliked") / "npo")
    architecture = load_pipeline(folder).networks["unet"]
    params = random_params(architecture, np.random.default_rng(9))
    write_params(other / "unet", architecture, params)
    return other


def test_a_negative_model_is_the_other_half_of_guidance(folder, theirs, disliked, monkeypatch):
    """As Diffusion-NPO draws in diffusers: the first half of its batch is the other UNet's."""
    noise = initial_noise(REQUESTS, (4, 4, 4))
    ours_alone = draw_theirs(theirs, folder, noise, guidance_scale=3.0)
    other, forward = load_theirs(disliked).unet, theirs.unet.forward

    def both(sample, t, encoder_hidden_states, added_cond_kwargs=None, **options):
        halves = []
        for i, unet in enumerate((other, forward)):
            more = {name: each.chunk(2)[i] for name, each in (added_cond_kwargs or {}).items()}
            states = encoder_hidden_states.chunk(2)[i]
            (half,) = unet(sample.chunk(2)[i], t, states, added_cond_kwargs=more or None, **options)
            halves.append(half)
        return (torch.cat(halves),)

    monkeypatch.setattr(theirs.unet, "forward", both)
    expected = draw_theirs(theirs, folder, noise, guidance_scale=3.0)
    assert (ours_alone - expected).abs().max() > 1e-2
    pipe = load_pipeline(folder)
    rendering = Rendering(Drawing(steps=5, guidance_scale=3.0), negative_model=str(disliked))
    sampler = ImageSampler(pipe, rendering.drawing, negative=rendering.load_negative(pipe))
    assert_close(sampler.sample_latents(REQUESTS, noise), expected)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_image_to_image(folder, theirs, sampler, strength, monkeypatch):
    edit = diffusers.AutoPipelineForImage2Image.from_pipe(theirs)
    edit.scheduler = SCHEDULERS[sampler].from_pretrained(folder, subfolder="scheduler")
    edit.set_progress_bar_config(disable=True)
    noise = initial_noise(REQUESTS, (4, 4, 4))
    image = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    module = type(edit).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: to_torch(noise))
    expected = edit(
        [request.prompt for request in REQUESTS],
        image=to_torch(image),  # four channels are taken for latents
        strength=strength,
        num_inference_steps=8,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    drawing = Drawing(sampler=sampler, steps=8, guidance_scale=3.0, strength=strength)
    ours = ImageSampler(load_pipeline(folder), drawing).sample_latents(REQUESTS, noise, image)
    assert_close(ours, expected)


@pytest.mark.parametrize(
    ("negative_prompt", "guidance_scale"), [(None, 3.0), ("", 3.0), ("ugly", 3.0), (None, 0.0)]
)
def test_empty_prompts_of_sdxl(sdxl, negative_prompt, guidance_scale):
    """diffusers encodes an empty prompt; zeros stand for a negative prompt that is not given."""
    folder, theirs = sdxl
    requests = [ImageRequest("", 0, 3), ImageRequest("a red heart", 1, 3)]
    noise = initial_noise(requests, (4, 4, 4))
    given = None if negative_prompt is None else [negative_prompt] * len(requests)
    expected = draw_theirs(
        theirs, folder, noise, requests, guidance_scale=guidance_scale, negative_prompt=given
    )
    drawing = Drawing(steps=5, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    assert_close(ImageSampler(load_pipeline(folder), drawing).sample_latents(requests, noise), expected)
