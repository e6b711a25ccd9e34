"""A stand-in for a model's pipeline, and small pictures, for tests of what encoding does around the VAE."""

import io

import jax.numpy as jnp
import numpy as np
from example_shards import conditioning_shapes
from PIL import Image


class StubPipeline:
    """Has the interface of `Pipeline` that encoding uses; a latent is the mean of 4x4 pixels, its std is
    1."""

    vae_scale_factor = side_multiple = 4
    latent_channels = 3
    image_side = 32
    stored_encoder = None
    scale = 1.0

    def __init__(self):
        self.batch_shapes: list[tuple[int, ...]] = []

    def fingerprint(self):
        return {
            "model": "stub",
            "vae_sha256": "a" * 64,
            "scaling_factor": 1.0,
            "vae_scale_factor": self.vae_scale_factor,
            "latent_channels": self.latent_channels,
            "tokenizer_sha256": ["b", "c"],
        }

    def conditioning_shapes(self, images):
        return conditioning_shapes(2, images)

    def make_conditioning(self, captions, crops):
        tokens = np.zeros((len(captions), 2, 77), np.int32)
        for i, caption in enumerate(captions):
            tokens[i, :, 0] = len(caption), -len(caption)
        return {"tokens": tokens, "micro_conditioning": np.asarray(crops, np.int32)}

    def read_params(self, component, dtype):
        assert component == "vae"
        return {"scale": np.ones((), dtype)}

    def encode_moments(self, params, images):
        """Is traced once for each shape."""
        self.batch_shapes.append(images.shape)
        assert images.dtype == params["vae"]["scale"].dtype
        n, height, width, channels = images.shape
        mean = images.reshape(n, height // 4, 4, width // 4, 4, channels).mean(axis=(2, 4), dtype=np.float32)
        return jnp.concatenate([self.scale * mean, jnp.ones_like(mean)], axis=-1)


def png(color: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    """The file of a picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()
