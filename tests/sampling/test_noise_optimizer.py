"""DOODL: initial noise that a reward likes better, with the weights fixed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.rewards.differentiable import load_differentiable
from dspo_jax.sampling.drawing import sample
from dspo_jax.sampling.guidance import GuidedDenoiser
from dspo_jax.sampling.image_sampler import ImageRequest, initial_noise
from dspo_jax.sampling.noise_optimizer import NoiseOptimizer
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Drawing, Rendering

STEPS = 3


def rendering(**changes):
    drawing = Drawing(steps=STEPS, guidance_scale=2.0, **changes.pop("drawing", {}))
    return Rendering(drawing, batch_size=2, optimize_noise="colourfulness", **changes)


@pytest.mark.ci
def test_one_update_follows_the_gradient_of_the_whole_sampler(shallow_model):
    pipe, mesh = load_pipeline(shallow_model), make_mesh({}, jax.devices()[:1])
    requests = [ImageRequest("a cat", 0, 0), ImageRequest("a dog", 1, 0)]
    noise = np.asarray(initial_noise(requests, (*pipe.latent_size, pipe.latent_channels)))
    optimizer = NoiseOptimizer(pipe, rendering(optimize_steps=1), mesh)
    moved = optimizer(requests, noise)

    drawing, reward = rendering().drawing, load_differentiable("colourfulness")
    denoiser, sampler = GuidedDenoiser(pipe, drawing), drawing.make_sampler(pipe)
    params = {name: pipe.read_params(name, "float32") for name in (*pipe.components, "vae")}
    tokens = pipe.tokenize([request.prompt for request in requests])

    def rewards(noise):
        conditioning = denoiser.encode(params, tokens, pipe.latent_size)
        latents = sampler.run(lambda x, t: denoiser.predict(params, x, t, conditioning), sampler.start(noise))
        pixels = jnp.clip(pipe.decode(params, latents) / 2 + 0.5, 0.0, 1.0)
        return reward.function({}, pixels, np.zeros(2, np.int32))

    before, gradient = rewards(jnp.asarray(noise)), jax.grad(lambda noise: rewards(noise).sum())(noise)
    size = np.sqrt(np.square(gradient).mean((1, 2, 3), keepdims=True))
    expected = noise + np.clip(1e-3 * gradient / size, -1e-3, 1e-3)
    norm = np.linalg.norm(noise.reshape(2, -1), axis=1)
    expected *= (norm / np.linalg.norm(expected.reshape(2, -1), axis=1))[:, None, None, None]
    np.testing.assert_allclose(moved, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(moved.reshape(2, -1), axis=1), norm, rtol=1e-6)
    after = rewards(jnp.asarray(moved))
    for request, old, new in zip(requests, before, after, strict=True):
        assert optimizer.rewards[request] == pytest.approx((float(old), float(new)), rel=1e-4)
        assert new > old


@pytest.mark.ci
def test_the_manifest_tells_what_became_of_the_reward(shallow_model, tmp_path):
    prompts = [Prompt("a cat"), Prompt("a dog")]
    for _ in range(2):  # the second time everything is there
        sample({"m": shallow_model}, prompts, tmp_path / "out", rendering(optimize_steps=4), seeds=[0])
        manifest = (tmp_path / "out" / "manifest.jsonl").read_text()
        records = [json.loads(line) for line in manifest.splitlines()]
        assert len(records) == 2
        assert all(record["reward_after"] > record["reward_before"] for record in records)
    with pytest.raises(ValueError, match="optimize_steps = 4, here it is 5"):
        sample({"m": shallow_model}, prompts, tmp_path / "out", rendering(optimize_steps=5), seeds=[0])


@each_row(
    ("changes", "message"),
    [
        ({"drawing": {"eta": 1.0}}, "--optimize_noise: sampler 'ddim' with eta 1 .*--eta=0"),
        ({"drawing": {"sampler": "dpmpp_2m"}}, "--optimize_noise: sampler 'dpmpp_2m'"),
    ],
)
def test_a_sampler_without_an_adjoint_is_refused(changes, message, shallow_model):
    with pytest.raises(ValueError, match=message):
        NoiseOptimizer(load_pipeline(shallow_model), rendering(**changes), make_mesh({}, jax.devices()[:1]))
