"""Trained runs out: the base with the trained parts replaced; what is refused leaves nothing behind."""

import errno
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from model_folders import (
    TEXT_FILE,
    UNET_FILE,
    assert_nothing_written,
    contents,
    make_run,
    refused,
    write_config,
)
from PIL import Image
from tables import each_row

from dspo_jax.conversion.export_model import export
from dspo_jax.conversion.import_model import import_model
from dspo_jax.conversion.model_card import make_card
from dspo_jax.files import name_write_errors
from dspo_jax.weights import tensors
from dspo_jax.weights.checkpoints import Checkpoints


@pytest.mark.ci
def test_import_then_export_changes_no_tensor(family, out, tmp_path):
    import_model(family, out)
    run = make_run(tmp_path / "source" / "run", out)
    exported = out.with_name("exported")
    assert export(run, exported) == 3
    after = contents(exported)
    del after["README.md"]
    assert after == contents(family)


@pytest.mark.ci
def test_the_single_file_layout_and_back_changes_no_tensor(family, out, tmp_path):
    single = out.with_name("single.safetensors")
    assert export(make_run(tmp_path / "source" / "run", family), single) == 3
    import_model(single, out, base=family)
    imported = contents(out)
    assert imported.pop("README.md").startswith(b"# single\n")
    assert imported == contents(family)

    # Once more, over a base that has configs and no weights: names are today's then.
    for file in out.rglob("*.safetensors"):
        file.unlink()
    today = out.with_name("today")
    import_model(single, today, base=out)
    assert "vae:encoder.mid_block.attentions.0.to_q.weight" in contents(today)
    again = out.with_name("again.safetensors")
    export(make_run(tmp_path / "source" / "again", today), again)
    assert split_file(again) == split_file(single)


