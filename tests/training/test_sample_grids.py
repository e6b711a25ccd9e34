"""Grids of samples during training, on meshes of 8 devices, against the `sample` command's own images."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_model import write_pairs

from dspo_jax.data.datasets import read_datasets
from dspo_jax.images.contact_sheet import contact_sheet
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.parallel.rules import make_shardings
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.rewards import Reward, load_reward
from dspo_jax.sampling.drawing import draw_batches
from dspo_jax.sampling.image_sampler import ImageRequest, ImageSampler
from dspo_jax.sampling.rendering import Drawing, Rendering
from dspo_jax.training import sample_grids
from dspo_jax.training.sample_grids import SampleGrids, first_captions
from dspo_jax.training.watch_settings import SampleSettings

PROMPTS, SEEDS = ("a red heart", "b", "c"), (0, 5)
STEPS, GUIDANCE = 2, 7.5
SIDE = 256  # of an image on the sheet, 16 times that of the model


@pytest.fixture(scope="module")
def pipe(shallow_model: Path) -> Pipeline:
    return load_pipeline(shallow_model)


def place(pipe, mesh, dtype="float32"):
    params = {name: pipe.read_params(name, dtype) for name in ("unet", *pipe.text_encoders)}
    return jax.device_put(params, make_shardings(params, mesh))


def make_grids(pipe, params, mesh, workdir, **changes):
    arguments = {"prompts": PROMPTS, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **changes}
    dtype = arguments.pop("compute_dtype", "float32")
    rewards = arguments.pop("rewards", ())
    settings = SampleSettings(every=1, seeds=SEEDS, **arguments)
    return SampleGrids(
        pipe,
        params,
        mesh,
        workdir,
        settings,
        prompts=settings.prompts,
        compute_dtype=dtype,
        rewards=rewards,
    )


def read_grid(path):
    """The images on a sheet, [rows, base or current, seeds, SIDE, SIDE, 3]."""
    with Image.open(path) as image:
        sheet = np.asarray(image, int)
    lefts = [4 + i * (SIDE + 4) + (4 if i >= len(SEEDS) else 0) for i in range(2 * len(SEEDS))]
    tops = [28 + i * (14 + SIDE + 4) + 14 for i in range(len(PROMPTS))]
    images = [[sheet[top : top + SIDE, left : left + SIDE] for left in lefts] for top in tops]
    return np.asarray(images).reshape(len(PROMPTS), 2, len(SEEDS), SIDE, SIDE, 3)


@pytest.mark.ci
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_the_base_stays_and_the_current_columns_follow_the_parameters(pipe, tmp_path, sizes):
    mesh = make_mesh(sizes)
    params = place(pipe, mesh)
    assert ("fsdp" in sizes) != params["unet"]["conv_in"]["kernel"].sharding.is_fully_replicated
    grids = make_grids(pipe, params, mesh, tmp_path)
    grids.write(0, params)
    grids.write(500, {**params, "unet": jax.tree.map(lambda leaf: 0.8 * leaf, params["unet"])})
    names = [path.name for path in sorted((tmp_path / "samples").iterdir())]
    assert names == ["step_000000.png", "step_000500.png"]
    start, later = (read_grid(tmp_path / "samples" / name) for name in names)
    np.testing.assert_array_equal(start[:, 0], start[:, 1])
    np.testing.assert_array_equal(later[:, 0], start[:, 0])
    assert np.abs(later[:, 1] - later[:, 0]).mean() > 1

    requests = [ImageRequest(prompt, i, seed) for i, prompt in enumerate(PROMPTS) for seed in SEEDS]
    rendering = Rendering(Drawing(steps=STEPS, guidance_scale=GUIDANCE), batch_size=3)
    batches = draw_batches(pipe, requests, rendering)
    images = [image.astype(int) for batch in batches for _, image in batch]
    scale = SIDE // 16
    alone = np.asarray(images).repeat(scale, axis=1).repeat(scale, axis=2).reshape(start[:, 0].shape)
    assert np.abs(start[:, 0] - alone).max() <= 1


def test_many_images_are_drawn_in_several_calls(pipe, tmp_path, monkeypatch):
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    params = place(pipe, mesh)
    together, apart = tmp_path / "together", tmp_path / "apart"
    for workdir, size in ((together, 6), (apart, 4)):
        monkeypatch.setattr(sample_grids, "_IMAGES_PER_DEVICE", size)
        make_grids(pipe, params, mesh, workdir).write(1, params)
    grids = [read_grid(workdir / "samples" / "step_000001.png") for workdir in (together, apart)]
    assert np.abs(grids[0] - grids[1]).max() <= 1


def test_each_image_has_its_rewards_below_it(pipe, tmp_path, monkeypatch):
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    params, sheets = place(pipe, mesh), []

    def keep(rows, columns, scale, labels, captions):
        sheets.append((rows, captions))
        return contact_sheet(rows, columns, scale, labels, captions)

    monkeypatch.setattr(sample_grids, "contact_sheet", keep)
    known = Reward("known", "", lambda images, prompts: [len(prompt) for prompt in prompts])
    fails, warnings = Reward("fails", "", lambda images, prompts: 1 / 0), []
    monkeypatch.setattr(sample_grids.logging, "warning", lambda text, *values: warnings.append(text % values))
    grids = make_grids(pipe, params, mesh, tmp_path, rewards=[load_reward("colourfulness"), known, fails])
    assert warnings == [
        "samples of the base: reward fails failed, and is left out: ZeroDivisionError: division by zero"
    ]
    grids.write(1, {**params, "unet": jax.tree.map(lambda leaf: leaf * np.nan, params["unet"])})
    ((rows, captions),) = sheets
    for (prompt, images), of_row in zip(rows, captions, strict=True):
        start = load_reward("colourfulness").score(images[:2], [prompt] * 2)
        lines = [[f"colourfulness {score:.4g}", f"known {len(prompt)}", "fails -"] for score in start]
        assert of_row == [*lines, *[["colourfulness -", "known -", "fails -"]] * 2]


@pytest.mark.ci
def test_bfloat16_draws_nearly_the_same(pipe, tmp_path):
    mesh = make_mesh({"data": 8})
    grids = []
    for dtype in ("float32", "bfloat16"):
        params = place(pipe, mesh, dtype)
        make_grids(pipe, params, mesh, tmp_path / dtype, compute_dtype=dtype, guidance_scale=1.0).write(
            1, params
        )
        grids.append(read_grid(tmp_path / dtype / "samples" / "step_000001.png"))
    assert 0 < np.abs(grids[0] - grids[1]).mean() < 3


def test_every_process_has_the_latents_and_only_the_first_decodes(pipe, tmp_path, monkeypatch):
    mesh = make_mesh({"data": 8})
    params = place(pipe, mesh)
    sampler = ImageSampler(pipe, Drawing(steps=1, guidance_scale=GUIDANCE), mesh=mesh)
    latents = sampler.sample_latents(
        [ImageRequest("a", 0, 0)] * 8, np.zeros((8, 4, 4, 4), np.float32), params=params
    )
    assert latents.sharding.is_fully_replicated
    assert len(latents.sharding.device_set) == 8

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(sample_grids, "Decoder", None)
    make_grids(pipe, params, mesh, tmp_path, num_inference_steps=1).write(1, params)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_diverged_draws_black(pipe, tmp_path, caplog):
    mesh = make_mesh({"data": 8})
    params = place(pipe, mesh)
    grids = make_grids(pipe, params, mesh, tmp_path, num_inference_steps=1)
    with caplog.at_level("WARNING"):
        grids.write(1, jax.tree.map(lambda leaf: leaf * np.nan, params))
    assert "samples of step 1: 6 of 6 pictures are black, as they are not finite" in caplog.text
    assert (read_grid(tmp_path / "samples" / "step_000001.png")[:, 1] == 0).all()


def test_captions_of_the_data_stand_in_for_prompts(tiny_pairs, tiny_model, tmp_path):
    assert first_captions(read_datasets(tiny_pairs), "validation") == [f"validation {i}" for i in range(4)]
    few = write_pairs(tmp_path / "few", tiny_model, train=2, validation=2)
    assert first_captions(read_datasets(few), "validation") == ["validation 0", "validation 1"]
    with pytest.raises(ValueError, match="split = 'valid': unknown; did you mean 'validation'"):
        first_captions(read_datasets(tiny_pairs), "valid")


def test_a_grid_without_rows_is_refused(pipe, tmp_path):
    mesh = make_mesh({"data": 8})
    with pytest.raises(ValueError, match=r"config\.samples\.prompts = \(\): needs at least one"):
        make_grids(pipe, place(pipe, mesh), mesh, tmp_path, prompts=())
