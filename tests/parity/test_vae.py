"""`AutoencoderKL` and `AutoencoderTiny` against diffusers', with random weights and with TAESD's own."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from dspo_jax.data.sources import get_source
from dspo_jax.images.decode import decode_image

torch = pytest.importorskip("torch")
from diffusers import AutoencoderKL, AutoencoderTiny  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch_modules import (  # noqa: E402
    assert_close,
    assert_gradients_close,
    compile_fast,
    randomize,
    save,
    to_nchw,
    to_nhwc,
)

CONFIG = {
    "block_out_channels": (4, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": 16,
}


def images() -> np.ndarray:
    """Two images, neither square."""
    return np.random.default_rng(0).uniform(-1, 1, (2, 16, 8, 3)).astype(np.float32)


def latents() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 4, 2, 4), np.float32)


def test_encode_and_decode_and_their_gradients_match_diffusers(tmp_path):
    module = randomize(AutoencoderKL(**CONFIG))
    model, params = save(module, tmp_path)

    @compile_fast
    def gradients_of(params):
        def loss(params):
            mean, deviation = model.apply(params, images(), method="encode")
            decoded = model.apply(params, latents(), method="decode")
            outputs = (mean, deviation, decoded)
            return sum(jnp.square(output).mean() for output in outputs), outputs

        return jax.grad(loss, has_aux=True)(params)

    gradients, outputs = gradients_of(params)
    posterior = module.encode(to_nchw(images())).latent_dist
    theirs = (posterior.mean, posterior.std, module.decode(to_nchw(latents())).sample)
    for name, ours, tensor in zip(("mean", "deviation", "decoded"), outputs, theirs, strict=True):
        assert_close(ours, to_nhwc(tensor), 1e-4, name)
    sum(tensor.square().mean() for tensor in theirs).backward()
    assert_gradients_close(module, model, gradients, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
        # Stable Diffusion 3's; its shift and scale are applied outside of the network.
        {
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "latent_channels": 16,
            "shift_factor": 0.0609,
            "scaling_factor": 1.5305,
        },
    ],
    ids=["no quant convolutions", "no attention", "16 channels"],
)
def test_optional_parts_match_diffusers(changes, tmp_path):
    config = CONFIG | {"block_out_channels": (4, 8), "latent_channels": 2} | changes
    config |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    module = randomize(AutoencoderKL(**config))
    latents = np.random.default_rng(1).standard_normal((2, 4, 2, config["latent_channels"]), np.float32)
    model, params = save(module, tmp_path)
    mean, deviation = compile_fast(lambda params: model.apply(params, images(), method="encode"))(params)
    decoded = compile_fast(lambda params: model.apply(params, latents, method="decode"))(params)
    with torch.no_grad():
        posterior = module.encode(to_nchw(images())).latent_dist
        theirs = (posterior.mean, posterior.std, module.decode(to_nchw(latents)).sample)
    for name, ours, tensor in zip(
        ("mean", "deviation", "decoded"), (mean, deviation, decoded), theirs, strict=True
    ):
        assert_close(ours, to_nhwc(tensor), 1e-4, name)


def test_the_log_variance_is_clipped_as_in_diffusers(tmp_path):
    module = AutoencoderKL(**CONFIG)
    with torch.no_grad():
        module.quant_conv.bias.copy_(torch.tensor([0, 0, 0, 0, -100.0, 100, 0, 1]))
        module.quant_conv.weight.zero_()
        theirs = to_nhwc(module.encode(to_nchw(images())).latent_dist.std)
    model, params = save(module, tmp_path)
    _, deviation = compile_fast(lambda params: model.apply(params, images(), method="encode"))(params)
    np.testing.assert_allclose(deviation, theirs, rtol=1e-6)
    np.testing.assert_allclose(np.unique(deviation), np.exp([-15, 0, 0.5, 10]), rtol=1e-6)


TINY = {
    "encoder_block_out_channels": (6,) * 3,
    "decoder_block_out_channels": (5,) * 3,
    "num_encoder_blocks": (1, 2, 1),
    "num_decoder_blocks": (2, 1, 1),
    "latent_channels": 4,
}


def test_tiny_encode_and_decode_and_their_gradients_match_diffusers(tmp_path):
    module = randomize(AutoencoderTiny(**TINY))
    model, params = save(module, tmp_path)
    wide = 4 * latents()  # where the limit of 3 acts

    @compile_fast
    def gradients_of(params):
        def loss(params):
            encoded, deviation = model.apply(params, images(), method="encode")
            outputs = (encoded, model.apply(params, wide, method="decode"))
            return sum(jnp.square(output).mean() for output in outputs), (*outputs, deviation)

        return jax.grad(loss, has_aux=True)(params)

    gradients, (encoded, decoded, deviation) = gradients_of(params)
    theirs = (module.encode(to_nchw(images())).latents, module.decode(to_nchw(wide)).sample)
    assert_close(encoded, to_nhwc(theirs[0]), 1e-4, "encoded")
    assert_close(decoded, to_nhwc(theirs[1]), 1e-4, "decoded")
    np.testing.assert_array_equal(deviation, np.zeros_like(encoded))
    sum(tensor.square().mean() for tensor in theirs).backward()
    assert_gradients_close(module, model, gradients, tmp_path)


def taesd(folder: Path) -> AutoencoderTiny:
    """TAESD with its trained weights, which its author keeps in two files without diffusers' prefixes.

    The number of a layer is its place in a sequence; the author's decoder starts with the limit, which
    diffusers does not count.
    """
    module = AutoencoderTiny(**published.TAESD)
    state = {}
    for part, first in (("encoder", 0), ("decoder", 1)):
        for name, tensor in load_file(folder / f"taesd_{part}.safetensors").items():
            number, _, rest = name.partition(".")
            state[f"{part}.layers.{int(number) - first}.{rest}"] = tensor.float()
    module.load_state_dict(state)
    return module.eval()


def emoji_images(count: int, side: int) -> np.ndarray:
    """Pictures of the built-in source, [count, side, side, 3] in [-1, 1]."""
    rows = itertools.islice(get_source("emoji_images").pairs("train"), count)
    pixels = [decode_image(row.winner).resize((side, side)) for row in rows]
    return np.stack(pixels).astype(np.float32) / 127.5 - 1


def test_taesd_encodes_and_decodes_real_images_as_diffusers_does(test_data, tmp_path):
    module = taesd(test_data / "taesd")
    model, params = save(module, tmp_path)
    pictures = emoji_images(3, 64)
    with torch.no_grad():
        theirs = module.encode(to_nchw(pictures)).latents
        theirs_decoded = to_nhwc(module.decode(theirs).sample)
    encoded, _ = compile_fast(lambda params: model.apply(params, pictures, method="encode"))(params)
    assert encoded.shape == (3, 8, 8, 4)
    assert_close(encoded, to_nhwc(theirs), 1e-4, "encoded")
    decoded = compile_fast(lambda params: model.apply(params, encoded, method="decode"))(params)
    assert_close(decoded, theirs_decoded, 1e-4, "decoded")
    assert np.abs(decoded - pictures).mean() < 0.1  # trained weights: the pictures come back
