"""Models in and runs out: nothing is lost on the way, and what is refused leaves nothing behind."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file
from tiny_model import write_model

from configs import common
from dspo_jax import convert, model_dir, tensors
from dspo_jax.checkpoint import Checkpoints
from dspo_jax.export_model import export
from dspo_jax.import_model import import_model
from dspo_jax.pipeline import load_pipeline

COMPONENTS = ("unet", "vae", "text_encoder")
NAME = "text_model.final_layer_norm.weight"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


def contents(folder):
    """File or tensor -> bytes of everything in a folder; tensors whole or in shards, with shape and dtype."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            for tensor_name, tensor in tensors.open_file(path).items():
                found[f"{path.parent.name}:{tensor_name}"] = (
                    tensor.shape,
                    str(tensor.dtype),
                    tensor.read().tobytes(),
                )
        elif not name.endswith(".index.json"):
            found[name] = path.read_bytes()
    return found


def edit(path, change):
    values = load_file(path)
    change(values)
    save_file(values, path, metadata={"format": "pt"})


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the model that a test may spoil."""
    return shutil.copytree(tiny_model, tmp_path / "source" / "tiny")


def publish(model):
    """Makes a folder like published ones: half precision, old names, constants, and shards."""

    def halve(values):
        values.update({name: value.astype(np.float16) for name, value in values.items()})

    def rename(values):
        for today, before in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            for name in [name for name in values if f".{today}." in name]:
                values[name.replace(f".{today}.", f".{before}.")] = values.pop(name)

    edit(model / UNET_FILE, halve)
    edit(model / "vae" / "diffusion_pytorch_model.safetensors", rename)
    edit(model / TEXT_FILE, halve)
    edit(
        model / TEXT_FILE,
        lambda values: values.update({"text_model.embeddings.position_ids": np.arange(77)[None]}),
    )
    whole = tensors.open_file(model / UNET_FILE)
    (model / UNET_FILE).unlink()  # which stays readable: it is open
    tensors.write_tensors(model / UNET_FILE, whole, max_shard_bytes=20_000)
    assert len(tensors.list_files(model / UNET_FILE)) > 1
    return model


@pytest.fixture
def published(model):
    return publish(model)


@pytest.fixture(params=["sd15", "sd21", "sdxl"])
def family(request, tmp_path):
    """A published model of each family."""
    return publish(write_model(tmp_path / "source" / "tiny", family=request.param))


def make_run(workdir, model, steps=(3,), trained=("unet", "text_encoder"), change=0.0):
    """A workdir whose checkpoints hold the model's own weights in float32, plus `change` times the step."""
    config = common.get_config()
    config.model, config.data.path = str(model), str(workdir / "pairs")
    config.objective.name, config.objective.beta = "diffusion_dpo", 5000.0
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json())
    params = {name: load_pipeline(model).read_params(name, "float32") for name in trained}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step in steps:
            moved = {
                name: convert.unflatten(
                    {path: jnp.asarray(leaf + change * step) for path, leaf in convert.flatten(tree).items()}
                )
                for name, tree in params.items()
            }
            checkpoints.save(step, {"params": moved, "opt_state": jnp.zeros(3)}, {}, wait=True)
    return workdir


@pytest.fixture
def run(tiny_model, tmp_path):
    return make_run(tmp_path / "source" / "run", tiny_model, steps=(1, 3), change=0.25)


@pytest.fixture
def out(tmp_path):
    """A name in an empty folder, which stays empty where writing is refused."""
    (tmp_path / "target").mkdir()
    return tmp_path / "target" / "out"


def refused(message, error=ValueError):
    return pytest.raises(error, match=f"^{message}[^\n]*$")


def assert_nothing_written(out):
    assert list(out.parent.iterdir()) == []


# Import


def test_a_folder_is_imported_without_what_is_there_twice(published, out):
    before = contents(published)
    (published / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "v1-5-pruned.ckpt",
        "onnx/model.onnx",
    ):
        (published / name).parent.mkdir(exist_ok=True)
        (published / name).write_bytes(b"not read")
    import_model(published, out)
    after = contents(out)
    assert after.pop("README.md") == b"---\nlicense: mit\n---\n"
    assert after == before
    assert tensors.index_path(out / UNET_FILE).is_file()
    assert list(out.parent.iterdir()) == [out]


