"""ReFL against torch's autograd of the training step of its release, on the same model, noise and step.

The step is that of THUDM/ImageReward, ReFL.py: 40 steps of DDPM without guidance, those before the drawn one
without gradients; the clean image that one prediction expects, decoded and clamped; and
1e-3 * mean(relu(2 - reward)), whose gradient is the UNet's alone.
"""

import shutil

import jax
import numpy as np
import pytest
from tiny_run import make_config

from dspo_jax.parallel.mesh import shard_batch
from dspo_jax.training.start import make_state, mesh_of, prepare
from dspo_jax.training.step import mean_gradient

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from torch_modules import assert_gradients_close, to_nchw  # noqa: E402

pytestmark = [
    pytest.mark.ci,
    # Of diffusers' schedulers, which make NumPy arrays of torch tensors.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PROMPTS = ["a cat", "a dog", "a bird", "a red car"]
CALLS = 40
KEY = jax.random.key(7)
# Below 2, from where nothing is gained, for some of the images.
REWARD = """
def warmth(images):
    return 2.6 + 20 * (images[..., 0] ** 2 - images[..., 1] * images[..., 2]).mean((1, 2))
"""


def warmth(images):
    return 2.6 + 20 * (images[:, 0] ** 2 - images[:, 1] * images[:, 2]).mean((1, 2))


def released_step(pipe, noise, call, monkeypatch):
    """The loss, whose gradients are in the UNet, and the rewards."""
    given = iter(noise[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(given))
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(CALLS)
    tokens = pipe.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    text = pipe.text_encoder(tokens)[0].detach()
    latents = noise[0]
    with torch.no_grad():
        for t in scheduler.timesteps[:call]:
            latents = scheduler.step(pipe.unet(latents, t, text).sample, t, latents).prev_sample
    t = scheduler.timesteps[call]
    expected = scheduler.step(pipe.unet(latents, t, text).sample, t, latents).pred_original_sample
    image = pipe.vae.decode(expected / pipe.vae.config.scaling_factor).sample
    rewards = warmth((image / 2 + 0.5).clamp(0, 1))
    loss = 1e-3 * torch.relu(2 - rewards).mean()
    pipe.unet.zero_grad()
    loss.backward()
    return loss.item(), rewards.detach().numpy()


def test_the_update_is_that_of_the_release(shallow_model, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(REWARD)
    changes = {
        "stream.kind": "prompts",
        "stream.prompts": PROMPTS,
        "stream.sampler": "ddpm",
        "stream.num_inference_steps": CALLS,
        "stream.guidance_scale": 1.0,
        "rewards.train": f"{tmp_path / 'mine.py'}:warmth",
        "reward_gradient.name": "refl",
        "reward_gradient.threshold": 2.0,
    }
    experiment = prepare(make_config(shallow_model, "", changes))
    task, mesh = experiment.task, mesh_of(experiment.settings, jax.devices()[:1])
    state, reference = make_state(task, mesh, experiment.adapters)
    theirs = diffusers.DiffusionPipeline.from_pretrained(shallow_model, local_files_only=True)
    index = np.arange(40, 44, dtype=np.uint32)
    shape = (*task.loss.size, task.pipe.latent_channels)

    def noise(i):
        keys = [jax.random.fold_in(jax.random.fold_in(KEY, image), i) for image in index]
        return to_nchw(np.stack([jax.random.normal(key, shape) for key in keys]))

    of_steps = [noise(i) for i in range(CALLS + 1)]
    run = jax.jit(mean_gradient, static_argnums=1)
    calls = set()
    for update in (3, 4):
        of_update = jax.random.fold_in(jax.random.fold_in(KEY, update), 2**31)
        calls.add(call := int(np.argmax(task.loss.method.attached(CALLS, of_update))))
        expected, rewards = released_step(theirs, of_steps, call, monkeypatch)
        assert rewards.min() < 2 < rewards.max()
        batch = {
            "tokens": task.pipe.tokenize(PROMPTS),
            "reward_tokens": experiment.own_images.trained.tokenize(PROMPTS),
            "index": index,
            "update": np.full(4, update, np.uint32),
        }
        (loss, metrics), grads = run(state.params, task, reference, shard_batch(batch, mesh), KEY)
        assert float(loss) == pytest.approx(expected, rel=1e-4)
        assert float(metrics["reward"]) == pytest.approx(rewards.mean(), rel=1e-4)
        folder = shutil.copytree(shallow_model / "unet", tmp_path / f"unet{update}")
        assert_gradients_close(theirs.unet, task.pipe.networks["unet"], grads["unet"], folder, 2e-3)
    assert len(calls) == 2
    assert min(calls) >= 30
