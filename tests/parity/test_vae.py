"""`AutoencoderKL` against diffusers' with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from diffusers import AutoencoderKL  # noqa: E402
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
            mean, logvar = model.apply(params, images(), method="encode")
            decoded = model.apply(params, latents(), method="decode")
            outputs = (mean, logvar, decoded)
            return sum(jnp.square(output).mean() for output in outputs), outputs

        return jax.grad(loss, has_aux=True)(params)

    gradients, outputs = gradients_of(params)
    posterior = module.encode(to_nchw(images())).latent_dist
    theirs = (posterior.mean, posterior.logvar, module.decode(to_nchw(latents())).sample)
    for name, ours, tensor in zip(("mean", "logvar", "decoded"), outputs, theirs, strict=True):
        assert_close(ours, to_nhwc(tensor), 1e-4, name)
    sum(tensor.square().mean() for tensor in theirs).backward()
    assert_gradients_close(module, model, gradients, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
    ],
    ids=["no quant convolutions", "no attention"],
)
def test_optional_parts_match_diffusers(changes, tmp_path):
    config = CONFIG | {"block_out_channels": (4, 8), "latent_channels": 2} | changes
    config |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    module = randomize(AutoencoderKL(**config))
    model, params = save(module, tmp_path)
    mean, logvar = compile_fast(lambda params: model.apply(params, images(), method="encode"))(params)
    decoded = compile_fast(lambda params: model.apply(params, latents()[..., :2], method="decode"))(params)
    with torch.no_grad():
        posterior = module.encode(to_nchw(images())).latent_dist
        theirs = (posterior.mean, posterior.logvar, module.decode(to_nchw(latents()[..., :2])).sample)
    for name, ours, tensor in zip(
        ("mean", "logvar", "decoded"), (mean, logvar, decoded), theirs, strict=True
    ):
        assert_close(ours, to_nhwc(tensor), 1e-4, name)


def test_the_log_variance_is_clipped_as_in_diffusers(tmp_path):
    module = AutoencoderKL(**CONFIG)
    with torch.no_grad():
        module.quant_conv.bias.copy_(torch.tensor([0, 0, 0, 0, -100.0, 100, 0, 1]))
        module.quant_conv.weight.zero_()
        theirs = to_nhwc(module.encode(to_nchw(images())).latent_dist.logvar)
    model, params = save(module, tmp_path)
    _, logvar = compile_fast(lambda params: model.apply(params, images(), method="encode"))(params)
    np.testing.assert_array_equal(logvar, theirs)
    np.testing.assert_array_equal(np.unique(logvar), [-30, 0, 1, 20])