def test_an_imported_folder_is_read_as_the_original(published, tiny_model, out):
    import_model(published, out)
    ours, original = load_pipeline(out), load_pipeline(tiny_model)
    for component in COMPONENTS:
        stored = convert.flatten(ours.read_params(component))
        for path, leaf in convert.flatten(original.read_params(component)).items():
            np.testing.assert_array_equal(stored[path], leaf.astype(stored[path].dtype))
    assert ours.tokenize(["abc"]).tolist() == original.tokenize(["abc"]).tolist()
    assert ours.fingerprint()["latent_channels"] == 4


def test_what_is_no_network_is_carried_along_but_not_as_a_pickle(model, out):
    index = json.loads((model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (model / "model_index.json").write_text(json.dumps(index))
    checker = model / "safety_checker"
    with refused(f"{checker}: no such folder, but model_index.json names it", FileNotFoundError):
        import_model(model, out)
    checker.mkdir()
    (checker / "pytorch_model.bin").write_bytes(b"pickle")
    with refused(
        f"{checker}/model.safetensors: no such file; pytorch_model.bin is a pickle", FileNotFoundError
    ):
        import_model(model, out)
    assert_nothing_written(out)
    save_file({"x": np.ones(1)}, checker / "model.safetensors")
    import_model(model, out)
    assert [path.name for path in (out / "safety_checker").iterdir()] == ["model.safetensors"]


def write_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "message", "error"),
    [
        (
            lambda model: edit(model / TEXT_FILE, lambda values: values.pop(NAME)),
            f"{TEXT_FILE}: tensor {NAME} is missing; is config.json of the same model",
            ValueError,
        ),
        (
            lambda model: edit(model / TEXT_FILE, lambda values: values.update(more=np.zeros(1))),
            rf"{TEXT_FILE}: 1 tensor\(s\) that config.json does not ask for, first more",
            ValueError,
        ),
        (
            lambda model: edit(model / TEXT_FILE, lambda values: values.update({NAME: np.zeros(5)})),
            rf"{TEXT_FILE}: tensor {NAME} has shape \(5,\), config.json asks for \(12,\)",
            ValueError,
        ),
        (
            lambda model: write_config(model / "unet", _class_name="Transformer2DModel"),
            "unet/config.json: model class 'Transformer2DModel' is not supported; supported: ",
            ValueError,
        ),
        (
            lambda model: shutil.copytree(model / "vae", model / "unet", dirs_exist_ok=True),
            "unet/config.json: is of class AutoencoderKL, but model_index.json says UNet2DConditionModel",
            ValueError,
        ),
        (
            lambda model: (model / UNET_FILE).rename(model / "unet" / "diffusion_pytorch_model.bin"),
            f"{UNET_FILE}: no such file; diffusion_pytorch_model.bin is a pickle and is not read; save ",
            FileNotFoundError,
        ),
        (
            lambda model: (model / UNET_FILE).rename(model / "unet" / "x.fp16.safetensors"),
            f"{UNET_FILE}: no such file; x.fp16.safetensors is there: give it this name",
            FileNotFoundError,
        ),
        (
            lambda model: truncate(model / UNET_FILE),
            f"{UNET_FILE}: damaged or truncated .*; fetch the model again",
            ValueError,
        ),
        (
            lambda model: (model / "tokenizer" / "merges.txt").unlink(),
            "tokenizer/merges.txt: no such file; fetch the model again",
            FileNotFoundError,
        ),
    ],
    ids=["missing", "extra", "shape", "class", "other class", "pickle", "variant", "truncated", "tokenizer"],
)
def test_a_folder_that_is_not_whole_is_refused(model, out, spoil, message, error):
    spoil(model)
    with refused(f"{model}/{message}", error):
        import_model(model, out)
    assert_nothing_written(out)


