"""safetensors files, whole or in shards, read and written one tensor at a time.

The format (https://github.com/huggingface/safetensors): the header's length as 8 bytes, the header as JSON,
then the tensors' bytes. Shards are such files beside an index that says which tensor is in which.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dspo_jax.errors import UserError
from dspo_jax.files import whole, write_json
from dspo_jax.json_files import member, read_object, shown

MAX_SHARD_BYTES = 10 * 10**9  # diffusers' own limit

# The format's names, in the order by which its reference implementation sorts tensors, from the last to the
# first, so that each begins at a multiple of its width.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("uint8"),
    "I8": np.dtype("int8"),
    "I16": np.dtype("int16"),
    "U16": np.dtype("uint16"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(jnp.bfloat16),
    "I32": np.dtype("int32"),
    "U32": np.dtype("uint32"),
    "F32": np.dtype("float32"),
    "F64": np.dtype("float64"),
    "I64": np.dtype("int64"),
    "U64": np.dtype("uint64"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read when it is needed.

    Attributes:
      shape, dtype: of the array that `read` returns.
      read: reads it, anew with each call.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes on disk and in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_file(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of one safetensors file, whose header alone is read.

    Raises:
      FileNotFoundError: no such file.
      UserError: it is damaged, truncated, no safetensors file, or has a dtype that is not supported.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; fetch the model again")
    try:
        # Mapped into memory, as the default does it, every page read would count as this process's.
        file = safe_open(path, "np", backend="pread")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged or truncated ({reason}); fetch the model again") from error
    opened = {}
    for name, part in slices.items():
        if not name.isprintable():
            raise UserError(f"{path}: {name!r} is not the name of a tensor; fetch the model again")
        if part.get_dtype() not in DTYPES:
            raise UserError(
                f"{path}: tensor {name} is stored as {part.get_dtype()}, which is not supported; "
                "save the model as float32, float16 or bfloat16"
            )
        opened[name] = Tensor(tuple(part.get_shape()), DTYPES[part.get_dtype()], _reader(path, file, name))
    return opened


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata in the header of a safetensors file, such as `modelspec.prediction_type`."""
    return safe_open(path, "np", backend="pread").metadata() or {}


def _reader(path: Path, file: safe_open, name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            return file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:  # NumPy has at most 64 axes
            raise UserError(f"{path}: tensor {name} cannot be read ({error})") from error

    return read


def index_path(path: Path) -> Path:
    """Returns the index of the shards that stand in for the safetensors file `path`."""
    return path.with_name(path.name + ".index.json")


def list_files(path: Path) -> list[Path]:
    """Lists the files behind `path`: a safetensors file alone; an index and its shards in order.

    Raises:
      UserError: the index is malformed.
    """
    if path.suffix == ".json":
        return [path, *(path.with_name(name) for name in sorted(set(_weight_map(path).values())))]
    return [path]


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, or of the shards of which `path` is the index.

    Raises:
      FileNotFoundError, UserError: as `open_file`; or shards and index disagree.
    """
    if path.suffix != ".json":
        return open_file(path)
    opened = {file.name: open_file(file) for file in list_files(path)[1:]}
    weight_map = _weight_map(path)
    for name, shard in weight_map.items():
        if name not in opened[shard]:
            raise UserError(f"{path}: tensor {name} is not in {shard}; fetch the model again")
    for shard, tensors in opened.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                raise UserError(
                    f"{path.with_name(shard)}: tensor {name} is not in {path.name}; fetch the model again"
                )
    return {name: tensor for tensors in opened.values() for name, tensor in tensors.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Reads an index, tensor -> file; names of files only, so that nothing outside its folder is opened."""
    fix = "fetch the model again"
    weight_map = member(read_object(index, fix), "weight_map", dict, index, fix)
    if not all(map(str.isprintable, weight_map)):
        raise UserError(f"{index}: a tensor's name has control characters in it; {fix}")
    for name in weight_map.values():
        if not isinstance(name, str) or not _is_file_name(name) or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {shown(name)} is not the name of a safetensors file; {fix}")
    return weight_map


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and len(name.encode()) <= 255


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] = {},
) -> None:
    """Writes tensors into a safetensors file, or into shards with an index where they are too large for it.

    Args:
      path: of the single file; shards are named after it as diffusers and transformers do.
      tensors: each is read when it is its turn, and kept no longer.
      max_shard_bytes: of a file.
      metadata: for the header of each file.

    Raises:
      OSError: the disk is full, or the file cannot be written.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-_RANKS[item[1].dtype], item[0]))
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in ordered:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _write_file(path, shards[0], metadata)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = path.with_name(f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}")
        _write_file(file, shard, metadata)
        weight_map |= dict.fromkeys(shard, file.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(index_path(path), index)


def _write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    # transformers insists on the entry "format".
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, tensor in tensors.items():
            value = tensor.read()
            assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype), name
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
