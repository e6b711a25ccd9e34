"""A diffusers folder as one value: captions to tokens, images to latents and back, its fingerprint."""

import dataclasses
import inspect
import json
import logging
import re
import shutil

import jax
import numpy as np
import pytest
from model_folders import make_run
from tables import each_row
from tiny_model import RESOLUTION, TINY_VAE, VAE, random_params, write_model, write_tokenizer

from dspo_jax.models.model import build_model
from dspo_jax.pipelines.conditioning_inputs import prompt_batch
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.weights.components import write_params
from dspo_jax.weights.layout import flatten

START, END = 512, 513


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the model that a test may spoil; its folder has the same name."""
    return shutil.copytree(tiny_model, tmp_path / tiny_model.name)


def test_captions_are_padded_with_the_end_token(tiny_model):
    tokens = load_pipeline(tiny_model).tokenize(["ab", ""])
    assert tokens.shape == (2, 1, 77)
    assert tokens.dtype == np.int32
    assert tokens[0, 0, [0, 3]].tolist() == [START, END]
    assert set(tokens[0, 0, 4:]) == {END}
    assert tokens[1, 0].tolist() == [START] + [END] * 76


@pytest.fixture(scope="module")
def sdxl_model(tmp_path_factory):
    """A folder of SDXL's shape; read it, never write to it."""
    return write_model(tmp_path_factory.mktemp("model") / "sdxl", family="sdxl")


def test_each_text_encoder_has_its_own_tokenizer(sdxl_model):
    pipe = load_pipeline(sdxl_model)
    tokens = pipe.tokenize(["ab", ""])
    assert tokens.shape == (2, 2, 77)
    np.testing.assert_array_equal(tokens[0, 0, :4], tokens[0, 1, :4])
    assert set(tokens[0, 0, 4:]) == {END}
    assert set(tokens[0, 1, 4:]) == {0}  # OpenCLIP's pads with "!"
    np.testing.assert_array_equal(pipe.empty_tokens, tokens[1])


def encode_captions(model, captions):
    """Conditioning of the denoiser by captions."""
    pipe = load_pipeline(model)
    params = {name: pipe.read_params(name) for name in pipe.text_encoders}
    batch = prompt_batch(pipe, pipe.tokenize(captions), (16, 16))
    return jax.jit(pipe.encode_conditioning)(params, batch)


@pytest.mark.ci
def test_sdxl_text_is_what_diffusers_gives_its_unet(sdxl_model):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from torch_modules import assert_close

    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl_model, local_files_only=True)
    with torch.no_grad():
        states, no_states, pooled, no_pooled = theirs.encode_prompt("a red heart", device="cpu")
    text = encode_captions(sdxl_model, ["a red heart", ""])
    assert text.states.shape == (2, 77, 20)
    assert text.pooled.shape == (2, 10)
    for ours, positive, negative in ((text.states, states, no_states), (text.pooled, pooled, no_pooled)):
        assert_close(ours[:1], positive.numpy(), 1e-4)
        np.testing.assert_array_equal(ours[1:], negative.numpy())
        assert not ours[1].any()


def test_an_empty_caption_is_encoded_where_the_model_does_not_ask_for_zeros(sdxl_model, tmp_path):
    model = shutil.copytree(sdxl_model, tmp_path / "model")
    edit_json(model / "model_index.json", force_zeros_for_empty_prompt=False)
    text = encode_captions(model, ["a red heart", ""])
    assert text.states[1].any()
    assert text.pooled[1].any()


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@each_row(
    ("family", "component", "changes", "message"),
    [
        (
            "sd15",
            "unet",
            {"in_channels": 9},
            "in_channels = 9, but text to image with the VAE and text encoders",
        ),
        (
            "sd15",
            "unet",
            {"cross_attention_dim": 20},
            "cross_attention_dim = 20, but .* needs 12; use a UNet",
        ),
        (
            "sdxl",
            "unet",
            {"addition_embed_type": None},
            "addition_embed_type = None, but .* needs 'text_time'",
        ),
        (
            "sdxl",
            "unet",
            {"projection_class_embeddings_input_dim": 40},
            "projection_class_embeddings_input_dim = 40, but .* needs 46",
        ),
        (
            "sdxl",
            "text_encoder_2",
            {"architectures": ["CLIPTextModel"]},
            "is of class CLIPTextModel, but model_index.json says CLIPTextModelWithProjection; correct",
        ),
    ],
)
def test_parts_of_different_models_are_refused(
    family, component, changes, message, tiny_model, sdxl_model, tmp_path
):
    model = shutil.copytree({"sd15": tiny_model, "sdxl": sdxl_model}[family], tmp_path / "model")
    config = model / component / "config.json"
    edit_json(config, **changes)
    with pytest.raises(ValueError, match=f"^{re.escape(str(config))}: {message}[^\n]*$"):
        load_pipeline(model)


