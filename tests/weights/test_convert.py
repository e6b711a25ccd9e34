"""Weights in and out: nothing is lost on the way, and what does not fit is named with its fix."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tables import each_row
from tiny_model import UNET

from dspo_jax.weights import tensors
from dspo_jax.weights.component_files import weights_file
from dspo_jax.weights.components import read_config, read_model, read_params, write_params
from dspo_jax.weights.layout import flatten, unflatten

COMPONENTS = ("unet", "vae", "text_encoder")


def contents(path):
    """Name -> (dtype, shape, bytes) of every tensor of a safetensors file."""
    with safe_open(path, "np") as file:
        return {
            name: (
                file.get_slice(name).get_dtype(),
                file.get_slice(name).get_shape(),
                file.get_tensor(name).tobytes(),
            )
            for name in file.keys()  # noqa: SIM118 - not a dict
        }


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A text encoder to be spoilt."""
    return shutil.copytree(tiny_model / "text_encoder", tmp_path / "text_encoder")


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def read(folder):
    model = read_model(folder)
    return model, read_params(folder, model)


def one_line(*parts):
    """A pattern for a message of one line that holds the parts in this order."""
    return "^" + ".*".join(re.escape(str(part)) for part in parts) + "[^\n]*$"


@pytest.mark.ci
@each_row("dtype", ["float32", "float16", "bfloat16"])
@each_row("component", COMPONENTS)
def test_read_then_write_gives_the_same_tensors(component, dtype, tiny_model, tmp_path):
    model, params = read(tiny_model / component)
    write_params(tmp_path / "stored", model, params, dtype)
    model, params = read(tmp_path / "stored")
    assert {str(leaf.dtype) for leaf in flatten(params).values()} == {dtype}
    write_params(tmp_path / "written", model, params)
    stored, written = (
        contents(weights_file(tmp_path / name, model.class_name)) for name in ("stored", "written")
    )
    assert written == stored
    assert read_config(tmp_path / "written") == read_config(tiny_model / component)


def test_shards_that_diffusers_wrote_are_read(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel.from_config(UNET)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    path = weights_file(tmp_path / "theirs", "UNet2DConditionModel")
    assert not path.exists()
    model, params = read(tmp_path / "theirs")
    write_params(tmp_path / "ours", model, params)
    written = load_file(weights_file(tmp_path / "ours", "UNet2DConditionModel"))
    assert set(written) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(written[name], value.numpy(), err_msg=name)

    index = tensors.index_path(path)
    expected = json.loads(index.read_text())
    again = tmp_path / "again" / path.name
    again.parent.mkdir()
    tensors.write_tensors(again, tensors.open_tensors(index), max_shard_bytes=50_000)
    ours = json.loads(tensors.index_path(again).read_text())
    assert ours["metadata"]["total_size"] == expected["metadata"]["total_size"]
    assert set(ours["weight_map"]) == set(expected["weight_map"])


def test_kernels_are_transposed_and_nothing_else_is(tiny_model):
    tensors = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    leaves = flatten(read(tiny_model / "unet")[1])
    block = "down_blocks.0.attentions.0"
    np.testing.assert_array_equal(leaves["conv_in.kernel"], tensors["conv_in.weight"].transpose(2, 3, 1, 0))
    to_q = f"{block}.transformer_blocks.0.attn1.to_q"
    np.testing.assert_array_equal(leaves[f"{to_q}.kernel"], tensors[f"{to_q}.weight"].T)
    np.testing.assert_array_equal(leaves[f"{block}.norm.scale"], tensors[f"{block}.norm.weight"])
    np.testing.assert_array_equal(leaves[f"{block}.norm.bias"], tensors[f"{block}.norm.bias"])


def test_names_without_the_text_model_prefix(folder, tmp_path):
    """transformers 5 saves them so; they are read, and kept where `like` asks for it."""
    model, params = read(folder)

    def drop_prefix(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("text_model.")] = tensors.pop(name)

    before = contents(folder / "model.safetensors")
    edit_tensors(folder, drop_prefix)
    after = read_params(folder, model)
    for path, leaf in flatten(after).items():
        np.testing.assert_array_equal(leaf, flatten(params)[path])
    write_params(tmp_path / "same", model, after, like=folder)
    assert contents(tmp_path / "same" / "model.safetensors") == contents(folder / "model.safetensors")
    write_params(tmp_path / "published", model, after)
    assert contents(tmp_path / "published" / "model.safetensors") == before


def test_position_ids_of_old_files_are_passed_over(folder):
    edit_tensors(
        folder, lambda tensors: tensors.update({"text_model.embeddings.position_ids": np.arange(77)[None]})
    )
    read(folder)


def test_flatten_and_unflatten_are_inverse(tiny_model):
    _, params = read(tiny_model / "vae")
    assert unflatten(flatten(params)) == params


NAME = "text_model.final_layer_norm.weight"


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(NAME))
    with pytest.raises(
        ValueError, match=one_line(folder / "model.safetensors", NAME, "missing", "config.json")
    ):
        read(folder)


def test_an_extra_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update(text_projection=np.zeros(3, np.float32)))
    with pytest.raises(
        ValueError, match=one_line(folder / "model.safetensors", "text_projection", "same model?")
    ):
        read(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update({NAME: np.zeros(5, np.float32)}))
    with pytest.raises(
        ValueError, match=one_line(folder / "model.safetensors", NAME, "(5,)", "(12,)", "same model?")
    ):
        read(folder)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=one_line(path, "damaged or truncated", "fetch the model again")):
        read(folder)


def test_a_pickle_is_not_read(folder):
    path = folder / "model.safetensors"
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=one_line(path, "pytorch_model.bin is a pickle", "safe_serialization=True")
    ):
        read(folder)


def test_missing_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=one_line(folder / "model.safetensors", "fetch the model again")
    ):
        read(folder)


@each_row("text", ["{", "[]", "\udcff"], ids=["cut", "a list", "not UTF-8"])
def test_a_malformed_config_is_named(folder, text):
    path = folder / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=one_line(path, "fetch the model again")):
        read(folder)


def test_a_missing_config_is_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=one_line(folder / "config.json", "no such file")):
        read(folder)


@each_row(
    ("changes", "message"),
    [
        ({"architectures": ["T5Model"]}, "'T5Model' is not supported; supported: "),
        ({"architectures": None}, "'none named' is not supported; supported: "),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported; allowed: 'quick_gelu', 'gelu'"),
    ],
)
def test_an_unsupported_config_is_named(folder, changes, message):
    path = folder / "config.json"
    path.write_text(json.dumps(read_config(folder) | changes))
    with pytest.raises(ValueError, match=one_line(path, message)):
        read(folder)


def test_a_value_too_large_for_float16_is_named(folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors.update({NAME: np.full(12, 1e6, np.float32)}))
    model, params = read(folder)
    out = tmp_path / "half"
    with pytest.raises(ValueError, match=one_line(out, NAME, "overflows float16", "use float32 or bfloat16")):
        write_params(out, model, params, "float16")
    assert not out.exists()
    write_params(out, model, params, "bfloat16")


def test_a_value_that_is_not_finite_is_named(folder, tmp_path):
    model, params = read(folder)
    params["text_model"]["final_layer_norm"]["scale"] = np.full(12, np.nan, np.float32)
    with pytest.raises(ValueError, match=one_line(tmp_path / "out", NAME, "not finite")):
        write_params(tmp_path / "out", model, params)
