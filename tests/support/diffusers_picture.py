"""A picture that diffusers draws with a tiny model, from the noise that is drawn here."""

import numpy as np

from dspo_jax.sampling.image_sampler import ImageRequest, initial_noise


def draw_in_diffusers(pipe):
    """Draws "a red heart" of seed 7 in three steps: [1, 16, 16, 3] float32 in [0, 1]."""
    import torch

    latents = np.asarray(initial_noise([ImageRequest("a red heart", 0, 7)], (4, 4, 4)))
    return pipe(
        "a red heart",
        latents=torch.tensor(latents.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=3,
        guidance_scale=7.5,
        height=16,
        width=16,
        output_type="np",
    ).images