def test_a_part_of_another_kind_is_refused(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    edit_json(model / "model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])
    encoder = model / "text_encoder" / "config.json"
    edit_json(encoder, architectures=["CLIPTextModelWithProjection"], projection_dim=8)
    message = "text_encoder is CLIPTextModelWithProjection, but a StableDiffusionPipeline needs CLIPTextModel"
    with pytest.raises(ValueError, match=f"^{re.escape(str(model / 'model_index.json'))}: {message}$"):
        load_pipeline(model)


def test_a_tiny_autoencoder_can_stand_in_for_the_vae(tiny_model, tmp_path):
    """Its latents are the UNet's, and its posterior has no width."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(model / "vae")
    edit_json(model / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    vae = build_model("AutoencoderTiny", TINY_VAE)
    write_params(model / "vae", vae, random_params(vae, np.random.default_rng(0)))
    pipe = load_pipeline(model)
    assert (pipe.vae_scale_factor, pipe.latent_channels, pipe.scaling_factor) == (4, 4, 1.0)
    params = {"vae": pipe.read_params("vae", "float32")}
    moments = pipe.encode_moments(params, np.zeros((2, RESOLUTION, RESOLUTION, 3), np.float32))
    assert moments.shape == (2, 4, 4, 8)
    assert moments[..., :4].any()
    assert not moments[..., 4:].any()
    assert pipe.decode(params, moments[..., :4]).shape == (2, RESOLUTION, RESOLUTION, 3)


def test_a_long_caption_is_cut_with_one_warning(tiny_model, caplog):
    pipe = load_pipeline(tiny_model)
    with caplog.at_level(logging.WARNING, logger="absl"):
        fitting = pipe.tokenize(["x" * 75])
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="absl"):
        cut = pipe.tokenize(["short", "y" + "x" * 89, "x" * 100])
    assert cut.shape == (3, 1, 77)
    assert cut[1, 0, -1] == END
    assert END not in cut[1, 0, :-1]
    assert fitting[0, 0, -1] == END
    (record,) = caplog.records
    assert re.match("2 caption\\(s\\) longer than 77 tokens were cut, first 'yx+'$", record.getMessage())


def test_a_vae_with_a_shift_that_the_class_does_not_read_is_refused(model):
    edit_json(model / "vae" / "config.json", shift_factor=0.0609)
    with pytest.raises(ValueError, match=r"vae/config\.json: shift_factor = 0\.0609, which this class"):
        load_pipeline(model)


@each_row("shift", [None, 0.0609])
def test_moments_and_images_match_diffusers(shift, tiny_model):
    """As diffusers' pipelines do it around the VAE; a shift moves the mean and not the deviation."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from torch_modules import assert_close, to_nchw, to_nhwc

    theirs = diffusers.AutoencoderKL.from_pretrained(tiny_model / "vae")
    pipe = load_pipeline(tiny_model)
    shifted = build_model("AutoencoderKL", {**VAE, "shift_factor": shift})
    pipe = dataclasses.replace(pipe, networks={**pipe.networks, "vae": shifted})
    shift, scale = shift or 0.0, VAE["scaling_factor"]
    draw = np.random.default_rng(0)
    images = draw.uniform(-1, 1, (2, RESOLUTION, RESOLUTION, 3)).astype(np.float32)
    latents = draw.standard_normal((2, 4, 4, 4), np.float32)
    with torch.no_grad():
        posterior = theirs.encode(to_nchw(images)).latent_dist
        decoded = theirs.decode(to_nchw(latents) / scale + shift).sample
    params = {"vae": pipe.read_params("vae", "float32")}
    moments = pipe.encode_moments(params, images)
    assert moments.shape == (2, 4, 4, 2 * pipe.latent_channels)
    assert moments.dtype == np.float32
    mean, deviation = scale * (to_nhwc(posterior.mean) - shift), scale * to_nhwc(posterior.std)
    assert_close(moments[..., :4], mean, 1e-4)
    assert_close(moments[..., 4:], deviation, 1e-4)
    assert_close(pipe.decode(params, latents), to_nhwc(decoded), 1e-4)
    assert pipe.vae_scale_factor == 4


def test_the_fingerprint_follows_the_vae_and_the_tokenizer_only(tiny_model, model, tmp_path):
    original = load_pipeline(tiny_model).fingerprint()
    assert json.loads(json.dumps(original)) == original
    assert load_pipeline(model).fingerprint() == original

    other = write_model(tmp_path / "other", seed=1)
    shutil.copytree(other / "unet", model / "unet", dirs_exist_ok=True)
    assert load_pipeline(model).fingerprint() == original

    shutil.copytree(other / "vae", model / "vae", dirs_exist_ok=True)
    changed = load_pipeline(model).fingerprint()
    assert changed.pop("vae_sha256") != original["vae_sha256"]
    assert changed.items() <= original.items()

    edit_json(model / "tokenizer" / "vocab.json", **{"!": 1, '"': 0})
    changed = load_pipeline(model).fingerprint()
    for key in ("tokens_sha256", "tokenizer_sha256"):
        assert changed[key] != original[key]
    write_tokenizer(model / "tokenizer", pad_token="!")
    assert load_pipeline(model).fingerprint()["pad_token_id"] == [0]
    assert original["pad_token_id"] == [END]


def test_the_fingerprint_names_what_latents_depend_on(tiny_model):
    fingerprint = load_pipeline(tiny_model).fingerprint()
    assert fingerprint["model"] == tiny_model.name
    assert fingerprint["scaling_factor"] == VAE["scaling_factor"]
    assert fingerprint["shift_factor"] == 0.0
    assert fingerprint["vae_scale_factor"] == 4
    assert fingerprint["latent_channels"] == 4


@each_row("component", ["unet", "vae", "text_encoder"])
def test_weights_are_read_as_stored_or_as_asked(component, tiny_model):
    pipe = load_pipeline(tiny_model)
    for dtype, expected in ((None, "float32"), ("bfloat16", "bfloat16")):
        leaves = flatten(pipe.read_params(component, dtype)).values()
        assert {str(leaf.dtype) for leaf in leaves} == {expected}


@each_row(
    ("sample_size", "latent_size"), [(4, (4, 4)), ([6, 4], (6, 4)), (None, (64, 64)), ("absent", (64, 64))]
)
def test_the_size_of_the_images_is_read_as_diffusers_reads_it(sample_size, latent_size, model, caplog):
    path = model / "unet" / "config.json"
    config = json.loads(path.read_text()) | {"sample_size": sample_size}
    if sample_size == "absent":
        del config["sample_size"]
    path.write_text(json.dumps(config))
    pipe = load_pipeline(model)
    with caplog.at_level(logging.WARNING, logger="absl"):
        sizes = [pipe.latent_size, pipe.latent_size]
    assert sizes == [latent_size, latent_size]
    assert pipe.image_size == (4 * latent_size[0], 4 * latent_size[1])
    said = [record.getMessage() for record in caplog.records]
    if latent_size == (64, 64):
        assert said == [
            f"{path}: no sample_size; images of 256 x 256 pixels are taken, as diffusers' pipelines do"
        ]
    else:
        assert not said


def test_sdxl_without_a_size_draws_at_that_of_its_pipeline_in_diffusers(sdxl_model, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = shutil.copytree(sdxl_model, tmp_path / "model")
    theirs = diffusers.StableDiffusionXLPipeline.__init__
    assert "else 128" in inspect.getsource(theirs)  # of default_sample_size
    edit_json(model / "unet" / "config.json", sample_size=None)
    assert load_pipeline(model).latent_size == (128, 128)


def test_images_that_are_not_square_have_no_side(model):
    edit_json(model / "unet" / "config.json", sample_size=[6, 4])
    line = (
        "sample_size = [6, 4]: images of 24 x 16 pixels are not square; name the resolution, e.g. --config."
    )
    with pytest.raises(ValueError, match=re.escape(f"{model / 'unet' / 'config.json'}: {line}")):
        _ = load_pipeline(model).image_side


@each_row(
    ("name", "changes", "message"),
    [
        (
            "unet/config.json",
            {"sample_size": 10**9},
            "sample_size = 1000000000 must be an integer from 1 to 4096",
        ),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block = 1000000000 must be an integer"),
        (
            "vae/config.json",
            {"norm_num_groups": 3},
            "block_out_channels = 4 is no multiple of norm_num_groups = 3",
        ),
        (
            "text_encoder/config.json",
            {"vocab_size": "514"},
            "vocab_size = '514' must be an integer from 1 to",
        ),
        ("text_encoder/config.json", {"architectures": {"a": 1}}, "model class {'a': 1} is not supported"),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 10**9},
            "num_train_timesteps = 1000000000 must",
        ),
        (
            "scheduler/scheduler_config.json",
            {"steps_offset": "1"},
            "steps_offset = '1' must be an integer from 0",
        ),
        (
            "scheduler/scheduler_config.json",
            {"set_alpha_to_one": 1},
            "set_alpha_to_one = 1 must be true or false",
        ),
        ("model_index.json", {"_class_name": ["a"]}, "_class_name = ['a'] is not supported; allowed: Stable"),
        (
            "model_index.json",
            {"force_zeros_for_empty_prompt": "no"},
            "prompt = 'no' must be true or false, or null",
        ),
    ],
)
def test_a_value_of_another_type_or_size_is_refused_by_file_and_key(name, changes, message, model):
    edit_json(model / name, **changes)
    with pytest.raises(ValueError, match=f"^{re.escape(str(model / name))}: .*{re.escape(message)}[^\n]*$"):
        load_pipeline(model)


@each_row(
    "name",
    [
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "vae/config.json",
    ],
)
def test_a_missing_file_is_named(name, model):
    (model / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(model / name))}: no such file; [^\n]+$"):
        load_pipeline(model)