def test_other_things_are_not_imported(model, run, out):
    with refused(f"{run}: a training run; use `convert export --run={run}`"):
        import_model(run, out)
    with refused("x.ckpt: a pickle, which is not read; convert it to .safetensors"):
        import_model("x.ckpt", out)
    with refused("x.safetensors: a single file holds no configs .* name a diffusers folder .* with --base"):
        import_model("x.safetensors", out)
    with refused(f"--base={model}: only a single .safetensors file needs one"):
        import_model(model, out, base=model)
    assert_nothing_written(out)
    out.mkdir()
    with refused(f"--out={out}: exists already; choose another name or delete it"):
        import_model(model, out)


def test_components_lie_in_the_folder(model, out):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"../more": ["diffusers", "UNet2DModel"]}))
    with refused("model_index.json: '../more' is not the name of a component"):
        import_model(model, out)
    assert_nothing_written(out)


# The hub


def fill_cache(model, cache):
    """`model` as huggingface_hub keeps a download of somebody/tiny."""
    repository = cache / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(model, repository / "snapshots" / ("0" * 40))


def test_a_hub_id_is_a_model(tiny_model, tmp_path, out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = fill_cache(tiny_model, tmp_path / "cache")
    import_model("somebody/tiny", out)
    assert contents(out) == contents(tiny_model)
    assert load_pipeline("somebody/tiny").path == snapshot
    run = make_run(tmp_path / "run", "somebody/tiny", trained=("unet",))
    assert load_pipeline(run).path == snapshot
    export(run, tmp_path / "exported")
    assert "base_model: somebody/tiny\n" in (tmp_path / "exported" / "README.md").read_text()
    with refused("somebody/other: no such folder, and the model hub did not give it", OSError):
        import_model("somebody/other", out.with_name("other"))


def test_only_what_is_needed_is_downloaded(tiny_model, monkeypatch):
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(tiny_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert model_dir.find_model("somebody/tiny") == tiny_model
    (first, (name, patterns)) = calls
    assert first == ("somebody/tiny", ["model_index.json"])
    assert name == "somebody/tiny"
    wanted = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "text_encoder/model.safetensors",
        UNET_FILE,
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]
    unwanted = [
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
    ]
    matches = [path for path in wanted + unwanted if any(fnmatch(path, pattern) for pattern in patterns)]
    assert matches == wanted


@pytest.mark.parametrize("name", [".", "/a/b", "a/b/c", "tests/conftest.py", "name"])
def test_a_path_is_no_hub_id(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert model_dir.find_model(name) == Path(name)


# Export


def test_import_then_export_changes_no_tensor(family, out, tmp_path):
    import_model(family, out)
    run = make_run(tmp_path / "source" / "run", out)
    exported = out.with_name("exported")
    assert export(run, exported) == 3
    after = contents(exported)
    del after["README.md"]
    assert after == contents(family)


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
    assert again.read_bytes() == single.read_bytes()


def test_a_single_file_without_vae_takes_the_bases(published, run, out, caplog):
    single = out.with_name("single.safetensors")
    export(run, single, step=1)
    edit(single, lambda values: [values.pop(name) for name in list(values) if name.startswith("first_stage")])
    with caplog.at_level("INFO", logger="absl"):
        import_model(single, out, base=published)
    assert "has no vae: the one of" in caplog.text
    before, after = contents(published), contents(out)
    assert {name for name in before if before[name] != after.get(name)} > {"unet:conv_in.weight"}
    assert all(after[name] == value for name, value in before.items() if name.startswith("vae"))


def test_a_single_file_that_does_not_fit_is_refused(model, run, out):
    single = out.parent.parent / "single.safetensors"
    export(run, single)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    edit(single, lambda values: values.pop(name))
    with refused(f"{single}: tensor {name} is missing; is --base of the same architecture"):
        import_model(single, out, base=model)
    truncate(single)
    with refused(f"{single}: damaged or truncated"):
        import_model(single, out, base=model)
    with refused(f"{single}-absent.safetensors: no such file", FileNotFoundError):
        import_model(f"{single}-absent.safetensors", out, base=model)
    assert_nothing_written(out)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_trained_components_get_the_dtype_asked_for(dtype, model, tmp_path, out):
    write_config(model / "text_encoder", torch_dtype="float32")
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
    assert convert.read_config(out / "text_encoder")["torch_dtype"] == dtype  # what transformers loads it as


def test_the_card_says_what_made_the_model(run, tiny_model, out):
    shutil.copytree(tiny_model, out.parent / "base")
    (out.parent / "base" / "README.md").write_text("---\nlicense: openrail\n---\n# Base\n")
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 0.25, "validation/implicit_accuracy": 0.5}\n{"step": 3, "loss": 0.125}\n'
        '{"step": 4, "loss": 9}\n'
    )
    (run / "pairs").mkdir()
    manifest = {
        "source": {"name": "folder", "arguments": {"licence": "cc0"}},
        "resolution": 16,
        "splits": {"train": {"num_examples": 24, "skipped": {"too small": 2}}},
    }
    (run / "pairs" / "manifest.json").write_text(json.dumps(manifest))
    export(run, out, base=out.parent / "base")
    card = (out / "README.md").read_text()
    for part in (
        "---\nlibrary_name: diffusers\n",
        "tags: [dspo_jax, diffusion_dpo]",
        "# run\n",
        "`base` after 3 steps of `diffusion_dpo`",
        "| objective.beta | 5000.0 |",
        "| optimizer.learning_rate | 2.048e-05 |",
        "| split train | 24 examples, 2 skipped: too small |",
        '| source | {"name": "folder", "arguments": {"licence": "cc0"}} |',
        "| loss | 0.125 (step 3) |",
        "| validation/implicit_accuracy | 0.5 (step 1) |",
        "its card says openrail",
    ):
        assert part in card
    assert "base_model" not in card  # it is no hub id
    assert str(run) not in card


