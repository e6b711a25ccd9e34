"""What `sample` writes, what it does not draw again, and what it refuses."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from processes import finish, log_of, start
from safetensors.numpy import load_file, save_file
from tables import each_row
from tiny_model import write_model

from dspo_jax.conversion.import_model import import_model
from dspo_jax.pipelines.loading import Adapted, load_pipeline
from dspo_jax.sampling import drawing
from dspo_jax.sampling.decoding import Decoder
from dspo_jax.sampling.drawing import draw_batches, sample
from dspo_jax.sampling.folder import place_images, write_manifest
from dspo_jax.sampling.image_sampler import ImageRequest, ImageSampler, initial_noise
from dspo_jax.sampling.options import read_options
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Drawing, Rendering
from dspo_jax.weights.components import write_params

PROMPTS = [Prompt("a red heart"), Prompt("b")]
DRAWING = Drawing(steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def model(shallow_model):
    return shallow_model


@pytest.fixture
def draw(model, tmp_path):
    """Calls the command's function on the model, twice over: the folder's name is a heading."""

    def call(prompts=PROMPTS, models=None, seeds=(0, 5), init_latents=None, overwrite=False, **rendering):
        models = {"base": model, "again": model} if models is None else models
        return sample(
            models,
            prompts,
            tmp_path / "out",
            Rendering(**{"drawing": DRAWING, "batch_size": 4, **rendering}),
            seeds=seeds,
            init_latents=init_latents,
            overwrite=overwrite,
        )

    return call


def images_of(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def test_images_manifest_and_contact_sheet(draw, model, tmp_path):
    sheet = draw()
    out = tmp_path / "out"
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["seed"]) for r in records] == [(p.text, s) for p in PROMPTS for s in (0, 5)] * 2
    assert {r["sampler"] for r in records} == {"ddim"}
    settings = json.loads((out / "settings.json").read_text())
    # An output folder that an earlier version began goes on: neither a key nor a value may change.
    assert {key: value for key, value in settings.items() if not key.endswith("_sha256")} == {
        **{"models": [{"path": str(model), "step": None}] * 2, "sampler": "ddim", "steps": 2},
        **{"guidance_scale": 2.0, "guidance_interval": [0, 1000], "negative_prompt": None, "strength": 1.0},
        **{
            "eta": 0.0,
            "guidance_rescale": 0.0,
            "size": None,
            "compute_dtype": "float32",
            "format": "png",
            "vae_tile": 1024,
            "preview_vae": None,
            "optimize_noise": "",
            "optimize_steps": 0,
            "negative_model": None,
        },
    }
    assert [key for key in settings if key.endswith("_sha256")] == [
        *("weights_sha256", "prompts_sha256", "init_latents_sha256", "negative_sha256"),
    ]
    for record in records:
        with Image.open(out / record["file"]) as image:
            assert image.size == (16, 16)
    first, second = images_of(out / "0-base"), images_of(out / "1-again")
    assert list(first) == ["00000_0.png", "00000_5.png", "00001_0.png", "00001_5.png"]
    for name in first:  # the same model from the same noise
        np.testing.assert_array_equal(first[name], second[name])
    assert sheet == out / "contact_sheet.png"
    with Image.open(sheet) as image:
        assert image.width > 4 * 256
        assert image.height > 2 * 256


def test_what_is_there_is_not_drawn_again(draw, tmp_path, monkeypatch):
    draw()
    out = tmp_path / "out"
    before = images_of(out / "0-base")
    (out / "0-base" / "00001_0.png").unlink()
    kept = (out / "0-base" / "00000_0.png").stat().st_mtime_ns
    shutil.rmtree(out / "1-again")
    drawn = []
    plain = draw_batches

    def watched(pipe, requests, *args, **kwargs):
        drawn.append(len(requests))
        return plain(pipe, requests, *args, **kwargs)

    monkeypatch.setattr(drawing, "draw_batches", watched)
    draw(batch_size=1)
    assert drawn == [1, 4]
    assert (out / "0-base" / "00000_0.png").stat().st_mtime_ns == kept
    for name, image in images_of(out / "0-base").items():
        assert np.abs(image.astype(int) - before[name]).max() <= 1
    draw(seeds=(0, 5, 9))  # more seeds are no other settings
    assert drawn == [1, 4, 2, 2]
    draw(seeds=(0, 5, 9))
    assert drawn == [1, 4, 2, 2]


@pytest.mark.ci
def test_images_of_other_settings_are_refused_or_deleted_on_request(draw, tmp_path):
    draw(seeds=(0,))
    out = tmp_path / "out"
    before = images_of(out / "0-base")
    other = Drawing(steps=2, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"out: holds images with guidance_scale = 2\.0, here it is 3\.0"):
        draw(seeds=(0,), drawing=other)
    with pytest.raises(ValueError, match=r"holds images of other prompts; choose"):
        draw(seeds=(0,), prompts=[Prompt("another")])
    assert images_of(out / "0-base").keys() == before.keys()
    draw(seeds=(5,), drawing=other, overwrite=True)
    assert list(images_of(out / "0-base")) == ["00000_5.png", "00001_5.png"]


def test_a_folder_from_before_there_were_eta_and_rescaling_goes_on_without_them(draw, tmp_path):
    draw(seeds=(0,))
    path = tmp_path / "out" / "settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("eta") == settings.pop("guidance_rescale") == 0
    path.write_text(json.dumps(settings))
    draw(seeds=(0, 5))
    with pytest.raises(ValueError, match=r"holds images with eta = 0\.0, here it is 1\.0"):
        draw(seeds=(0,), drawing=Drawing(steps=2, guidance_scale=2.0, eta=1.0))
    with pytest.raises(ValueError, match=r"with guidance_rescale = 0\.0, here it is 0\.5"):
        draw(seeds=(0,), drawing=Drawing(steps=2, guidance_scale=2.0, guidance_rescale=0.5))


def test_images_of_a_model_that_was_made_again_are_not_taken_for_its(draw, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "model")
    draw(seeds=(0,), models={"mine": other})
    shutil.copytree(model, other, dirs_exist_ok=True)  # the same, if later
    draw(seeds=(0,), models={"mine": other})
    pipe = load_pipeline(other)
    weights = pipe.read_params("unet")
    weights["conv_out"]["bias"] = weights["conv_out"]["bias"] + 1
    write_params(other / "unet", pipe.networks["unet"], weights)
    with pytest.raises(ValueError, match=r"out: holds images of other weights; choose another folder"):
        draw(seeds=(0,), models={"mine": other})


def test_a_folder_without_an_image_is_free_for_other_settings(draw, tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"no\.png: undecodable image"):
        draw(seeds=(0,), prompts=[Prompt("edit", tmp_path / "no.png")])
    draw(seeds=(0,))
    assert len(images_of(tmp_path / "out" / "0-base")) == 2


def test_other_peoples_files_are_not_touched(draw, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match="not empty, and not made by this command"):
        draw(overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.ci
def test_any_size_format_and_noise(draw, model, tmp_path):
    noise = np.random.default_rng(0).standard_normal((2, 6, 10, 4)).astype(np.float32)
    changes = {"models": {"base": model}, "seeds": (3,), "size": (24, 40), "image_format": "webp"}
    draw(init_latents=noise, **changes)
    requests = [ImageRequest(prompt.text, i, 3) for i, prompt in enumerate(PROMPTS)]
    pipe = load_pipeline(model)
    expected, _ = Decoder(pipe)(ImageSampler(pipe, DRAWING).sample_latents(requests, noise))
    for found, image in zip(images_of(tmp_path / "out" / "0-base").values(), expected, strict=True):
        assert found.shape == (24, 40, 3)
        assert np.abs(found.astype(int) - image).max() <= 1
    with pytest.raises(
        ValueError, match=r"--init_latents: of shape \(1, 6, 10, 4\), but base needs \(2, 6, 10"
    ):
        draw(init_latents=noise[:1], **changes)
    for value in (np.nan, 1e300):
        with pytest.raises(ValueError, match="--init_latents: holds numbers that are not finite in float32"):
            draw(init_latents=np.full(noise.shape, value), **changes)
    file = tmp_path / "noise.npy"
    for mapped, message in ((noise[:, :3], "of shape"), (noise * np.nan, "holds numbers that are not")):
        np.save(file, mapped)
        with pytest.raises(ValueError, match=re.escape(f"--init_latents={file}: {message}")):
            draw(init_latents=np.load(file, mmap_mode="r"), **changes)
    with pytest.raises(ValueError, match=r"--seeds: 2 of them, but --init_latents are those of one"):
        draw(init_latents=noise, **{**changes, "seeds": (0, 1)})


def test_a_size_that_the_vae_cannot_halve_is_refused(draw, tiny_model):
    with pytest.raises(ValueError, match="--width=22: must be a positive multiple of 4 for this model"):
        draw(models={"base": tiny_model}, size=(16, 22))


@pytest.mark.ci
def test_editing_goes_from_the_image_to_the_prompt(draw, model, tmp_path):
    picture = tmp_path / "picture.png"
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], axis=-1)).save(picture)
    prompts = [Prompt("a red heart", picture)]
    pipe = load_pipeline(model)
    pixels = np.asarray(Image.open(picture).resize((16, 16), Image.Resampling.BILINEAR))
    vae = {"vae": pipe.read_params("vae", "float32")}
    moments = pipe.encode_moments(vae, pixels[None] / np.float32(127.5) - 1)
    decoded = Decoder(pipe)(moments[..., :4])[0][0].astype(int)
    distance = []
    for strength in (0.02, 0.5, 1.0):
        drawing = Drawing(steps=50, guidance_scale=1.0, strength=strength)
        draw(prompts=prompts, models={"base": model}, seeds=(0,), drawing=drawing, overwrite=True)
        (image,) = images_of(tmp_path / "out" / "0-base").values()
        distance.append(np.abs(image.astype(int) - decoded).mean())
    assert distance[0] < distance[1] < distance[2]
    assert distance[0] < 0.6 * distance[2]  # a decoder of random weights shows little noise as much


def test_an_image_that_cannot_be_read_is_refused_by_name(draw, model, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png: undecodable image"):
        draw(prompts=[Prompt("a", broken)], models={"base": model}, drawing=Drawing(steps=2, strength=0.5))


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_a_model_that_draws_nothing_finite_is_refused(draw, model, tmp_path, component):
    broken = shutil.copytree(model, tmp_path / "broken")
    file = broken / component / "diffusion_pytorch_model.safetensors"
    save_file({name: np.full_like(value, np.nan) for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"broken: the picture of 'a red heart' with seed 5 is not finite"):
        draw(models={"mine": broken}, seeds=(5,))
    assert not images_of(tmp_path / "out" / "0-mine")


def test_batches_share_one_program(model, monkeypatch):
    pipe, traced = load_pipeline(model), []
    plain = type(pipe).predict

    def watched(self, *args, **kwargs):
        traced.append(args[1].shape)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "predict", watched)
    requests = [ImageRequest("a", i, 0) for i in range(5)]
    batches = draw_batches(pipe, requests, Rendering(DRAWING, batch_size=2))
    assert sum(map(len, batches)) == 5
    assert traced == [(2 * 8, 4, 4, 4)]  # filled up to the eight devices, without and with the prompt


def test_guidance_acts_in_its_interval_only(model):
    pipe, requests = load_pipeline(model), [ImageRequest("a red heart", 0, 0)]
    noise = initial_noise(requests, (4, 4, 4))

    def latents(scale, **interval):
        drawing = Drawing(steps=4, guidance_scale=scale, **interval)
        return np.asarray(ImageSampler(pipe, drawing).sample_latents(requests, noise))

    plain, guided = latents(1.0), latents(5.0)
    np.testing.assert_allclose(latents(5.0, guidance_interval=(998, 999)), plain, rtol=1e-4, atol=1e-5)
    part = latents(5.0, guidance_interval=(0, 500))
    assert np.abs(part - plain).max() > 1e-3
    assert np.abs(part - guided).max() > 1e-3


@pytest.mark.ci
def test_a_negative_model_is_noted_and_changes_the_images(draw, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "npo")
    weights = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] += 1.0
    save_file(weights, other / "unet" / "diffusion_pytorch_model.safetensors")
    out, drawn = tmp_path / "out", {}
    for negative in (None, str(model), str(other)):
        draw(models={"base": model}, seeds=(0,), negative_model=negative, overwrite=True)
        drawn[negative] = images_of(out / "0-base")
        records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
        assert [record["negative_model"] for record in records] == [negative] * 2
    for name, image in drawn[None].items():
        difference = {
            key: np.abs(image.astype(int) - of_model[name]).max() for key, of_model in drawn.items()
        }
        assert difference[str(model)] <= 1
        assert difference[str(other)] > 1
    with pytest.raises(ValueError, match=r"out: holds images with negative_model = {.*}, here it is None"):
        draw(models={"base": model}, seeds=(0,))


@each_row(
    ("spoil", "message"),
    [
        (shutil.rmtree, "npo: "),
        (
            lambda folder: write_model(folder, family="sd21"),
            "its unet is of another architecture than --model=",
        ),
        (
            lambda folder: (folder / "text_encoder" / "model.safetensors").write_bytes(b"other"),
            "its text_encoder has other weights, and only its unet would be used; name a model of the",
        ),
    ],
    ids=["missing", "architecture", "text"],
)
def test_a_negative_model_of_another_kind_is_refused(model, tmp_path, spoil, message):
    other = shutil.copytree(model, tmp_path / "npo")
    spoil(other)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^--negative_model=.*npo: [^\n]*{message}"):
        Rendering(DRAWING, negative_model=str(other)).load_negative(load_pipeline(model))


OPTIONS = {
    **{"model": ["m"], "prompts": "a", "out": "out", "sampler": None, "steps": 50, "guidance_scale": 7.5},
    **{"guidance_interval": ["0", "1000"], "seeds": ["0"], "batch_size": 16, "negative_prompt": None},
    **{"init_image": None, "strength": None, "init_latents": None, "height": None, "width": None},
    **{"optimize_noise": None, "optimize_steps": 50, "reward_dir": "rewards"},
    **{"format": "png", "compute_dtype": None, "vae_tile": 0, "preview_vae": None, "overwrite": False},
    **{"allow_outside": False, "eta": 0.0, "guidance_rescale": 0.0, "max_chunks": None, "clip_skip": None},
    "max_sequence_length": None,
    "negative_model": None,
    **dict.fromkeys(("skip_layers", "skip_layer_scale", "skip_layer_start", "skip_layer_stop")),
}


@each_row(
    ("changes", "message"),
    [
        ({"prompts": "missing.txt"}, "--prompts=missing.txt: no such file"),
        ({"seeds": ["1", "x"]}, "--seeds=1,x: must be whole numbers"),
        ({"seeds": ["1", "1"]}, "--seeds=1,1: must be different numbers from 0 to 4294967295"),
        ({"height": 64}, "--height and --width: give both or none"),
        ({"strength": 0.5}, "--strength=0.5: is of editing an image"),
        ({"sampler": "euler", "eta": 0.5}, "eta = 0.5: sampler 'euler' has none; .*: ddim"),
        ({"eta": 1.5}, "eta = 1.5: must be between 0 and 1"),
        ({"negative_prompt": "caf\udce9"}, "--negative_prompt: .* has half a character in it"),
        ({"init_image": "none.png"}, "--init_image=none.png: no such file"),
        ({"guidance_interval": ["9", "3"]}, "--guidance_interval=9,3: the first must not be above"),
        ({"guidance_scale": math.nan}, "--guidance_scale=nan: must be a finite number"),
        ({"guidance_rescale": 1.5}, "--guidance_rescale=1.5: must be between 0 and 1"),
        ({"skip_layers": ["7", "x"]}, "--skip_layers=7,x: must be numbers of blocks, as 7,8,9"),
        ({"skip_layer_stop": 0.5}, "--skip_layer_stop=0.5: no layers are skipped; give --skip_layers=7,8,9"),
        ({"guidance_interval": ["9"]}, "--guidance_interval=9: must be two timesteps"),
        (
            {"init_latents": "pyproject.toml"},
            r"--init_latents=pyproject.toml: not a whole \.npy file of numbers",
        ),
        (
            {"negative_model": "npo", "guidance_scale": 1.0},
            "--negative_model=npo: is a half of guidance, .*; give a scale above 1",
        ),
        (
            {"negative_model": "npo", "optimize_noise": "aesthetic"},
            "--negative_model=npo: does not go with --optimize_noise; give one of them",
        ),
        ({"init_latents": "tests"}, "--init_latents=tests: no such file, or not a regular one"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_options(SimpleNamespace(**OPTIONS | changes))


NOISE = np.random.default_rng(0).standard_normal((1, 2, 3, 4))


@each_row(
    "noise",
    [NOISE.astype(dtype) for dtype in ("<f2", ">f4", "<f8")] + [np.asfortranarray(NOISE)],
    ids=["float16", "big_endian", "float64", "fortran"],
)
def test_noise_of_any_layout_is_read(tmp_path, noise):
    np.save(tmp_path / "noise.npy", noise)
    read = read_options(SimpleNamespace(**OPTIONS | {"init_latents": str(tmp_path / "noise.npy")}))
    np.testing.assert_array_equal(read.init_latents, noise)


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 2, 4), }"


@each_row(
    ("header", "message"),
    [
        (HEADER.replace("<f4", "|O"), "not a whole .npy file of numbers (Array can't be memory-mapped"),
        (HEADER.replace("<f4", "|V1"), "|V1[1, 2, 2, 4]; must be floats [prompts, h, w, C]"),  # float8
        (HEADER.replace("<f4", "<c8").replace("(1, 2", "(1, 1"), "complex64[1, 1, 2, 4]; must be floats"),
        (HEADER.replace("1, 2", "10000, 10000, 10000"), "not a whole .npy file of numbers (mmap length is"),
        (HEADER.replace("1, 2, 2", "4294967296, 4294967296, 4"), "not a whole .npy file of numbers"),
        (HEADER.replace("(1,", "(-1,"), "not a whole .npy file of numbers (negative dimensions"),
        (HEADER.replace("(1,", f"({'9' * 30},"), "not a whole .npy file of numbers (Python int too large"),
        (HEADER.replace("(1,", "(True,"), "not a whole .npy file of numbers"),
        (
            HEADER.replace("(1,", "(2,"),
            "not a whole .npy file of numbers (mmap length is greater",
        ),  # cut short
        (HEADER.replace("1, 2, ", ""), "float32[2, 4]; must be floats [prompts, h, w, C]"),
        (HEADER[:-3], "not a whole .npy file of numbers"),
        ("-" * 9000 + "1", "not a whole .npy file of numbers"),
        ("x" * 9000, "not a whole .npy file of numbers"),
    ],
)
def test_npy_files_whose_header_lies_are_refused(tmp_path, header, message):
    file = tmp_path / "noise.npy"
    file.write_bytes(b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(64))
    options = SimpleNamespace(**OPTIONS | {"init_latents": str(file)})
    with pytest.raises(ValueError, match=re.escape(f"--init_latents={file}: {message}")) as caught:
        read_options(options)
    assert len(str(caught.value).replace(str(file), "")) < 200


def test_editing_draws_three_quarters_anew_unless_told(tmp_path):
    picture = tmp_path / "p.png"
    picture.write_bytes(b"pixels")
    plain = read_options(SimpleNamespace(**OPTIONS))
    assert (plain.rendering.drawing.strength, plain.prompts) == (1.0, [Prompt("a")])
    edited = read_options(SimpleNamespace(**OPTIONS | {"init_image": str(picture)}))
    assert (edited.rendering.drawing.strength, edited.prompts) == (0.75, [Prompt("a", picture)])
    # The folder has a copy of the picture, and a line of its manifest names it.
    out, requests = tmp_path / "out", [ImageRequest("a", 0, 0)]
    files = place_images(out, ["m"], requests, "png")
    write_manifest(out, {"m": "model"}, edited.prompts, files, edited.rendering)
    [record] = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    assert (out / record["init_image"]).read_bytes() == picture.read_bytes()
    write_manifest(out, {"m": "model"}, plain.prompts, files, plain.rendering)
    assert "init_image" not in json.loads((out / "manifest.jsonl").read_text())
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "image": "p.png"}\n"b"\n')
    with pytest.raises(ValueError, match="1 of 2 have an image; give all of them one, or --init_image"):
        read_options(SimpleNamespace(**OPTIONS | {"prompts": str(tmp_path / "p.jsonl")}))


@pytest.mark.ci
def test_an_added_lora_draws_as_the_model_that_it_was_imported_with(draw, model, tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    file, random = tmp_path / "lora.safetensors", np.random.default_rng(0)
    shapes = {"A": (2, 8), "B": (8, 2)}
    halves = {part: random.standard_normal(shape, np.float32) for part, shape in shapes.items()}
    save_file({f"{layer}.lora_{part}.weight": half for part, half in halves.items()}, file)
    import_model(model, tmp_path / "folded", loras=[f"{file}:0.5"])
    adapted = Adapted(model, (f"{file}:0.5",))
    draw(models={"base": model, "folded": tmp_path / "folded", "added": adapted}, seeds=(0,))
    folders = [images_of(tmp_path / "out" / name) for name in ("0-base", "1-folded", "2-added")]
    base, folded, added = (images["00000_0.png"].astype(int) for images in folders)
    assert np.abs(added - folded).max() <= 1
    assert np.abs(added - base).mean() > 1
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["model"] == f"{model}, {file}:0.5"
    with pytest.raises(ValueError, match="holds images with models = "):
        draw(models={"base": model, "folded": tmp_path / "folded", "added": model}, seeds=(0,))


@pytest.mark.slow
def test_two_processes_share_the_images(model, tmp_path):
    options = [f"--model={model}", "--prompts=a red heart", "--seeds=0,1,2", "--steps=2", "--batch_size=1"]
    for name, processes in (("one", 1), ("two", 2)):
        flags = [*options, f"--out={tmp_path / name}"]
        started = start("dspo_jax.sample", flags, tmp_path / f"{name}-log", processes=processes)
        assert finish(started) == [0] * processes, log_of(tmp_path / f"{name}-log", 0).read_text()
    folder = f"0-{model.name}"
    one, two = images_of(tmp_path / "one" / folder), images_of(tmp_path / "two" / folder)
    assert one.keys() == two.keys()
    for name in one:
        assert np.abs(one[name].astype(int) - two[name]).max() <= 1
    names = [(tmp_path / name / "manifest.jsonl").read_text() for name in ("one", "two")]
    assert names[0] == names[1]
