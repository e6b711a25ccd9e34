"""Files of a component that are read, against diffusers and transformers, and refusals where none can be."""

import re
import shutil

import numpy as np
import pytest
from model_folders import refused
from safetensors.numpy import load_file
from tables import each_row
from tiny_clip import CONFIG as CLIP
from tiny_model import TEXT_ENCODER, UNET

from dspo_jax.conversion.import_model import import_model
from dspo_jax.weights import component_files, model_dir, tensors
from dspo_jax.weights.component_files import find_weights, open_stored, weights_file
from dspo_jax.weights.components import read_model, read_params
from dspo_jax.weights.layout import flatten

UNET_CLASS, TEXT_CLASS = "UNet2DConditionModel", "CLIPTextModel"


def make_module(class_name):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    if class_name == UNET_CLASS:
        return diffusers.UNet2DConditionModel.from_config(UNET)
    config = {"CLIPTextModel": TEXT_ENCODER, "CLIPModel": CLIP}[class_name]
    return getattr(transformers, class_name)(getattr(transformers, class_name).config_class(**config))


def save_twice(folder, class_name):
    """An older single file with newer shards beside it; returns the module as its own library reads them."""
    make_module(class_name).save_pretrained(folder)
    module = make_module(class_name)
    module.save_pretrained(folder, max_shard_size="20KB")
    file = weights_file(folder, class_name)
    assert file.is_file()
    assert tensors.index_path(file).is_file()
    return type(module).from_pretrained(folder)


@each_row("class_name", [UNET_CLASS, TEXT_CLASS, "CLIPModel"])
def test_of_a_file_and_shards_the_one_is_read_that_its_library_reads(class_name, tmp_path, caplog):
    theirs = save_twice(tmp_path, class_name).state_dict()
    ours = open_stored(tmp_path, class_name)
    assert set(ours) >= set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name].read(), value.numpy(), err_msg=name)
    assert "delete the one that is out of date" in caplog.text
    file = weights_file(tmp_path, class_name)
    newer = tensors.list_files(tensors.index_path(file))
    assert find_weights(tmp_path, class_name) == (newer if class_name == UNET_CLASS else [file])


@each_row(("component", "class_name"), [("unet", UNET_CLASS), ("text_encoder", TEXT_CLASS)])
def test_what_is_imported_is_what_was_read(component, class_name, model, out):
    theirs = save_twice(model / component, class_name).state_dict()
    import_model(model, out)
    (chosen,) = component_files._choose(out / component, class_name)
    ours = tensors.open_tensors(chosen)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name].read(), value.numpy(), err_msg=name)
    params = read_params(model / component, read_model(model / component))
    imported = read_params(out / component, read_model(out / component))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(imported)[path], leaf)


FILE = "diffusion_pytorch_model.safetensors"


