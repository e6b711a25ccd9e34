"""Drawing with a model of rectified flow: its own sampler by default, and images from images."""

import json
import re

import numpy as np
import pytest
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.sampling.drawing import sample
from dspo_jax.sampling.guidance import GuidedDenoiser
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Drawing, Rendering, SkipLayers

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3_img2img as img2img  # noqa: E402
from tiny_sd3 import write_sd3  # noqa: E402
from torch_modules import assert_close, compile_fast, to_nchw, to_nhwc  # noqa: E402

CAPTION = "a red fox"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load_pipeline(write_sd3(tmp_path_factory.mktemp("sd3") / "model"))


@pytest.fixture(scope="module")
def draw_latents(pipe):
    """Draws [B, h, w, C] latents of one caption from noise, and perhaps an image's latents."""
    params = {name: pipe.read_params(name) for name in pipe.components}
    encode = compile_fast(lambda tokens: GuidedDenoiser(pipe, Drawing()).encode(params, tokens, (4, 4)))
    conditioning = encode(pipe.tokenize([CAPTION]))

    def draw(drawing, noise, before=None):
        sampler, denoiser = drawing.make_sampler(pipe), GuidedDenoiser(pipe, drawing)

        @compile_fast
        def run(params, conditioning):
            return sampler.run(
                lambda x, t: denoiser.predict(params, x, t, conditioning),
                sampler.start(noise, before),
                lambda i: np.zeros_like(noise),
            )

        return run({pipe.denoiser: params[pipe.denoiser]}, conditioning)

    return draw


def test_a_flow_is_drawn_with_its_own_sampler_unless_another_is_named(pipe, shallow_model, tmp_path):
    def draw(models, out, **how):
        rendering = Rendering(Drawing(steps=2, guidance_scale=1.0, **how), batch_size=1)
        sample(
            {str(model): model for model in models}, [Prompt(CAPTION)], tmp_path / out, rendering, seeds=[0]
        )

    draw([pipe.path], "flow")
    for file in ("settings.json", "manifest.jsonl"):
        recorded = json.loads((tmp_path / "flow" / file).read_text())
        assert recorded["sampler"] == "flow_euler"
        assert recorded.get("skip_layer_guidance") is None
        # As in folders from before it could be chosen, which go on.
        assert all("max_sequence_length" not in model for model in recorded.get("models", []))
    assert Drawing().suited_to(load_pipeline(shallow_model)).sampler == "ddim"
    draw([pipe.path], "flow", sampler="flow_euler")  # the same images, which are there
    for models, sampler in (
        ([pipe.path], "ddim"),
        ([shallow_model], "flow_euler"),
        ([shallow_model, pipe.path], None),
    ):
        fault = f"{models[-1]}: sampler '{sampler or 'ddim'}': does not reverse the process of this model; "
        with pytest.raises(UserError, match=rf"^{re.escape(fault)}these do: [^\n]*$"):
            draw(models, "refused", sampler=sampler)
    with pytest.raises(UserError, match=r"^eta = 0\.5: sampler 'flow_euler' has none; [^\n]*$"):
        draw([pipe.path], "refused", eta=0.5)
    assert not (tmp_path / "refused").exists()