def test_a_run_is_exported_over_its_own_base_only(run, model, out):
    write_config(model / "unet", block_out_channels=[8, 8])
    with refused(rf"{run}/checkpoints/3: unet\..* there and .* in {model}/unet; name the model that the run"):
        export(run, out, base=model)
    with refused(r"absent/model: no such folder, and the model hub did not give it", OSError):
        export(run, out, base="absent/model")
    shutil.rmtree(model / "unet")
    with refused(f"{model}/unet/config.json: no such file", FileNotFoundError):
        export(run, out, base=model)
    with refused(".*holds no step 2", FileNotFoundError):
        export(run, out, step=2)
    assert_nothing_written(out)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_weight_that_does_not_fit_leaves_nothing_behind(name, tiny_model, tmp_path, out):
    run = make_run(tmp_path / "source" / "run", tiny_model, trained=("unet",), change=1e5)
    out = out.with_name(name)
    with refused(f"{out}/{UNET_FILE}: tensor .* overflows float16; use float32 or bfloat16"):
        export(run, out, dtype="float16")
    assert_nothing_written(out)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_too_small_a_disk_is_said_before_anything_is_written(name, run, tiny_model, out, monkeypatch):
    out = out.with_name(name)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = rf"--out={re.escape(str(out))}: needs 0\.\d\d GB and the disk has 0\.00 GB free; make room"
    with refused(message, OSError):
        export(run, out)
    if name == "out":
        with refused(message, OSError):
            import_model(tiny_model, out)
    assert_nothing_written(out)


def test_a_disk_that_fills_up_leaves_nothing_behind(run, out, monkeypatch):
    def write(path, values):
        with tensors.name_write_errors(path):
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors, "write_tensors", write)
    with refused(f".*/{TEXT_FILE}: not written: no space left on the disk", OSError):
        export(run, out)
    assert_nothing_written(out)


# The command


def command(*arguments):
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "dspo_jax.convert", *arguments],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


def test_the_command_imports(tiny_model, out):
    result = command("import", f"--model={tiny_model}", f"--out={out}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}: diffusers folder of {tiny_model}\n"
    assert contents(out) == contents(tiny_model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export"], "--run is missing: name what to export"),
        (["import", "--model=x", "--dtype=float16"], "--dtype=float16: not an option of import"),
    ],
)
def test_the_command_refuses_options_of_the_other(arguments, message, out):
    result = command(*arguments, f"--out={out}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {message}\n"
    assert_nothing_written(out)
