"""Initial noise that a reward likes better: DOODL, the weights of the model fixed.

Wallace et al. 2023, "End-to-End Diffusion Latent Optimization Improves Classifier Guidance". The paper takes
an invertible sampler for its memory; its released code does not need one, as it computes each step again. So
does the adjoint of `samplers/adjoint.py`, with the sampler that is drawn with.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32, PyTree

from dspo_jax.errors import UserError
from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import batch_sharding, replicated
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.rewards.differentiable import load_differentiable
from dspo_jax.samplers.adjoint import run_with_gradients
from dspo_jax.sampling.guidance import GuidedDenoiser
from dspo_jax.sampling.image_sampler import ImageRequest
from dspo_jax.sampling.rendering import Rendering

# Of the release: momentum, and the bound on each number of a gradient. There a gradient has the scale of its
# loss; here it is scaled to a root mean square of the bound, so that any reward moves the noise as far.
_MOMENTUM, _BOUND = 0.9, 1e-3


class NoiseOptimizer:
    """Climbs a reward by the noise that images are drawn from; compiled once for a shape of latents.

    Attributes:
      rewards: by request, the reward of the image before and after, by the pixels that the gradient sees.
    """

    def __init__(self, pipe: Pipeline, rendering: Rendering, mesh: Mesh):
        """Reads the weights.

        Args:
          pipe: the model.
          rendering: how it draws, what is climbed, and how far; a sampler that adds noise is refused.
          mesh: splits the batch.

        Raises:
          UserError, FileNotFoundError: the reward has no gradient or no weights, or the sampler is refused.
        """
        self._reward = load_differentiable(rendering.optimize_noise, rendering.rewards_folder)
        self._steps, self.rewards = rendering.optimize_steps, dict[ImageRequest, tuple[float, float]]()
        drawing, compute_dtype = rendering.drawing.suited_to(pipe), rendering.choose_dtype()
        self._pipe, self._split = pipe, batch_sharding(mesh)
        sampler, denoiser = drawing.make_sampler(pipe), GuidedDenoiser(pipe, drawing, compute_dtype)
        if sampler.step_noise is not None or sampler.step_outputs.shape[1] > 1:
            raise UserError(
                f"--optimize_noise: sampler {drawing.sampler!r} with eta {drawing.eta:g} draws noise in its "
                "steps or remembers earlier ones; take --sampler=ddim --eta=0, euler, or of a flow flow_euler"
            )
        names = (*pipe.components, "vae")
        dtypes = {name: "float32" if name == "vae" else compute_dtype for name in names}
        params = {name: pipe.read_params(name, dtype) for name, dtype in dtypes.items()}
        self._params = jax.device_put((params, self._reward.params), replicated(mesh))
        calls, function, divisor = sampler.timesteps.shape[0], self._reward.function, self._reward.divisor

        def rewards(
            params: tuple[Params, Params], tokens: tuple[jax.Array, PyTree], noise: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            networks, of_reward = params
            conditioning = denoiser.encode(networks, tokens[0], (noise.shape[1], noise.shape[2]))

            def step(
                theta: PyTree, constants: PyTree, x: jax.Array, i: jax.Array
            ) -> tuple[jax.Array, jax.Array]:
                del theta
                networks, conditioning = constants
                after, _ = sampler.transition(
                    lambda x, t: denoiser.predict(networks, x, t, conditioning),
                    sampler.start(x)._replace(latents=x),
                    i,
                )
                return after.latents, jnp.zeros(len(x), jnp.float32)

            attached = jnp.ones(calls, bool)
            start = sampler.start(noise).latents
            latents, _ = run_with_gradients(step, (), (networks, conditioning), start, attached, sampler.kept)

            @jax.checkpoint
            def score(latents: jax.Array) -> jax.Array:
                pixels = pipe.decode({"vae": networks["vae"]}, latents).astype(jnp.float32) / 2 + 0.5
                return function(of_reward, jnp.clip(pixels, 0.0, 1.0), tokens[1]) / divisor

            scores = score(latents)
            return scores.sum(), scores

        def update(
            params: tuple[Params, Params],
            tokens: tuple[jax.Array, PyTree],
            noise: Float32[jax.Array, "B h w C"],
            velocity: Float32[jax.Array, "B h w C"],
            norm: Float32[jax.Array, "B 1 1 1"],
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            (_, scores), gradient = jax.value_and_grad(rewards, 2, has_aux=True)(params, tokens, noise)
            size = jnp.sqrt(jnp.square(gradient).mean((1, 2, 3), keepdims=True))
            gradient = jnp.clip(_BOUND * gradient / jnp.maximum(size, 1e-20), -_BOUND, _BOUND)
            velocity = _MOMENTUM * velocity + gradient
            moved = noise + velocity
            return moved * norm / _norm(moved), velocity, scores

        self._update = jax.jit(on_mesh(update, mesh))
        self._rewards = jax.jit(on_mesh(lambda *arguments: rewards(*arguments)[1], mesh))

    def __call__(
        self, requests: Sequence[ImageRequest], noise: Float[np.ndarray, "B h w C"]
    ) -> Float32[np.ndarray, "B h w C"]:
        """Optimises the noise of B images, a multiple of the devices; the norm of each stays.

        An image whose reward did not rise keeps its noise.
        """
        prompts = [request.prompt for request in requests]
        tokens = self._pipe.tokenize(prompts), self._reward.tokenize(prompts)
        tokens, start = jax.device_put((tokens, np.asarray(noise, np.float32)), self._split)
        moved, velocity, norm = start, jnp.zeros_like(start), _norm(start)
        for _ in range(self._steps):
            moved, velocity, _ = self._update(self._params, tokens, moved, velocity, norm)
        before, after = (
            np.asarray(self._rewards(self._params, tokens, each)) * self._reward.divisor
            for each in (start, moved)
        )
        for request, old, new in zip(requests, before.tolist(), after.tolist(), strict=True):
            self.rewards[request] = old, max(old, new)
        return np.where((after > before)[:, None, None, None], np.asarray(moved), np.asarray(start))


def _norm(noise: Float32[jax.Array, "B h w C"]) -> Float32[jax.Array, "B 1 1 1"]:
    return jnp.sqrt(jnp.square(noise).sum((1, 2, 3), keepdims=True))