@pytest.fixture(scope="module")
def theirs(pipe):
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(pipe.path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.ci
@each_row(("steps", "strength"), [(7, 0.3), (7, 0.6), (3, 1.0)])
def test_an_image_from_an_image_is_diffusers(steps, strength, pipe, draw_latents, theirs, monkeypatch):
    """The VAE's shift is of the mean alone; at strength 1 nothing of the picture is left."""
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline(**theirs.components)
    pipeline.set_progress_bar_config(disable=True)
    random = np.random.default_rng(0)
    pixels = random.uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    noise = random.standard_normal((1, 4, 4, 4)).astype(np.float32)
    monkeypatch.setattr(img2img, "randn_tensor", lambda *_, **__: to_nchw(noise))
    monkeypatch.setattr(
        img2img, "retrieve_latents", lambda encoded, generator=None: encoded.latent_dist.mode()
    )
    options = {"height": 16, "width": 16, "num_inference_steps": steps, "guidance_scale": 5.0}
    image = to_nchw(pixels / 2 + 0.5)
    expected = pipeline(CAPTION, image=image, strength=strength, output_type="latent", **options).images
    vae = {"vae": pipe.read_params("vae")}
    before = compile_fast(lambda pixels: pipe.encode_moments(vae, pixels))(pixels)[..., :4]
    drawing = Drawing(steps=steps, guidance_scale=5.0, strength=strength)
    assert_close(draw_latents(drawing, noise, before), to_nhwc(expected), 1e-4)


@pytest.mark.ci
def test_skip_layer_guidance_is_diffusers(pipe, draw_latents, theirs):
    """Of six calls the second and third have it: .01 * 6 < i < .5 * 6."""
    noise = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    options = {"height": 16, "width": 16, "num_inference_steps": 6, "guidance_scale": 5.0}
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.5}
    expected, without = (
        to_nhwc(theirs(CAPTION, latents=to_nchw(noise), output_type="latent", **options, **more).images)
        for more in (skipping, {})
    )
    drawing = Drawing(steps=6, guidance_scale=5.0, skip_layer_guidance=SkipLayers((1,), stop=0.5))
    assert_close(draw_latents(drawing, noise), expected, 1e-4)
    assert np.abs(expected - without).max() > 0.01


def test_shares_of_the_steps_in_which_nothing_would_be_skipped_are_refused(pipe):
    def make(steps, **shares):
        skip = SkipLayers((1,), **shares)
        return Drawing(steps=steps, guidance_scale=5.0, skip_layer_guidance=skip).make_sampler(pipe)

    make(6)  # 0.06 < 1 < 1.2
    make(3, stop=0.5)
    for steps, shares in ((5, {}), (28, {"start": 0.1, "stop": 0.1})):
        with pytest.raises(UserError, match=rf"^--skip_layers=1: of {steps} calls [^\n]*; take more --steps"):
            make(steps, **shares)


@each_row(
    ("flow", "guidance_scale", "options", "message"),
    [
        (True, 5.0, {"layers": (1, 2)}, "--skip_layers=1,2: [^\n]* has blocks 0 to 1; name some of these"),
        (
            False,
            5.0,
            {"layers": (1,)},
            "--skip_layers=1: [^\n]* has no blocks that could be skipped; leave it",
        ),
        (True, 1.0, {"layers": (1,)}, "--skip_layers: is a part of guidance, of which there is none at "),
        (True, 5.0, {"layers": (1,), "scale": float("nan")}, "--skip_layer_scale=nan: must be a finite"),
        (True, 5.0, {"layers": (1,), "start": 0.3}, "--skip_layer_start=0.3 --skip_layer_stop=0.2: must be"),
    ],
)
def test_what_cannot_be_skipped_is_refused(flow, guidance_scale, options, message, pipe, shallow_model):
    model = pipe if flow else load_pipeline(shallow_model)
    with pytest.raises(UserError, match=f"^{message}[^\n]*$"):
        Drawing(guidance_scale=guidance_scale, skip_layer_guidance=SkipLayers(**options)).make_sampler(model)


def test_skipped_layers_are_recorded(pipe, tmp_path):
    """Where there are none, the other test of the command finds none."""
    drawing = Drawing(steps=2, guidance_scale=2.0, skip_layer_guidance=SkipLayers((1,), stop=0.9))
    sample({"flow": pipe.path}, [Prompt(CAPTION)], tmp_path, Rendering(drawing, batch_size=1), seeds=[0])
    for file in ("settings.json", "manifest.jsonl"):
        recorded = json.loads((tmp_path / file).read_text())["skip_layer_guidance"]
        assert recorded == {"layers": [1], "scale": 2.8, "start": 0.01, "stop": 0.9}