def split_file(path):
    """What a safetensors file says of its tensors, and their bytes, without its metadata, the title."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    del header["__metadata__"]
    return header, content[end:]


@pytest.mark.ci
@each_row("dtype", ["float16", "bfloat16"])
def test_trained_components_get_the_dtype_asked_for(dtype, model, tmp_path, out):
    run = make_run(tmp_path / "source" / "run", model, steps=(1, 3), change=0.25)
    assert export(run, out, step=1, dtype=dtype) == 1
    before, after = contents(model), contents(out)
    for name in (name for name in before if ":" in name):
        shape, stored, value = after[name]
        assert shape == before[name][0]
        if name.startswith("vae:"):
            assert after[name] == before[name]
        else:
            assert stored == dtype
            moved = np.frombuffer(before[name][2], np.float32) + np.float32(0.25)
            np.testing.assert_array_equal(np.frombuffer(value, jnp.dtype(dtype)), moved.astype(dtype))


def test_the_card_says_what_made_the_model(full_run, tiny_model, out):
    shutil.copytree(tiny_model, out.parent / "base")
    (out.parent / "base" / "README.md").write_text("---\nlicense: openrail\n---\n# Base\n")
    (full_run / "metrics.jsonl").write_text(
        '{"step": 1, "validation/implicit_accuracy": 0.5, "validation/implicit_accuracy_low": 0.25, '
        '"validation/implicit_accuracy_high": 0.75}\n{"step": 4, "validation/implicit_accuracy": 0.9}\n'
    )
    (full_run / "pairs").mkdir()
    manifest = {
        "source": {"name": "folder", "arguments": {"path": str(full_run / "drawn")}},
        "resolution": 16,
        "splits": {"train": {"num_examples": 24, "skipped": {"too small": 2}}},
    }
    (full_run / "pairs" / "manifest.json").write_text(json.dumps(manifest))
    export(full_run, out, base=out.parent / "base")
    card = (out / "README.md").read_text()
    for part in (
        "# run\n",
        "`base` after 3 steps of `diffusion_dpo`",
        "| objective.beta | 5000.0 |",
        "| objective.reduction | mean |",
        "| steps | 3 |",
        "| batch_size | 2048 |",
        "| optimizer.learning_rate | 2.048e-05 |",
        "| seed | 0 |",
        "| split train | 24 examples, 2 skipped: too small |",
        "| source | folder, path drawn |",
        "| held-out implicit accuracy | 0.500 [0.250, 0.750] at step 1 |",
        "Missing in the first lines of this file: `base_model`, as the base was a local folder.",
    ):
        assert part in card
    assert read_header(card) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "openrail",
        "tags": ["dspo_jax", "diffusion_dpo"],
    }
    assert "lora.rank" not in card
    assert str(full_run.parent) not in card


def read_header(card):
    """The YAML at the head of a card."""
    before, header, _ = card.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(header)


def test_the_card_names_a_base_of_the_hub_and_says_that_it_has_no_licence(full_run, tiny_model, tmp_path):
    cached = tmp_path / "models--org--name" / "snapshots" / "1a2b"
    shutil.copytree(tiny_model, cached)
    for base in ("org/name", str(cached)):
        card = make_card(full_run, base, cached, 3)
        assert read_header(card)["base_model"] == "org/name"
        assert "license" not in read_header(card)
        assert (
            "Missing in the first lines of this file: `license`, as the card of the base names none." in card
        )
    config = json.loads((full_run / "config.json").read_text())
    config["lora"]["rank"] = 8
    config["samples"]["prompts"] = ["/home/me/prompts.txt", "a bird"]
    (full_run / "config.json").write_text(json.dumps(config))
    card = make_card(full_run, str(cached), cached, 3)
    assert read_header(card)["tags"] == ["dspo_jax", "diffusion_dpo", "lora"]
    assert "| lora.rank | 8 |" in card
    assert 'prompt = "a bird"\n' in card
    assert "clip_skip" not in card
    config["text"] = {"max_chunks": 3, "clip_skip": 2}
    (full_run / "config.json").write_text(json.dumps(config))
    card = make_card(full_run, str(cached), cached, 3)
    assert "| text.max_chunks | 3 |" in card
    assert ", clip_skip=1).images[0]" in card  # diffusers counts from 0
    (cached / "README.md").write_text(
        "---\nlicense: other\nlicense_name: 'own: 1'\ntags: []\n---\nlicense: mit\n"
    )
    header = read_header(make_card(full_run, str(cached), cached, 3))
    assert (header["license"], header["license_name"]) == ("other", "own: 1")
    flow = Path(__file__).parents[2] / "examples" / "emoji" / "flow_model"  # without T5
    card = make_card(full_run, str(flow), flow, 3)
    assert '.from_pretrained(".", text_encoder_3=None, tokenizer_3=None)' in card


@pytest.mark.ci
def test_the_card_shows_the_newest_samples_up_to_its_step_and_how_to_draw(
    full_run, tiny_model, out, monkeypatch
):
    (full_run / "samples").mkdir()
    for step in (1, 2, 4):
        image = Image.new("RGB", (8, 8), (step, 0, 0))
        image.save(full_run / "samples" / f"step_{step:06d}.png")
    export(full_run, out)
    card = (out / "README.md").read_text()
    assert "![From the same noise: the base, and step 2](samples.png)" in card
    assert (out / "samples.png").read_bytes() == (full_run / "samples" / "step_000002.png").read_bytes()
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(out)
    exec(program.replace("num_inference_steps=25", "num_inference_steps=1"), {})
    with Image.open(out / "image.png") as image:
        assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("encoders", "prefixes"),
    [(["text_encoder"], {"lora_te"}), (["text_encoder", "text_encoder_2"], {"lora_te1", "lora_te2"})],
)
def test_kohya_numbers_the_text_encoders_where_there_are_two(encoders, prefixes, tmp_path):
    layer = {"fc1": {"lora_A": {"kernel": jnp.ones((8, 2))}, "lora_B": {"kernel": jnp.ones((2, 4))}}}
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": dict.fromkeys(encoders, layer)}, {}, wait=True)
    config = {"model": "base", "objective": {"name": "dspo"}, "data": {"path": "pairs"}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    export(tmp_path / "run", tmp_path / "lora.safetensors", adapters="kohya")
    parts = ("alpha", "lora_down.weight", "lora_up.weight")
    expected = {f"{prefix}_fc1.{part}" for prefix in prefixes for part in parts}
    assert set(tensors.open_file(tmp_path / "lora.safetensors")) == expected


@pytest.mark.parametrize("style", [None, "kohya"], ids=["whole", "adapters"])
def test_a_file_has_its_card_beside_it(style, full_run, tiny_model, tmp_path, monkeypatch):
    file = tmp_path / "mine.safetensors"
    if style:
        layer = {"lora_A": {"kernel": jnp.ones((8, 2))}, "lora_B": {"kernel": jnp.ones((2, 4))}}
        with Checkpoints(full_run / "checkpoints") as checkpoints:
            checkpoints.save(5, {"params": {"unet": {"fc1": layer}}}, {}, wait=True)
    export(full_run, file, adapters=style)
    card = file.with_suffix(".md").read_text()
    assert read_header(card)["library_name"] == "diffusers"
    assert "![" not in card
    lines = {
        None: 'pipe = StableDiffusionPipeline.from_single_file(\n    "mine.safetensors",\n',
        "kohya": 'pipe.load_lora_weights(".", weight_name="mine.safetensors")',
    }
    assert lines[style] in card
    assert str(tmp_path) not in card
    assert str(tiny_model.parent) not in card
    if not style:
        (tmp_path / tiny_model.name).symlink_to(tiny_model)
        monkeypatch.chdir(tmp_path)
        (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        exec(program.replace("num_inference_steps=25", "num_inference_steps=1"), {})
        assert (tmp_path / "image.png").is_file()
    file.unlink()
    file.with_suffix(".md").unlink()
    (full_run / "pairs").mkdir()
    (full_run / "pairs" / "manifest.json").write_text("{")
    with refused(f"{full_run}/pairs/manifest.json: "):
        export(full_run, file, adapters=style)
    assert not list(tmp_path.glob("*mine*"))  # neither the file nor its card
    file.with_suffix(".md").write_text(card)
    with refused(f"--out={file.with_suffix('.md')}: exists already; choose another name or delete it"):
        export(full_run, file, adapters=style)
    assert not file.exists()


def test_a_run_is_exported_over_its_own_base_only(full_run, model, out):
    write_config(model / "unet", block_out_channels=[8, 8])
    with refused(
        rf"{full_run}/checkpoints/3: unet\..* there and .* in {model}/unet; name the model that the run"
    ):
        export(full_run, out, base=model)
    with refused(r"absent/model: no such folder, and the model hub did not give it", OSError):
        export(full_run, out, base="absent/model")
    index = json.loads((model / "model_index.json").read_text())
    del index["text_encoder"]
    (model / "model_index.json").write_text(json.dumps(index))
    with refused(f"{full_run}/checkpoints/3: holds text_encoder, which is absent in {model}; name the model"):
        export(full_run, out, base=model)
    shutil.rmtree(model / "unet")
    with refused(f"{model}/unet/config.json: no such file", FileNotFoundError):
        export(full_run, out, base=model)
    with refused(".*holds no step 2", FileNotFoundError):
        export(full_run, out, step=2)
    assert_nothing_written(out)


@pytest.mark.ci
@each_row("name", ["out", "out.safetensors"])
def test_a_weight_that_does_not_fit_leaves_nothing_behind(name, tiny_model, tmp_path, out):
    run = make_run(tmp_path / "source" / "run", tiny_model, trained=("unet",), change=1e5)
    out = out.with_name(name)
    with refused(f"{out}/{UNET_FILE}: tensor .* overflows float16; use float32 or bfloat16"):
        export(run, out, dtype="float16")
    assert_nothing_written(out)


@pytest.mark.ci
@each_row("name", ["out", "out.safetensors"])
def test_too_small_a_disk_is_said_before_anything_is_written(name, full_run, tiny_model, out, monkeypatch):
    out = out.with_name(name)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = rf"--out={re.escape(str(out))}: needs 0\.\d\d GB and the disk has 0\.00 GB free; make room"
    with refused(message, OSError):
        export(full_run, out)
    if name == "out":
        with refused(message, OSError):
            import_model(tiny_model, out)
    assert_nothing_written(out)


def test_a_disk_that_fills_up_leaves_nothing_behind(full_run, out, monkeypatch):
    def write(path, values):
        with name_write_errors(path):
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors, "write_tensors", write)
    with refused(f".*/{TEXT_FILE}: not written: no space left on the disk", OSError):
        export(full_run, out)
    assert_nothing_written(out)
