"""Sampling against diffusers from the same noise, and what the command writes."""

import dataclasses
import json
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
from dspo_jax import sample, train
from dspo_jax.data import sources
from dspo_jax.data.sources import PreferencePair, registry
from dspo_jax.encode import encode
from dspo_jax.export_model import export
from dspo_jax.pipeline import load_pipeline

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
    train.train(config, workdir)
    return workdir


def _jobs(count: int) -> list[sample.Job]:
    return [sample.Job(prompt, i, 7) for i, prompt in enumerate(PROMPTS[:count])]


def _sampler(path: Path) -> sample.Sampler:
    return sample.Sampler(load_pipeline(path), steps=STEPS, guidance_scale=GUIDANCE)


def test_initial_latents_depend_on_seed_and_prompt_number_only() -> None:
    together = sample.initial_latents(_jobs(3), 4, 4)
    alone = sample.initial_latents(_jobs(3)[2:], 4, 4)
    np.testing.assert_array_equal(together[2:], alone)
    assert not np.allclose(together[0], together[1])
    other_seed = sample.initial_latents([sample.Job("a", 0, 8)], 4, 4)
    assert not np.allclose(together[:1], other_seed)


def test_images_do_not_depend_on_the_batch_size(tiny_model: Path) -> None:
    sampler, pipe = _sampler(tiny_model), load_pipeline(tiny_model)
    whole = [image for _, image in sample.draw_jobs(sampler, pipe, _jobs(3), 3, "whole")]
    parts = [image for _, image in sample.draw_jobs(sampler, pipe, _jobs(3), 2, "parts")]
    assert len(parts) == 3
    for a, b in zip(whole, parts, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def _assert_exported_run_draws_the_same_in_diffusers(run: Path, base: Path, exported: Path) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    assert export(run, exported) == 2
    latents = sample.initial_latents(_jobs(1), 4, 4)
    ours = _sampler(run).sample(PROMPTS[:1], latents)
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
    before = _sampler(base).sample(PROMPTS[:1], latents)
    assert np.abs(before.astype(int) - ours.astype(int)).mean() > 1  # the training shows


def test_exported_folder_gives_the_same_image_in_diffusers(
    run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    _assert_exported_run_draws_the_same_in_diffusers(run, tiny_model, tmp_path / "exported")


@pytest.mark.parametrize("family", [pytest.param("sd21", marks=pytest.mark.slow), "sdxl"])
def test_other_families_go_from_pictures_to_the_same_image_in_diffusers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encode, train with the text encoders, export, sample."""
    model = write_model(tmp_path / "model", family=family)
    monkeypatch.setattr(registry, "_SOURCES", dict(registry._SOURCES))
    sources.register("greys")(Greys)
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


def test_sample_writes_images_manifest_and_contact_sheet(tiny_model: Path, run: Path, tmp_path: Path) -> None:
    sheet = sample.sample(
        {"base": tiny_model, "trained": run},
        PROMPTS[:2],
        tmp_path,
        seeds=[0, 5],
        steps=1,
        guidance_scale=2.0,
        batch_size=4,
    )
    records = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["seed"]) for r in records] == [(p, s) for p in PROMPTS[:2] for s in (0, 5)] * 2
    for record in records:
        with Image.open(tmp_path / record["file"]) as image:
            assert image.size == (16, 16)
    with Image.open(sheet) as image:
        assert image.width > 4 * 96
        assert image.height > 2 * 96


def test_prompts_from_text_and_file(tmp_path: Path) -> None:
    assert sample.read_prompts(" a cat ") == ["a cat"]
    (tmp_path / "prompts.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert sample.read_prompts(str(tmp_path / "prompts.txt")) == ["one", "two"]
    with pytest.raises(FileNotFoundError, match=r"missing\.txt: no such file"):
        sample.read_prompts("missing.txt")
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no prompt in it"):
        sample.read_prompts(str(tmp_path / "empty.txt"))
