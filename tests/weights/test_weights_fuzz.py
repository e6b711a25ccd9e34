"""Damaged weights files end in arrays or in one line that names the file, in little memory; seeds are fixed.

pytest -m slow tests/weights/test_weights_fuzz.py
"""

import copy
import json
import random
import resource

import numpy as np
import pytest
from safetensors.numpy import save_file
from tables import each_row

from dspo_jax.weights import tensors
from dspo_jax.weights.torch_files import open_weights

pytestmark = pytest.mark.slow

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
JSON = b'0123456789[]{}",:-eE\\u '
VALUES = [
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    2**70,
    1e9,
    None,
    True,
    "",
    "F32",
    "BF16",
    "F8_E4M3",
    [],
    {},
    [0, 0],
    [2**62, 4],
]


def outcome(path, read):
    """Whether a file is read; its refusal must be one line that names it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for tensor in read(path).values():
            array = tensor.read()
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert message.startswith(str(path.parent)), message
        assert message.isprintable(), message
        return False
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    return True


def spoil(data, draw):
    """A few bytes changed, many of them to those that JSON is made of, or the end cut off."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(len(data))] = draw.choice([draw.randrange(256), *JSON])
    return data[: draw.randrange(len(data))] if draw.random() < 0.2 else data


def spoil_tree(tree, draw):
    """A parsed JSON value with one thing in it replaced, removed or renamed."""
    if isinstance(tree, dict | list) and tree and draw.random() < 0.8:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = draw.choice(list(keys))
        if draw.random() < 0.15:
            tree.pop(key)
        elif isinstance(tree, dict) and draw.random() < 0.15:
            tree[draw.choice(["a", "b", "x\ny", "", "__metadata__", "\ud800"])] = tree.pop(key)
        else:
            tree[key] = spoil_tree(tree[key], draw)
        return tree
    return copy.deepcopy(draw.choice(VALUES))


def test_bytes_of_a_safetensors_file(tmp_path):
    save_file(ARRAYS, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    read = []
    for seed in range(5000):
        path = tmp_path / "model.safetensors"
        path.write_bytes(spoil(data, random.Random(seed)))
        read.append(outcome(path, tensors.open_tensors))
    assert 0 < sum(read) < len(read)


def test_headers_of_a_safetensors_file(tmp_path):
    save_file(ARRAYS, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for seed in range(5000):
        draw = random.Random(seed)
        header = json.loads(data[8:end])
        for _ in range(draw.randint(1, 3)):
            header = spoil_tree(header, draw)
        text = json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
        outcome(path, tensors.open_tensors)


def test_indices_of_shards(tmp_path):
    written = {name: tensors.Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in ARRAYS.items()}
    tensors.write_tensors(tmp_path / "model.safetensors", written, max_shard_bytes=8)
    index = tensors.index_path(tmp_path / "model.safetensors")
    text = index.read_text()
    for seed in range(3000):
        draw = random.Random(seed)
        if seed % 2:
            index.write_bytes(spoil(text.encode(), draw))
        else:
            index.write_text(json.dumps(spoil_tree(json.loads(text), draw)))
        outcome(index, tensors.open_tensors)


@pytest.mark.filterwarnings("ignore")  # torch warns of what it finds in a damaged file
@each_row("zipped", [True, False])
def test_bytes_of_a_torch_file(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(array) for name, array in ARRAYS.items()}
    torch.save(state, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "whole.pt").read_bytes()
    read = []
    for seed in range(1500):
        path = tmp_path / "model.pt"
        path.write_bytes(spoil(data, random.Random(seed)))
        read.append(outcome(path, open_weights))
    assert 0 < sum(read) < len(read)
