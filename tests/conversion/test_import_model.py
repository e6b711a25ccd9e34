"""Models in: nothing is lost on the way, and what is refused leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from model_folders import (
    TEXT_FILE,
    UNET_FILE,
    assert_nothing_written,
    contents,
    edit,
    make_run,
    refused,
    truncate,
    write_config,
)
from safetensors.numpy import load_file, save_file
from tables import each_row
from tiny_model import write_model

from configs import common
from dspo_jax.conversion.export_model import export
from dspo_jax.conversion.import_model import import_model
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.start import prepare
from dspo_jax.weights import model_dir, tensors
from dspo_jax.weights.layout import flatten

COMPONENTS = ("unet", "vae", "text_encoder")
NAME = "text_model.final_layer_norm.weight"


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
        stored = flatten(ours.read_params(component))
        for path, leaf in flatten(original.read_params(component)).items():
            np.testing.assert_array_equal(stored[path], leaf.astype(stored[path].dtype))
    assert ours.tokenize(["abc"]).tolist() == original.tokenize(["abc"]).tolist()
    assert ours.fingerprint()["latent_channels"] == 4


@each_row("sample_size", [[6, 4], None])
def test_a_model_of_another_or_of_no_size_is_imported(sample_size, published, out):
    path = published / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": sample_size}))
    import_model(published, out)
    assert load_pipeline(out).latent_size == ((6, 4) if sample_size else (64, 64))


def test_a_model_of_absurd_size_is_refused_before_anything_is_copied(published, out):
    path = published / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 10**9}))
    with pytest.raises(ValueError, match=rf"^{path}: .*sample_size = 1000000000 must be"):
        import_model(published, out)
    assert not out.exists()


def add_optional(model, **classes):
    """Names optional components in the index; a network without a folder, a processor with its config."""
    index = json.loads((model / "model_index.json").read_text())
    index |= {name: ["transformers", class_name] for name, class_name in classes.items()}
    (model / "model_index.json").write_text(json.dumps(index))
    if "feature_extractor" in classes:
        (model / "feature_extractor").mkdir()
        (model / "feature_extractor" / "preprocessor_config.json").write_text("{}")


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


CHECKER = {"safety_checker": "StableDiffusionSafetyChecker", "feature_extractor": "CLIPImageProcessor"}


def test_a_safety_checker_is_carried_along(model, out):
    add_optional(model, **CHECKER)
    checker = model / "safety_checker"
    checker.mkdir()
    (checker / "config.json").write_text("{}")
    (checker / "pytorch_model.bin").write_bytes(b"pickle")
    save_file({"x": np.ones(1)}, checker / "model.safetensors")
    import_model(model, out)
    assert {path.name for path in (out / "safety_checker").iterdir()} == {"config.json", "model.safetensors"}
    assert (out / "feature_extractor" / "preprocessor_config.json").is_file()
    assert (out / "model_index.json").read_bytes() == (model / "model_index.json").read_bytes()
    truncate(checker / "model.safetensors")
    with refused(f"{checker}/model.safetensors: damaged or truncated"):
        import_model(model, out.with_name("again"))


def no_folder(checker):
    pass


def only_a_pickle(checker):
    checker.mkdir()
    (checker / "config.json").write_text("{}")
    (checker / "pytorch_model.bin").write_bytes(b"pickle")


def no_weights(checker):
    checker.mkdir()
    (checker / "config.json").write_text("{}")


def no_config(checker):
    checker.mkdir()
    save_file({"x": np.ones(1)}, checker / "model.safetensors")


@pytest.mark.ci
@each_row("name", ["safety_checker", "image_encoder"])
@each_row(
    ("spoil", "reason"),
    [
        (no_folder, "no such folder"),
        (only_a_pickle, "no such file; pytorch_model.bin is a pickle"),
        (no_weights, "no such file; fetch the model again"),
        (no_config, "holds no config"),
    ],
)
def test_an_optional_component_that_cannot_be_carried_is_left_out(name, spoil, reason, model, out, caplog):
    add_optional(model, **CHECKER | {name: "CLIPVisionModelWithProjection"})
    for network in {"safety_checker", name}:
        spoil(model / network)
    (line,) = (
        line
        for line in model_dir.foresee_export(model)
        if line.startswith(f"an export will be without {name} ")
    )
    assert reason in line
    with caplog.at_level("WARNING", logger="absl"):
        import_model(model, out)
    assert f"{name} is left out of the copy: {model / name}" in caplog.text
    assert reason in caplog.text
    assert index_of(out) == index_of(model) | {name: [None, None], "safety_checker": [None, None]}
    assert not (out / name).exists()
    assert model_dir.foresee_export(out) == []
    export(make_run(model.parent / "run", model), out.with_name("exported"))
    assert index_of(out.with_name("exported")) == index_of(out)


def test_no_checker_is_left_without_its_processor(model, out):
    add_optional(model, **CHECKER)
    shutil.rmtree(model / "feature_extractor")
    (model / "safety_checker").mkdir()
    (model / "safety_checker" / "config.json").write_text("{}")
    save_file({"x": np.ones(1)}, model / "safety_checker" / "model.safetensors")
    import_model(model, out)
    assert index_of(out) == index_of(model) | {name: [None, None] for name in CHECKER}


def test_what_an_export_will_lack_is_said_before_training(model, tiny_pairs, caplog):
    add_optional(model, **CHECKER)
    config = common.get_config()
    config.model, config.data.path = str(model), str(tiny_pairs)
    config.objective.name, config.batch_size = "sft", 8
    config.validation.every = config.samples.every = 0
    with caplog.at_level("WARNING", logger="absl"):
        prepare(config)
    assert f"config.model = {model}: an export will be without safety_checker ({model}/safety" in caplog.text


@each_row(
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


def test_other_things_are_not_imported(model, full_run, out):
    with refused(f"{full_run}: a training run; use `convert export --run={full_run}`"):
        import_model(full_run, out)
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
    pinned = f"somebody/tiny@{'0' * 40}"
    assert load_pipeline(pinned).path == snapshot
    run = make_run(tmp_path / "pinned", pinned, trained=("unet",))
    export(run, tmp_path / "of_pinned")
    assert "base_model: somebody/tiny\n" in (tmp_path / "of_pinned" / "README.md").read_text()
    with refused("somebody/other: no such folder, and the model hub did not give it", OSError):
        import_model("somebody/other", out.with_name("other"))
    with refused("a--b/..c: no such folder, and no id of the model hub: "):
        import_model("a--b/..c", out.with_name("other"))


def test_only_what_is_needed_is_downloaded(tiny_model, monkeypatch):
    calls = []

    def snapshot_download(name, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        return str(tiny_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert model_dir.find_model("somebody/tiny@v1.0") == tiny_model
    (first, (name, revision, patterns)) = calls
    assert first == ("somebody/tiny", "v1.0", ["model_index.json"])
    assert (name, revision) == ("somebody/tiny", "v1.0")
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


@each_row("name", [".", "/a/b", "a/b/c", "tests/conftest.py", "name"])
def test_a_path_is_no_hub_id(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert model_dir.find_model(name) == Path(name)


def test_a_single_file_without_vae_takes_the_bases(published, full_run, out, caplog):
    single = out.with_name("single.safetensors")
    export(full_run, single, step=1)
    edit(single, lambda values: [values.pop(name) for name in list(values) if name.startswith("first_stage")])
    with caplog.at_level("INFO", logger="absl"):
        import_model(single, out, base=published)
    assert "has no vae: the one of" in caplog.text
    before, after = contents(published), contents(out)
    assert {name for name in before if before[name] != after.get(name)} > {"unet:conv_in.weight"}
    assert all(after[name] == value for name, value in before.items() if name.startswith("vae"))


def declare(path, *markers, **metadata):
    """Adds empty tensors and metadata to a single file."""
    values = load_file(path) | {name: np.zeros(0, np.float32) for name in markers}
    save_file(values, path, metadata={f"modelspec.{key}": value for key, value in metadata.items()})


def export_single(tmp_path, model):
    path = tmp_path / "source" / "single.safetensors"
    export(make_run(tmp_path / "source" / "run", model), path)
    return path


@pytest.mark.ci
@each_row("family", ["sd15", "sd21", "sdxl"])
def test_the_prediction_type_goes_into_a_single_file_and_comes_out(family, tmp_path, out):
    velocity, epsilon = (
        write_model(tmp_path / "source" / kind, family=family, prediction_type=kind)
        for kind in ("v_prediction", "epsilon")
    )
    single = export_single(tmp_path, velocity)
    assert tensors.open_file(single)["v_pred"].shape == (0,)
    assert "ztsnr" not in tensors.open_file(single)
    said = {"format": "pt", "modelspec.prediction_type": "v"}
    assert tensors.read_metadata(single).items() >= said.items()
    scheduler = "scheduler/scheduler_config.json"
    import_model(single, out, base=velocity)
    assert (out / scheduler).read_bytes() == (velocity / scheduler).read_bytes()
    again = out.with_name("again")
    import_model(single, again, base=epsilon, process={"prediction_type": "v_prediction"})
    assert json.loads((again / scheduler).read_text()) == json.loads((velocity / scheduler).read_text())
    with refused(f"{single}: says prediction_type = v_prediction, not --prediction_type=epsilon; leave"):
        import_model(single, out.with_name("no"), base=velocity, process={"prediction_type": "epsilon"})
    assert sorted(out.parent.iterdir()) == sorted([out, again])


@each_row("scheduler", ["EulerDiscreteScheduler", "PNDMScheduler"])
def test_zero_terminal_snr_goes_into_a_single_file_and_comes_out(scheduler, tmp_path, out):
    """Of PNDM, which in diffusers does not know it, comes DDIM."""
    base = write_model(tmp_path / scheduler / "base", family="sdxl")
    file = base / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"_class_name": scheduler}
    file.write_text(json.dumps(config))
    index = json.loads((base / "model_index.json").read_text()) | {"scheduler": ["diffusers", scheduler]}
    (base / "model_index.json").write_text(json.dumps(index))
    single, imported = export_single(tmp_path / scheduler, base), out.with_name(scheduler)
    declare(single, "v_pred", "ztsnr")
    import_model(single, imported, base=base)
    known = scheduler if scheduler != "PNDMScheduler" else "DDIMScheduler"
    changed = {"_class_name": known, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    changed |= {"timestep_spacing": "trailing", "clip_sample": False}
    assert json.loads((imported / "scheduler" / file.name).read_text()) == config | changed
    assert json.loads((imported / "model_index.json").read_text())["scheduler"] == ["diffusers", known]
    assert load_pipeline(imported).schedule.has_zero_terminal_snr
    again = export_single(tmp_path / scheduler / "again", imported)
    assert {"v_pred", "ztsnr"} <= tensors.open_file(again).keys()
    with refused(f"{single}: says rescale_betas_zero_snr = True, not --rescale_betas_zero_snr=False; leave"):
        import_model(single, out, base=base, process={"rescale_betas_zero_snr": False})


def test_flags_say_what_a_single_file_does_not(model, tmp_path, out):
    single = export_single(tmp_path, model)
    declare(single)
    zero_snr = {"rescale_betas_zero_snr": True}
    with refused(
        f"{single}: scheduler config: rescale_betas_zero_snr = true with prediction_type = 'epsilon'"
    ):
        import_model(single, out, base=model, process=zero_snr)
    import_model(single, out, base=model, process=zero_snr | {"prediction_type": "v_prediction"})
    schedule = load_pipeline(out).schedule
    assert (schedule.prediction_type, schedule.has_zero_terminal_snr) == ("v_prediction", True)
    with refused("--rescale_betas_zero_snr=True: is of a single .safetensors file"):
        import_model(model, out.with_name("again"), process=zero_snr)


def test_metadata_say_the_prediction_type_too(model, tmp_path, out):
    single = export_single(tmp_path, model)
    assert "v_pred" not in tensors.open_file(single)
    declare(single, prediction_type="v")
    import_model(single, out, base=model)
    assert load_pipeline(out).schedule.prediction_type == "v_prediction"
    declare(single, prediction_type="epsilon")
    import_model(single, out.with_name("again"), base=model)
    assert load_pipeline(out.with_name("again")).schedule.prediction_type == "epsilon"


def test_a_single_file_that_does_not_fit_is_refused(model, full_run, out):
    single = out.parent.parent / "single.safetensors"
    export(full_run, single)
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


def command(*arguments):
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "dspo_jax.convert", *arguments],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


@pytest.mark.ci
def test_the_command_imports(tiny_model, out):
    result = command("import", f"--model={tiny_model}", f"--out={out}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}: diffusers folder of {tiny_model}\n"
    assert contents(out) == contents(tiny_model)


@pytest.mark.ci
def test_the_command_exports_the_best_checkpoint_and_names_it(model, tmp_path, out):
    run = make_run(tmp_path / "source" / "run", model, steps=(1, 3), scores={1: 0.7, 3: 0.6})
    newest = command("export", f"--run={run}", f"--out={out}")
    assert newest.stdout == (
        f"{out}: diffusers folder of {run} at step 3\n"
        "the held-out pairs find step 1 better: --step=best exports it\n"
    )
    best = out.with_name("best")
    said = command("export", f"--run={run}", "--step=best", f"--out={best}").stdout
    assert said == f"{best}: diffusers folder of {run} at step 1\n"


@pytest.mark.ci
@each_row(
    ("arguments", "message"),
    [
        (["export"], "--run is missing: name what to export"),
        (["import", "--model=x", "--dtype=float16"], "--dtype=float16: not an option of import"),
        (
            ["export", "--run=absent", "--lora=l.safetensors"],
            "--lora = 'l.safetensors': unknown (allowed: diffusers, kohya)",
        ),
        (
            ["export", "--run=absent", "--lora=kohya", "--lora=diffusers"],
            "--lora=diffusers: an export writes adapters once; give one --lora",
        ),
        (["export", "--run=absent", "--step=bst"], "absent: step 'bst': must be a whole number, or best"),
        (
            ["export", "--run=absent", "--step=best"],
            "absent: no checkpoint has a held-out score to be the best; name one by its number",
        ),
    ],
)
def test_the_command_refuses_options_that_it_cannot_follow(arguments, message, out):
    result = command(*arguments, f"--out={out}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {message}\n"
    assert_nothing_written(out)
