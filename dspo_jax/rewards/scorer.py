"""A network as a reward: pictures and prompts in batches of one size, over all devices of a process."""

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import PyTree
from PIL import Image

from dspo_jax.models.model import Params
from dspo_jax.parallel.mesh import batch_sharding, make_mesh, on_own_devices, replicated


class Scorer:
    """Scores with a network; compiled once."""

    def __init__(
        self,
        network: Callable[[Params, jax.Array, PyTree], jax.Array],
        params: Params,
        prepare: Callable[[Image.Image], np.ndarray],
        tokenize: Callable[[Sequence[str]], PyTree],
        *,
        batch_size: int,
    ):
        """Takes the weights: arrays on devices stay where they are, others are placed at the first call.

        Args:
          network: pure: (params, pixels [B, H, W, 3] float32, tokens) -> scores [B] float32.
          params: weights of the network, on the host, or on the mesh of a run as `on_own_devices` takes them.
          prepare: an RGB or RGBA picture of any size -> pixels [H, W, 3] float32.
          tokenize: B prompts -> what `network` takes as tokens: arrays with a leading axis B.
          batch_size: images in one call, filled up to a multiple of the devices.
        """
        leaves = jax.tree.leaves(params)
        self._on_host = not (leaves and isinstance(leaves[0], jax.Array))
        if self._on_host:
            devices = jax.local_devices()
            self._mesh, self._params = make_mesh({"data": len(devices)}, devices), params
        else:
            self._mesh, self._params = on_own_devices(params)
        self._batch_size = math.ceil(batch_size / self._mesh.size) * self._mesh.size
        self._placement = batch_sharding(self._mesh)

        def in_float32(params: Params, pixels: jax.Array, tokens: PyTree) -> jax.Array:
            # Otherwise an accelerator multiplies in fewer bits (TF32, bfloat16) and scores depend on it.
            with jax.default_matmul_precision("highest"):
                return network(params, pixels, tokens)

        self._network = jax.jit(in_float32, out_shardings=replicated(self._mesh))
        self._prepare, self._tokenize = prepare, tokenize

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """Scores [N] float32 of N images [H, W, 3] or [H, W, 4] uint8; a short last batch is filled up."""
        if self._on_host:
            self._params, self._on_host = jax.device_put(self._params, replicated(self._mesh)), False
        scores: list[np.ndarray] = []
        with ThreadPoolExecutor() as pool:
            pixels = pool.map(lambda image: self._prepare(Image.fromarray(image)), images)
            for start in range(0, len(images), self._batch_size):
                batch = list(itertools.islice(pixels, self._batch_size))
                texts = list(prompts[start : start + self._batch_size])
                missing = self._batch_size - len(batch)
                inputs = (
                    np.stack(batch + [batch[-1]] * missing),
                    self._tokenize(texts + [texts[-1]] * missing),
                )
                result = self._network(self._params, *jax.device_put(inputs, self._placement))
                scores.append(np.asarray(result)[: len(batch)])
        return np.concatenate(scores)
