"""The parts of a short run on the model's own images: task, parameters on a mesh, prompts and rewards."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from tiny_run import make_config

from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.losses.policy_gradient import PolicyGradientLoss
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_adapters, make_state

PROMPTS = ("a red circle", "a blue square", "two cats")
STEPS = 3


def brightness(images, prompts):
    """A reward: how bright an image is, with something of the prompt."""
    return np.asarray(
        [image.mean() / 255 + len(prompt) / 100 for image, prompt in zip(images, prompts, strict=True)]
    )


class OnlineRun:
    """Settings, task, mesh, state and reference of a run with 3 DDIM steps, eta 1 and 8 images an update.

    The text encoder stays as it is.

    Attributes:
      loss: of policy gradients; the task's own where `trajectories` is false.
    """

    def __init__(self, model: Path, changes=None, mesh_sizes=None, *, trajectories=True, accumulation=1):
        sizes = mesh_sizes or {"data": 1}
        self.mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        online = {
            "stream.kind": "trajectories" if trajectories else "own_pairs",
            "stream.images": 2,
            "stream.batch_size": 8,
            "stream.num_inference_steps": STEPS,
            "stream.guidance_scale": 3.0,
            "advantages.of": "group",
            "steps": 8,
        }
        self.settings = parse(make_config(model, Path(), {**online, **(changes or {})}))
        self.pipe = load_pipeline(model)
        task = make_task(self.settings, self.pipe)
        self.size = self.pipe.latent_size
        if trajectories:
            loss = PolicyGradientLoss(
                self.settings.policy_gradient, self.settings.stream.drawing, self.pipe.latent_size
            )
            task = dataclasses.replace(task, loss=loss)
        # `parse` wants parts of whole images; here a part is of denoising steps.
        if accumulation > 1:
            self.settings = dataclasses.replace(self.settings, accumulation=accumulation)
            rule = dataclasses.replace(task.update, accumulation=accumulation)
            task = dataclasses.replace(task, update=rule)
        self.task, self.loss = task, task.loss
        self.state, self.reference = make_state(task, self.mesh, make_adapters(self.settings, self.pipe))
        self.params = self.state.params
        self.key = jax.random.key(7)

    def open(self, stream, score=brightness, prompts=PROMPTS, **options):
        """A stream of the class at its start."""
        return stream(self.settings, self.task, self.reference, prompts, score, self.mesh, **options)


def moved(params, scale=0.02):
    """Parameters a little away from these, split alike."""

    def move(leaf):
        noise = np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(leaf.dtype)
        return jax.device_put(leaf + scale * noise, leaf.sharding)

    return jax.tree.map(move, params)
