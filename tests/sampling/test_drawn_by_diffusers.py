"""Folders that are written here draw in diffusers as they are, with no dtype named, and in half precision."""

import json
from pathlib import Path

import numpy as np
import pytest
from model_folders import make_run, write_config
from tiny_model import TEXT_ENCODER

from dspo_jax.conversion.export_model import export
from dspo_jax.conversion.import_model import import_model

EMOJI_MODEL = Path(__file__).parents[2] / "examples" / "emoji" / "model"


def draw(folder, **options):
    """One picture [H, W, 3] in [0, 1] by diffusers."""
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red heart", num_inference_steps=2, output_type="np").images[0]


def save_safety_checker(folder):
    """diffusers' own checker at a small size, float16, with the processor that it reads pictures through."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    tower = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = CLIPConfig(
        vision_config={**tower, "image_size": 16, "patch_size": 8}, text_config=tower, projection_dim=4
    )
    StableDiffusionSafetyChecker(config).half().save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def test_the_shipped_model():
    image = draw(EMOJI_MODEL)
    assert image.shape == (64, 64, 3)
    assert image.std() > 0.01


@pytest.mark.ci
def test_an_export(family, tmp_path, out):
    torch = pytest.importorskip("torch")
    write_config(family / "text_encoder", torch_dtype="float16")
    export(make_run(tmp_path / "source" / "run", family), out)
    assert np.isfinite(draw(out)).all()
    assert np.isfinite(draw(out, dtype=torch.bfloat16)).all()


@pytest.mark.parametrize("named", [{"torch_dtype": "float16"}, {"dtype": "bfloat16"}, {}])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_only_the_dtype_changes_in_the_config_of_a_text_encoder(named, dtype, published, tmp_path, out):
    config = published / "text_encoder" / "config.json"
    config.write_text(json.dumps(TEXT_ENCODER | named))
    run = make_run(tmp_path / "source" / "run", published, trained=("text_encoder",))
    export(run, out, dtype=dtype)
    before, after = (json.loads((x / "text_encoder" / "config.json").read_text()) for x in (published, out))
    key = next(iter(named), "torch_dtype")
    changes = dtype == "float16" or named
    assert after == before | ({key: "float32"} if changes else {})


def test_an_export_with_a_safety_checker(published, tmp_path, out):
    pytest.importorskip("diffusers")
    save_safety_checker(published)
    export(make_run(tmp_path / "source" / "run", published), out)
    assert np.isfinite(draw(out)).all()
    for name in ("safety_checker/model.safetensors", "safety_checker/config.json"):
        assert (out / name).read_bytes() == (published / name).read_bytes()


def test_a_single_file_in_half_precision(published, tmp_path, out):
    config = published / "text_encoder" / "config.json"
    config.write_text(json.dumps(TEXT_ENCODER))
    single = tmp_path / "source" / "single.safetensors"
    export(make_run(tmp_path / "source" / "run", published), single, dtype="float16")
    import_model(single, out, base=published)
    assert np.isfinite(draw(out)).all()


def test_a_config_that_needs_no_change_is_the_bases_byte_for_byte(model, tmp_path, out):
    write_config(model / "text_encoder", torch_dtype="float32")
    export(make_run(tmp_path / "source" / "run", model), out)
    name = "text_encoder/config.json"
    assert (out / name).read_bytes() == (model / name).read_bytes()
