"""A folder of Stable Diffusion 3: text, predictions and images against diffusers' pipeline, and refusals."""

import itertools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from tables import each_row

from dspo_jax.pipelines.conditioning_inputs import drop_captions, prompt_batch
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.sampling.guidance import GuidedDenoiser
from dspo_jax.sampling.rendering import Drawing

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
from tiny_sd3 import write_sd3  # noqa: E402
from torch_modules import assert_close, compile_fast, to_nchw, to_nhwc  # noqa: E402

CAPTIONS = ["a red fox", "snow on a fox " * 30]
WIDTHS, PROJECTIONS = [(0, 12), (12, 20)], [(0, 12), (12, 18)]  # of both CLIPs, side by side


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with and without T5."""
    folder = tmp_path_factory.mktemp("sd3")
    return {has_t5: write_sd3(folder / f"t5_{has_t5}", has_t5=has_t5) for has_t5 in (True, False)}


def load_theirs(model, has_t5=True):
    absent = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    return diffusers.StableDiffusion3Pipeline.from_pretrained(model, local_files_only=True, **absent)


def read_all(pipe):
    return {name: pipe.read_params(name) for name in pipe.components}


@pytest.mark.ci
@each_row("has_t5", [True, False])
def test_a_caption_and_a_prediction_are_diffusers(has_t5, models):
    """Two images for each caption, as in training: text is made of a caption once."""
    pipe = load_pipeline(models[has_t5])
    theirs = load_theirs(models[has_t5], has_t5)
    latents = np.random.default_rng(0).standard_normal((4, 8, 4, 4), np.float32)
    sigma = np.float32([0.998, 0.5, 0.25, 0.01])
    with torch.no_grad():
        states, _, pooled, _ = theirs.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
        expected = theirs.transformer(
            to_nchw(latents),
            timestep=1000 * torch.from_numpy(sigma),
            encoder_hidden_states=states.repeat_interleave(2, 0),
            pooled_projections=pooled.repeat_interleave(2, 0),
        ).sample

    def run(params, batch, latents, sigma):
        conditioning = pipe.encode_conditioning(params, batch)
        times = pipe.schedule.network_time(sigma)
        return conditioning, pipe.predict(params, latents, times, conditioning)

    batch = prompt_batch(pipe, pipe.tokenize(CAPTIONS), (32, 16))
    conditioning, output = compile_fast(run)(read_all(pipe), batch, latents, sigma)
    assert_close(conditioning.states, states.numpy(), 1e-5, "states")
    assert_close(conditioning.pooled, pooled.numpy(), 1e-5, "pooled")
    assert_close(output, to_nhwc(expected), 1e-4)


def test_an_image_is_diffusers(models):
    """From the same noise: guidance, `flow_euler` on the shifted grid, and the VAE with its shift."""
    pipe = load_pipeline(models[True])
    theirs = load_theirs(models[True])
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 4, 4, 4), np.float32)
    options = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 5.0}
    expected = theirs(CAPTIONS[0], latents=to_nchw(noise), output_type="np", **options).images
    drawing = Drawing(steps=4, guidance_scale=5.0)
    sampler, denoiser = drawing.make_sampler(pipe), GuidedDenoiser(pipe, drawing)

    def draw(params, tokens, noise):
        conditioning = denoiser.encode(params, tokens, noise.shape[1:3])
        latents = sampler.run(
            lambda x, t: denoiser.predict(params, x, t, conditioning),
            sampler.start(noise, None),
            lambda i: jax.numpy.zeros(noise.shape),
        )
        return pipe.decode(params, latents)

    params = read_all(pipe) | {"vae": pipe.read_params("vae")}
    image = compile_fast(draw)(params, pipe.tokenize([CAPTIONS[0]]), noise)
    assert_close(np.clip(image / 2 + 0.5, 0, 1), expected, 1e-4)


@pytest.mark.ci
@each_row(("has_t5", "length"), [(True, 20), (False, 5), (False, 0)])
def test_another_number_of_tokens_is_read_as_in_diffusers(has_t5, length, models):
    pipe = load_pipeline(models[has_t5], max_sequence_length=length)
    theirs = load_theirs(models[has_t5], has_t5)
    with torch.no_grad():
        states, _, pooled, _ = theirs.encode_prompt(
            CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    batch = prompt_batch(pipe, pipe.tokenize(CAPTIONS), (16, 16))
    conditioning = compile_fast(pipe.encode_conditioning)(read_all(pipe), batch)
    assert conditioning.states.shape == (2, 77 + length, 24)
    assert_close(conditioning.states, states.numpy(), 1e-5, "states")
    assert_close(conditioning.pooled, pooled.numpy(), 1e-5, "pooled")
    np.testing.assert_array_equal(pipe.empty_tokens, pipe.tokenize([""])[0])


@pytest.mark.ci
@each_row(("has_t5", "zeros"), [(True, False), (True, True), (False, True)])
def test_each_encoder_is_dropped_by_itself(has_t5, zeros, models):
    """Every choice of encoders, against the text with and without a caption, put together by hand."""
    pipe = load_pipeline(models[has_t5], max_sequence_length=5)
    encoders = 3 if has_t5 else 2
    drop = np.array(list(itertools.product([False, True], repeat=encoders)))
    params = read_all(pipe)
    encode = compile_fast(pipe.encode_conditioning)

    def run(batch):
        found = encode(params, {**prompt_batch(pipe, batch.pop("tokens"), (16, 16)), **batch})
        return np.array(found.states), np.array(found.pooled)

    tokens = np.repeat(pipe.tokenize(["a red fox"]), len(drop), axis=0)
    expected, without = run({"tokens": tokens}), run({"tokens": np.zeros_like(tokens) + pipe.empty_tokens})
    if zeros:
        without = [np.zeros_like(each) for each in without]
    for row, dropped in enumerate(drop):
        for i in np.flatnonzero(dropped[:2]):
            columns = slice(*WIDTHS[i])
            expected[0][row, :77, columns] = without[0][row, :77, columns]
            columns = slice(*PROJECTIONS[i])
            expected[1][row, columns] = without[1][row, columns]
        if dropped[2:].any():
            expected[0][row, 77:] = without[0][row, 77:]
    batch = drop_captions(pipe, {"tokens": jax.numpy.asarray(tokens)}, drop, zeros=zeros)
    for ours, theirs in zip(run(batch), expected, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_what_identifies_the_tokens_of_t5(models):
    with_t5, without = (load_pipeline(models[has_t5]) for has_t5 in (True, False))
    assert with_t5.empty_tokens.shape == (3, 256)
    assert without.empty_tokens.shape == (2, 77)
    found = with_t5.fingerprint()
    assert found["t5_length"] == 256
    assert found["shift_factor"] == 0.0609
    assert found["t5_tokens_sha256"] == with_t5.t5_tokenizer.digest()
    assert found.keys() - without.fingerprint().keys() == {"t5_length", "t5_tokens_sha256"}


@each_row(
    ("component", "changes", "message"),
    [
        ("transformer", {"in_channels": 8}, "in_channels = 8, but .* needs 4; use a transformer"),
        ("transformer", {"joint_attention_dim": 28}, "joint_attention_dim = 28, but .* needs 24"),
        ("transformer", {"pooled_projection_dim": 20}, "pooled_projection_dim = 20, but .* needs 18"),
    ],
)
def test_parts_of_different_models_are_refused(component, changes, message, models, tmp_path):
    model = shutil.copytree(models[True], tmp_path / "model")
    config = model / component / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=f"^{re.escape(str(config))}: {message}[^\n]*$"):
        load_pipeline(model)


@each_row(
    ("text", "message"),
    [
        ({"max_chunks": 2}, "max_chunks = 2: must be 1: T5 reads longer captions"),
        ({"clip_skip": 2}, "clip_skip = 2: must be 1, as Stable Diffusion 3 always reads the layer before"),
        ({"max_sequence_length": 0}, "max_sequence_length = 0: must be from 1 to 512, the most that"),
        ({"max_sequence_length": 513}, "max_sequence_length = 513: must be from 1 to 512, the most that"),
    ],
)
def test_what_the_text_encoders_cannot_do_is_refused(text, message, models):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{models[True]}: {message}')}[^\n]*$"):
        load_pipeline(models[True], **text)