@each_row(
    ("names", "remedy"),
    [
        (
            [f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
            + ["diffusion_pytorch_model.safetensors.index.fp16.json"],
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors is a shard of the variant fp16: load "
            "the model with variant='fp16' in diffusers and save it",
        ),
        (
            ["diffusion_pytorch_model-00001-of-00002.non_ema.safetensors"],
            "diffusion_pytorch_model-00001-of-00002.non_ema.safetensors is a shard of the variant non_ema",
        ),
        (
            ["diffusion_pytorch_model-00001-of-00002.safetensors"],
            "diffusion_pytorch_model-00001-of-00002.safetensors is a shard, but the index of the shards",
        ),
        (
            ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"],
            "diffusion_pytorch_model.fp16.safetensors is there: give it this name",
        ),
        (["diffusion_pytorch_model.bin"], "diffusion_pytorch_model.bin is a pickle and is not read; save"),
        (["model.ckpt"], "model.ckpt is a pickle"),
        (
            ["diffusion_flax_model.msgpack"],
            "diffusion_flax_model.msgpack holds weights for Flax or TensorFlow, which are not read",
        ),
        (["tf_model.h5"], "tf_model.h5 holds weights for Flax or TensorFlow"),
        (["model.onnx", "weights.pb"], "model.onnx is a program for inference"),
        (["openvino_model.bin", "openvino_model.xml"], "openvino_model.bin is a program for inference"),
        (["unet-Q4_K_S.gguf"], "unet-Q4_K_S.gguf is quantised, which is not read"),
        ([], "fetch the model again"),
    ],
)
def test_what_is_there_instead_is_named(names, remedy, model):
    (model / "unet" / FILE).unlink()
    for name in names:
        (model / "unet" / name).write_bytes(b"")
    expected = f"{re.escape(str(model))}/unet/{FILE}: no such file; {re.escape(remedy)}"
    with refused(expected, FileNotFoundError):
        open_stored(model / "unet", UNET_CLASS)
    if names:
        with refused(expected, FileNotFoundError):
            find_weights(model / "unet", UNET_CLASS)
    else:
        assert find_weights(model / "unet", UNET_CLASS) == []


def test_of_a_hub_id_it_is_named_what_was_not_downloaded(tiny_model, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--somebody--my-tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model, snapshot)
    (snapshot / "unet" / FILE).unlink()
    with refused(f"{snapshot}/unet/{FILE}: no such file; fetch the model again", FileNotFoundError):
        open_stored(snapshot / "unet", UNET_CLASS)  # offline

    class File:
        filename = "unet/diffusion_flax_model.msgpack"

    def snapshot_download(name, allow_patterns, dry_run):
        assert (name, allow_patterns, dry_run) == ("somebody/my-tiny", "unet/*", True)
        return [File]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with refused(
        f"{snapshot}/unet/{FILE}: no such file; somebody/my-tiny on the hub has none; "
        "diffusion_flax_model.msgpack holds weights for Flax",
        FileNotFoundError,
    ):
        open_stored(snapshot / "unet", UNET_CLASS)


def test_a_variants_index_is_not_copied(model, out):
    for name in ("model.safetensors.index.fp16.json", "pytorch_model.bin.index.json"):
        (model / "text_encoder" / name).write_text("{}")
    import_model(model, out)
    assert {path.name for path in (out / "text_encoder").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.ci
@each_row("place", ["vae/config.json", "text_encoder/model.safetensors", "LICENSE", "vae"])
def test_links_out_of_the_folder_are_not_copied(place, model, tmp_path, out):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("secret") if place == "LICENSE" else (model / place).rename(elsewhere)
    (model / place).symlink_to(elsewhere)
    first = next(iter(model_dir.find_links(model, model_dir.list_files(model))))
    assert str(first).startswith(place)
    with refused(f"{model / first}: a link to a file outside the model's folder, which is not copied; put"):
        import_model(model, out)
    assert list(out.parent.iterdir()) == []
    assert model_dir.foresee_export(model) == [
        f"an export will be refused: {model / first}: a link to a file outside the model's folder, which is "
        "not copied; put the file itself there (cp -rL copies a folder so)"
    ]


def test_links_within_the_folder_and_the_hubs_cache_are_copied(model, tmp_path, out):
    (model / "LICENSE").symlink_to("vae/config.json")
    (tmp_path / "link").symlink_to(model)
    import_model(tmp_path / "link", out)
    assert (out / "LICENSE").read_bytes() == (model / "vae" / "config.json").read_bytes()
    assert not (out / "LICENSE").is_symlink()

    repository = tmp_path / "models--somebody--tiny"
    snapshot = shutil.copytree(model, repository / "snapshots" / ("0" * 40))
    blob = repository / "blobs" / "abc"
    blob.parent.mkdir()
    weights = snapshot / "text_encoder" / "model.safetensors"
    weights.rename(blob)
    weights.symlink_to("../../../blobs/abc")
    import_model(snapshot, out.with_name("again"))
    assert set(load_file(out.with_name("again") / "text_encoder" / "model.safetensors"))
    whole = snapshot.rename(tmp_path / "whole")
    snapshot.mkdir()
    nested = whole.rename(snapshot / "model")  # a repository may hold models in folders
    weights = nested / "text_encoder" / "model.safetensors"
    weights.unlink()
    weights.symlink_to("../../../../blobs/abc")
    import_model(nested, out.with_name("nested"))
    snapshot = nested
    (repository / "blobs").rename(tmp_path / "blobs")
    weights.unlink()
    weights.symlink_to(tmp_path / "blobs" / "abc")
    with refused(".*model.safetensors: a link to a file outside the model's folder"):
        import_model(snapshot, out.with_name("third"))
