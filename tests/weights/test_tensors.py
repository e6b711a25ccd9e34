"""safetensors files against the library's own writer; shards; what is damaged is named."""

import errno
import json
import re
import weakref

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tables import each_row

from dspo_jax.json_files import shown
from dspo_jax.weights import tensors
from dspo_jax.weights.tensors import Tensor, open_tensors, write_tensors


def lazy(array):
    return Tensor(array.shape, array.dtype, lambda: array)


@pytest.fixture
def arrays():
    """Every dtype, and shapes that need care: a scalar, an empty one, a transposed one."""
    draw = np.random.default_rng(0)
    made = {
        f"layer.{name}": draw.integers(0, 2, (2, 3)).astype(dtype) for name, dtype in tensors.DTYPES.items()
    }
    return made | {
        "scalar": np.asarray(3, np.float32),
        "empty": np.zeros((0, 3), np.float16),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }


@pytest.fixture
def written(arrays, tmp_path):
    """The index of a model of two matrices in two shards."""
    path = tmp_path / "model.safetensors"
    pair = {name: lazy(np.full((4, 4), number, np.float32)) for number, name in enumerate(["a", "b"])}
    write_tensors(path, pair, max_shard_bytes=64)
    return tensors.index_path(path)


def test_the_file_is_the_librarys_byte_for_byte(arrays, tmp_path):
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    save_file(contiguous, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours.safetensors", {name: lazy(array) for name, array in arrays.items()})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["ours.safetensors", "theirs.safetensors"]


def test_tensors_are_read_as_written(arrays, tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {name: lazy(array) for name, array in arrays.items()})
    opened = open_tensors(path)
    assert set(opened) == set(arrays)
    for name, array in arrays.items():
        assert (opened[name].shape, opened[name].dtype, opened[name].nbytes) == (
            array.shape,
            array.dtype,
            array.nbytes,
        )
        np.testing.assert_array_equal(opened[name].read(), array)


def test_large_models_are_written_in_shards(written):
    names = sorted(path.name for path in written.parent.iterdir())
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads(written.read_text())
    assert index == {"metadata": {"total_size": 128}, "weight_map": {"a": names[0], "b": names[1]}}
    assert set(load_file(written.with_name(names[1]))) == {"b"}
    assert tensors.list_files(written) == [written, *(written.with_name(name) for name in names[:2])]
    np.testing.assert_array_equal(open_tensors(written)["b"].read(), np.ones((4, 4)))


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive: list[int] = []
    most = 0

    def read():
        nonlocal most
        array = np.ones((8, 8), np.float32)
        alive.append(1)
        weakref.finalize(array, alive.pop)
        most = max(most, len(alive))
        return array

    write_tensors(
        tmp_path / "model.safetensors", {str(n): Tensor((8, 8), np.dtype(np.float32), read) for n in range(9)}
    )
    assert most == 2  # the one before is let go when the next has been read
    assert not alive


def test_a_full_disk_is_said_in_plain_words(tmp_path):
    def read():
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.safetensors"
    with pytest.raises(
        OSError, match=f"^{re.escape(str(path))}: not written: no space left on the disk$"
    ) as caught:
        write_tensors(path, {"a": Tensor((1,), np.dtype(np.float32), read)})
    assert isinstance(caught.value.__cause__, OSError)


def refused(path, message, error=ValueError):
    return pytest.raises(error, match=f"^{re.escape(str(path))}: {message}[^\n]*$")


@each_row("keep", [4, 50, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": lazy(np.ones((8, 8), np.float32))})
    path.write_bytes(path.read_bytes()[:keep])
    with refused(path, "damaged or truncated .*; fetch the model again"):
        open_tensors(path)


def write_header(path, header, body=bytes(64), length=None):
    """A safetensors file of any header, text or what is made JSON of."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def entry(dtype="F32", shape=(16,), offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWICE = '{"a":' + json.dumps(entry(shape=[8], offsets=[0, 32])) + ',"a":'
TWICE += json.dumps(entry(shape=[8], offsets=[32, 64])) + "}"


@pytest.mark.parametrize(
    ("header", "length", "reason"),
    [
        ({"a": entry()}, 10**9, "damaged or truncated"),
        ({"a": entry()}, 2**63, "damaged or truncated"),
        ({"a": entry()}, 10, "damaged or truncated"),
        ({"a": entry(shape=[32], offsets=[0, 128])}, None, "damaged or truncated .*not fully covered"),
        ({"a": entry(shape=[8], offsets=[0, 32])}, None, "damaged or truncated"),
        ({name: entry() for name in "ab"}, None, "damaged or truncated .*invalid offset"),
        pytest.param(TWICE, None, "damaged or truncated .*invalid offset", id="twice"),
        ({"a": entry(shape=[-16])}, None, "damaged or truncated"),
        ({"a": entry(offsets=[-1, 63])}, None, "damaged or truncated"),
        ({"a": entry(shape=[2**62, 4])}, None, "damaged or truncated .*overflow"),
        ({"a": entry("X9")}, None, "damaged or truncated .*X9"),
        ({"a": entry("F8_E4M3", [64])}, None, "tensor a is stored as F8_E4M3, which is not supported; save"),
        ({"a": entry("F8_E8M0", [64])}, None, "tensor a is stored as F8_E8M0, which is not supported"),
        ({"a": entry("C64", [8])}, None, "tensor a is stored as C64, which is not supported"),
        ({"a": entry("F4", [128])}, None, "tensor a is stored as F4, which is not supported"),
        ({"a\nb": entry()}, None, r"'a\\nb' is not the name of a tensor"),
        pytest.param('{"a": ' + "[" * 10**5, None, "damaged or truncated", id="deep"),
        ("[]", None, "damaged or truncated"),
    ],
)
def test_headers_that_lie_are_refused_in_one_line(header, length, reason, tmp_path):
    path = write_header(tmp_path / "model.safetensors", header, length=length)
    with refused(path, reason):
        open_tensors(path)


def test_more_axes_than_an_array_has_are_refused(tmp_path):
    header = {"a": entry(shape=[1] * 100, offsets=[0, 4])}
    path = write_header(tmp_path / "model.safetensors", header, bytes(4))
    with refused(path, "tensor a cannot be read"):
        open_tensors(path)["a"].read()


def edit_index(path, edit):
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def test_shards_and_index_must_agree(written):
    _, first, second = tensors.list_files(written)
    edit_index(written, lambda index: index["weight_map"].update(c=second.name))
    with refused(written, f"tensor c is not in {second.name}"):
        open_tensors(written)
    edit_index(written, lambda index: index.update(weight_map={"b": second.name, "a": second.name}))
    with refused(written, f"tensor a is not in {second.name}"):
        open_tensors(written)
    save_file({"a": np.zeros(1), "b": np.zeros(1)}, first)
    edit_index(written, lambda index: index.update(weight_map={"a": first.name, "b": second.name}))
    with refused(first, "tensor b is not in model.safetensors.index.json"):
        open_tensors(written)
    second.unlink()
    with refused(second, "no such file; fetch the model again", FileNotFoundError):
        open_tensors(written)


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/a.safetensors",
        "a.bin",
        3,
        "a\n.safetensors",
        "a\0.safetensors",
        "a" * 255 + ".safetensors",
    ],
)
def test_an_index_names_files_of_its_folder_only(name, written):
    edit_index(written, lambda index: index["weight_map"].update(a=name))
    with refused(written, f"{re.escape(shown(name))} is not the name of a safetensors file"):
        open_tensors(written)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list, not an object"),
        ('{"weight_map": 3}', "weight_map = 3 must be an object"),
        ("{}", "weight_map is missing"),
        ('{"weight_map": {"a": []}}', r"\[\] is not the name of a safetensors file"),
        ('{"weight_map": ' + "[" * 10**5, "not valid JSON .nested too deeply"),
        ("9" * 5000, "not valid JSON"),
    ],
)
def test_a_malformed_index_is_named(text, problem, written):
    written.write_text(text)
    with refused(written, problem):
        open_tensors(written)


def test_an_index_names_tensors(written):
    edit_index(written, lambda index: index["weight_map"].update({"a\nb": index["weight_map"]["a"]}))
    with refused(written, "a tensor's name has control characters in it"):
        open_tensors(written)
