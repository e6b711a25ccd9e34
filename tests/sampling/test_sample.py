"""Images: against diffusers' from the same noise, and the same whatever they are drawn with."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_model import write_model

from configs import common
from configs.encode import common as encode_common
from dspo_jax.conversion.export_model import export
from dspo_jax.data import sources
from dspo_jax.data.encoding import encode
from dspo_jax.data.sources import PreferencePair
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.sampling.decoding import Decoder
from dspo_jax.sampling.drawing import draw_batches
from dspo_jax.sampling.image_sampler import ImageRequest, ImageSampler, initial_noise
from dspo_jax.sampling.rendering import Drawing, Rendering
from dspo_jax.training.run import train

STEPS = 3
GUIDANCE = 7.5
PROMPTS = ("a red heart", "b", "c")


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run over the model of Stable Diffusion 1.5's shape."""
    return _train(tiny_model, tiny_pairs, tmp_path_factory.mktemp("sample") / "run")


def _train(model: Path, pairs: Path, workdir: Path) -> Path:
    """Two steps with a rate that moves the images."""
    config = common.get_config()
    config.model, config.data.path = str(model), str(pairs)
    config.batch_size, config.steps, config.objective.name = 8, 2, "sft"
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 0
    config.train_text_encoder = True
    config.validation.every = config.samples.every = 0
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        train(config, workdir)
    return workdir


def _requests(count: int) -> list[ImageRequest]:
    return [ImageRequest(prompt, i, 7) for i, prompt in enumerate(PROMPTS[:count])]


DRAWING = Drawing(steps=STEPS, guidance_scale=GUIDANCE)


def test_initial_noise_depends_on_seed_and_prompt_number_only() -> None:
    together = initial_noise(_requests(3), (4, 6, 4))
    alone = initial_noise(_requests(3)[2:], (4, 6, 4))
    np.testing.assert_array_equal(together[2:], alone)
    assert not np.allclose(together[0], together[1])
    other_seed = initial_noise([ImageRequest("a", 0, 8)], (4, 6, 4))
    assert not np.allclose(together[:1], other_seed)


@pytest.mark.ci
@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("euler_ancestral", 0.0)])
def test_images_depend_neither_on_the_batch_size_nor_on_the_devices(
    tiny_model, monkeypatch, sampler, eta
) -> None:
    """Not even where every step draws new noise."""
    pipe = load_pipeline(tiny_model)
    drawing = Drawing(sampler=sampler, steps=STEPS, guidance_scale=GUIDANCE, eta=eta)

    def draw(batch_size, devices):
        monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:devices])
        batches = draw_batches(pipe, _requests(3), Rendering(drawing, batch_size=batch_size))
        return np.stack([image for batch in batches for _, image in batch]).astype(int)

    whole = draw(3, 1)
    assert len(whole) == 3
    for batch_size, devices in ((1, 1), (8, 8)):
        assert np.abs(draw(batch_size, devices) - whole).max() <= 1


def _draw_from(model: Path, noise: jax.Array) -> np.ndarray:
    """One picture [1, H, W, 3] uint8."""
    pipe = load_pipeline(model)
    return Decoder(pipe)(ImageSampler(pipe, DRAWING).sample_latents(_requests(1), noise))[0]


def _assert_exported_run_draws_the_same_in_diffusers(run: Path, base: Path, exported: Path) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    assert export(run, exported) == 2
    latents = initial_noise(_requests(1), (4, 4, 4))
    ours = _draw_from(run, latents)
    theirs_pipe = diffusers.DiffusionPipeline.from_pretrained(exported, local_files_only=True)
    theirs_pipe.set_progress_bar_config(disable=True)
    theirs = theirs_pipe(
        PROMPTS[0],
        latents=torch.tensor(np.asarray(latents).transpose(0, 3, 1, 2).copy()),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=16,
        width=16,
        output_type="np",
    ).images
    assert np.abs(ours / 255.0 - theirs).mean() <= 1 / 255
    before = _draw_from(base, latents)
    assert np.abs(before.astype(int) - ours.astype(int)).mean() > 1  # the training shows


@pytest.mark.ci
def test_exported_folder_gives_the_same_image_in_diffusers(
    run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    _assert_exported_run_draws_the_same_in_diffusers(run, tiny_model, tmp_path / "exported")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_other_families_go_from_pictures_to_the_same_image_in_diffusers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encode, train with the text encoders, export, sample."""
    model = write_model(tmp_path / "model", family=family)
    monkeypatch.setitem(sources.SOURCES, "greys", Greys)
    config = encode_common.get_config()
    encode_common.set_source(config, "greys")
    config.update(model=str(model), resolution=16, batch_size=4)
    encode(config, tmp_path / "pairs")
    run = _train(model, tmp_path / "pairs", tmp_path / "run")
    _assert_exported_run_draws_the_same_in_diffusers(run, model, tmp_path / "exported")


@dataclasses.dataclass(frozen=True)
class Greys:
    """Grey pictures, not square, the winner one level above the loser."""

    splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    images_per_example: ClassVar[int] = 2

    def num_examples(self, split: str) -> int:
        return 10

    def left_out(self, split: str) -> dict[str, int]:
        return {}

    def digest(self, split: str) -> str:
        return "digest of " + split

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        for i in range(10)[start:stop]:
            winner, loser = (Image.new("RGB", (20, 24), (10 * i + level,) * 3) for level in (1, 0))
            yield PreferencePair(f"grey {i}", winner, loser, 1.0, f"{split}-{i}")


def test_export_copies_what_was_not_trained_and_refuses_an_existing_folder(
    run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    export(run, exported, dtype="bfloat16")
    for name in ("vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "model_index.json"):
        assert (exported / name).read_bytes() == (tiny_model / name).read_bytes()
    unet = load_pipeline(exported).read_params("unet")
    assert all(leaf.dtype == jax.numpy.bfloat16 for leaf in jax.tree.leaves(unet))
    assert "| objective.name | sft |" in (exported / "README.md").read_text()
    with pytest.raises(ValueError, match="exists already"):
        export(run, exported)
    with pytest.raises(FileNotFoundError, match="no step 9"):
        export(run, tmp_path / "other", step=9)
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]  # nothing half-written