def test_a_run_is_read_at_the_step_that_its_name_asks_for(model, tmp_path):
    run = make_run(tmp_path / "run", model, steps=(1, 2, 3), scores={1: 0.7, 2: 0.5, 3: 0.6})
    asked = [str(run), f"{run}@2", f"{run}@best"]
    assert [load_pipeline(name).step for name in asked] == [3, 2, 1]
    with pytest.raises(FileNotFoundError, match=re.escape("holds no step 4 (it has: 1, 2, 3)")):
        load_pipeline(f"{run}@4")


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"^{re.escape(str(tmp_path))}: neither a diffusers folder .no model_ind"
    ):
        load_pipeline(tmp_path)


@each_row("name", ["model_index.json", "scheduler/scheduler_config.json"])
def test_malformed_json_is_named(name, model):
    (model / name).write_text("{")
    with pytest.raises(ValueError, match=f"^{re.escape(str(model / name))}: not valid JSON [^\n]+$"):
        load_pipeline(model)


@each_row("class_name", ["FluxPipeline", None])
def test_another_pipeline_class_is_refused(class_name, model):
    (model / "model_index.json").write_text(json.dumps({"_class_name": class_name} if class_name else {}))
    with pytest.raises(
        ValueError, match=f"model_index.json: _class_name = {class_name!r} is not supported; allowed: Sta"
    ):
        load_pipeline(model)
