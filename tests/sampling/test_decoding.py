"""Decoding on several devices, in tiles, and with a small VAE in place of the model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY_VAE, random_params

from dspo_jax.models.model import build_model
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.sampling import decoding
from dspo_jax.sampling.decoding import Decoder, decode_in_tiles, refuse_non_finite, warn_of_non_finite
from dspo_jax.sampling.image_sampler import ImageRequest
from dspo_jax.weights import components
from dspo_jax.weights.components import read_model, read_params, write_params


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return load_pipeline(tiny_model)


def latents(count, height=4, width=4):
    return np.random.default_rng(0).standard_normal((count, height, width, 4)).astype(np.float32)


def mesh_of(devices):
    return make_mesh({"data": devices}, jax.devices()[:devices])


@pytest.mark.ci
@pytest.mark.parametrize("devices", [1, 8])
def test_every_image_is_as_if_decoded_alone(pipe, devices, monkeypatch):
    monkeypatch.setattr("dspo_jax.sampling.decoding.PIXELS_AT_ONCE", 2 * 16 * 16)  # several calls
    images, finite = Decoder(pipe, mesh_of(devices))(latents(5))
    assert finite.tolist() == [True] * 5
    assert images.shape == (5, 16, 16, 3)
    alone = np.concatenate([Decoder(pipe)(latents(5)[i : i + 1])[0] for i in range(5)])
    assert np.abs(images.astype(int) - alone).max() <= 1


def test_pixels_are_those_of_the_vae(pipe):
    vae, params = read_model(pipe.path / "vae"), read_params(pipe.path / "vae", pipe.vae, "float32")
    expected = vae.apply(params, latents(2) / vae.settings["scaling_factor"], method="decode")
    expected = np.clip(np.asarray(expected) * 127.5 + 127.5, 0, 255).round()
    assert np.abs(Decoder(pipe)(latents(2))[0] - expected).max() <= 1


@pytest.mark.parametrize("tile", [0, 8])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_black_and_told(pipe, value, tile):
    some = latents(3)
    some[1, 0, 0, 0] = value
    images, finite = Decoder(pipe, mesh_of(1), tile=tile)(some)
    assert finite.tolist() == [True, False, True]
    assert images[0].any()
    assert not images[1].any()
    assert images[2].any()


def test_a_vae_that_is_not_finite_is_told(pipe, preview, monkeypatch):
    """By the model's own VAE, and by a small one, which squashes infinite latents."""
    infinite = latents(2)
    infinite[0] = np.inf
    assert Decoder(pipe, mesh_of(1), preview=preview)(infinite)[1].tolist() == [False, True]
    for module in (components, decoding):
        monkeypatch.setattr(
            module,
            "read_params",
            lambda *how, **more: jax.tree.map(lambda x: x * np.nan, read_params(*how, **more)),
        )
    for small in (None, preview):
        images, finite = Decoder(pipe, mesh_of(1), preview=small)(latents(2))
        assert finite.tolist() == [False, False]
        assert not images.any()


def test_one_picture_that_is_not_finite_is_refused_or_warned_of(caplog):
    requests, finite = (
        [ImageRequest(text, i, 7) for i, text in enumerate("abc")],
        np.array([True, False, True]),
    )
    with pytest.raises(ValueError, match="runs/mine: the picture of 'b' with seed 7 is not finite"):
        refuse_non_finite("runs/mine", requests, finite)
    refuse_non_finite("runs/mine", requests, np.full(3, True))
    warn_of_non_finite("samples", "abc", np.full(3, True))
    assert caplog.text == ""
    warn_of_non_finite("samples", "abc", finite)
    assert "samples: 1 of 3 pictures are black, as they are not finite" in caplog.text
    assert "first 'b'" in caplog.text


@pytest.mark.parametrize("size", [(8, 8), (8, 13), (21, 9), (30, 30)])
def test_tiles_of_a_decoder_without_a_view_beyond_the_latent_give_its_image(size):
    def decode(x):
        assert x.shape[1] <= 8
        assert x.shape[2] <= 8
        return jnp.repeat(jnp.repeat(x[..., :3], 4, axis=1), 4, axis=2)

    x = latents(2, *size)
    expected = np.repeat(np.repeat(x[..., :3], 4, axis=1), 4, axis=2)
    np.testing.assert_allclose(decode_in_tiles(decode, jnp.asarray(x), 8, 4), expected, rtol=1e-5, atol=1e-6)


def test_tiles_are_traced_once_and_blend_without_a_seam():
    calls = []

    def decode(x):
        """Every tile has a level of its own, as where a decoder normalises over what it sees."""
        calls.append(x.shape)
        return jnp.broadcast_to(x.mean((1, 2, 3), keepdims=True), (x.shape[0], 32, 32, 3))

    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 32)[None, None, :, None], (1, 8, 32, 4))
    image = np.asarray(decode_in_tiles(decode, ramp, 8, 4))[0, 16, :, 0]
    assert calls == [(1, 8, 8, 4)]
    steps = np.diff(image)
    assert (steps >= -1e-6).all()
    assert steps.max() < 0.04  # between tiles the level rises by 0.19


def test_large_images_are_decoded_in_tiles(pipe):
    mesh = mesh_of(1)
    small, large = latents(1), latents(1, 8, 8)
    whole, tiled = Decoder(pipe, mesh), Decoder(pipe, mesh, tile=16)
    np.testing.assert_array_equal(tiled(small)[0], whole(small)[0])
    assert tiled(large)[0].shape == (1, 32, 32, 3)
    # A tile sees other neighbours and another mean: close, and not the same.
    assert 0 < np.abs(tiled(large)[0].astype(int) - whole(large)[0]).mean() < 40
    with pytest.raises(ValueError, match="--vae_tile=15: must be a multiple of 4"):
        Decoder(pipe, mesh, tile=15)


@pytest.fixture(scope="module")
def preview(tmp_path_factory):
    """A folder of a random AutoencoderTiny of four channels and four pixels a latent."""
    folder = tmp_path_factory.mktemp("preview") / "taesd"
    vae = build_model("AutoencoderTiny", TINY_VAE)
    write_params(folder, vae, random_params(vae, np.random.default_rng(0)))
    return folder


def test_a_small_vae_decodes_instead(pipe, preview):
    images, _ = Decoder(pipe, mesh_of(1), preview=preview)(latents(2))
    vae = read_model(preview)
    expected = vae.apply(read_params(preview, vae, "float32"), latents(2), method="decode")
    expected = np.clip(np.asarray(expected) * 127.5 + 127.5, 0, 255).round()
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_a_preview_that_does_not_fit_is_refused(pipe, tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json there; give an AutoencoderTiny's folder"):
        Decoder(pipe, mesh_of(1), preview=tmp_path)
    with pytest.raises(ValueError, match=r"AutoencoderKL with .*must be an AutoencoderTiny with"):
        Decoder(pipe, mesh_of(1), preview=tiny_model / "vae")
