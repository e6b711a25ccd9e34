"""Encoded examples on disk: a TFDS dataset in ARRAY_RECORD files with a manifest that says what made it.

`tensorflow_datasets.builder_from_directory(DIR).as_data_source(split)` opens the result; neither writing nor
reading needs TensorFlow. The manifest is written last: a folder without one is no dataset, or not yet.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from numpy.typing import DTypeLike

from dspo_jax import json_files, schema
from dspo_jax.data.caption_states import FOLDER as CAPTIONS_FOLDER
from dspo_jax.errors import UserError
from dspo_jax.files import sha256
from dspo_jax.images.image_files import BadRow
from dspo_jax.json_files import JsonObject
from dspo_jax.locks import is_empty, is_lock
from dspo_jax.pipelines.stored import T5_DTYPES, T5_KEY, comparable
from dspo_jax.schema import REQUIRED, Key, integer

if TYPE_CHECKING:  # `dspo_jax.data.inspect` reads datasets without JAX
    import jax

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
DATASET_NAME = "pairs"
UNFINISHED = ".unfinished"
"""The folder within a dataset's that is there as long as it is being written."""
COMMON_FEATURES = frozenset({"moments", "preference", "loser_won", "caption", "key"})
"""Features of every dataset; the others are what the model is conditioned on and, in some, `SCORES`."""
SCORES = "scores"
SCORES_FOLDER = "scores"
"""The folder within a dataset's with the scores of all images of its source, also of those left out."""
SCORES_MADE_OF = "scores.json"
"""The file in it that says what the scores follow from."""
_FEATURES = "features.json"  # by TFDS
_REMAKE = "delete the folder and run dspo_jax.encode again"

_OBJECT = Key(REQUIRED, dict)
_COUNT = integer(low=0, high=1 << 50)
_LIST = Key(REQUIRED, listed="always", length=range(1 << 20))
_KEYS: dict[str, Key] = {
    "format_version": integer(),
    "model": _OBJECT,
    "source": _OBJECT,
    "resolution": integer(),
    "images_per_example": integer(high=64),
    "splits": _OBJECT,
}
_MODEL_KEYS = {"vae_scale_factor": integer(), "latent_channels": integer()}
_SPLIT_KEYS = {
    "num_examples": _COUNT,
    "shards": _LIST,
    "skipped": _OBJECT,
    "disliked": integer(0, low=0, high=1 << 50),
}
_FILE_KEYS = {"file": Key(REQUIRED, str), "bytes": _COUNT, "sha256": Key(REQUIRED, str)}
_SHARD_KEYS = {**_FILE_KEYS, "num_examples": _COUNT}
_T5_KEYS = {
    "sha256": Key(REQUIRED, str),
    "length": integer(),
    "dtype": Key(REQUIRED, str, allowed=T5_DTYPES),
}
_CAPTION_KEYS = {"count": _COUNT, "files": _LIST}


def feature_spec(
    moments_shape: Sequence[int | None],
    conditioning: Mapping[str, "jax.ShapeDtypeStruct"],
    *,
    scored: bool = False,
) -> tfds.features.FeaturesDict:
    """Returns the TFDS schema of an example.

    Args:
      moments_shape: [P, h, w, 2C]; P = 2 for pairs (winner, loser), 1 for single images, more for lists; h
        and w are None where images have several sizes.
      conditioning: arrays that the model is conditioned on, `Pipeline.conditioning_shapes`.
      scored: whether each image has a score.

    Returns:
      Features `moments` float16 (mean ‖ std of the VAE's posterior in the UNet's units), those of
      `conditioning`, `preference` float32, `loser_won` bool, `caption` and `key`; of scored images also
      `scores` float32 [P].
    """

    def raw(shape: Sequence[int | None], dtype: DTypeLike) -> tfds.features.Tensor:
        # As raw bytes: the default encoding, one protobuf number per value, is a hundred times slower.
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES)

    return tfds.features.FeaturesDict(
        {
            "moments": raw(moments_shape, np.float16),
            **{name: raw(each.shape, each.dtype) for name, each in conditioning.items()},
            **({SCORES: raw(moments_shape[:1], np.float32)} if scored else {}),
            "preference": tfds.features.Scalar(np.float32),
            "loser_won": tfds.features.Scalar(np.bool_),
            "caption": tfds.features.Text(),
            "key": tfds.features.Text(),
        }
    )


def read_features(directory: str | Path) -> tfds.features.FeaturesDict:
    """Reads the schema of an encoded dataset's examples, as `feature_spec` made it.

    Raises:
      FileNotFoundError: there is none.
      UserError: it is damaged.
    """
    path = Path(directory) / _FEATURES
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_REMAKE}")
    try:
        features = tfds.features.FeaturesDict.from_config(str(directory))
        missing = COMMON_FEATURES - set(features)
    except (ImportError, TypeError, ValueError, ParseError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged ({reason}); {_REMAKE}") from error
    if missing:
        raise UserError(f"{path}: damaged (no {min(missing)!r}); {_REMAKE}")
    return features


def tfds_split(split: str, bucket: str | None = None) -> str:
    """Names the TFDS split of a split's examples; images of several sizes have a split for each size."""
    return f"{split}_{bucket}" if bucket else split


def to_float16(moments: np.ndarray) -> np.ndarray:
    """Rounds an example's moments to the dtype of the shards.

    Raises:
      BadRow: "moments not finite in float16": an overflow (beyond 65504), infinity or NaN.
    """
    with np.errstate(over="ignore"):
        rounded = moments.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise BadRow("moments not finite in float16", f"largest magnitude was {np.abs(moments).max()}")
    return rounded


def read_manifest(directory: str | Path) -> JsonObject:
    """Reads the manifest of an encoded dataset.

    Raises:
      FileNotFoundError: there is none.
      UserError: it is damaged, or of another format version.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        if (path.parent / UNFINISHED).is_dir():
            raise FileNotFoundError(
                f"{path}: no such file: {directory} is not finished; run dspo_jax.encode again, as it was "
                "started"
            )
        raise FileNotFoundError(f"{path}: no such file; {directory} is not a dataset made by dspo_jax.encode")
    manifest = json_files.read_object(path, _REMAKE)
    version = manifest.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version = {json_files.shown(version)}, this dspo_jax reads {FORMAT_VERSION}; "
            f"{_REMAKE}"
        )
    try:
        _check_content(manifest)
    except UserError as error:
        raise UserError(f"{path}: damaged manifest ({error}); {_REMAKE}") from error
    return manifest


def _check_content(manifest: JsonObject) -> None:
    """Refuses a manifest that lacks what readers look up, or holds it in another form."""
    schema.check("manifest", manifest, _KEYS)
    schema.check("model", manifest["model"], _MODEL_KEYS)
    for split, content in manifest["splits"].items():
        where = f"split {json_files.shown(split)}"
        schema.check("splits", {split: content}, {split: _OBJECT})
        schema.check(where, content, _SPLIT_KEYS)
        for number, shard in enumerate(content["shards"]):
            schema.check(where, {"shards": shard}, {"shards": _OBJECT})
            schema.check(f"{where}, shard {number}", shard, _SHARD_KEYS)
            if Path(shard["file"]).name != shard["file"]:
                raise UserError(f"{where}, shard {number}: file = {shard['file']!r} leads out of the folder")
    if manifest.get(T5_KEY) is None:
        return
    both = {T5_KEY: manifest[T5_KEY], "captions": manifest.get("captions")}
    schema.check("manifest", both, dict.fromkeys(both, _OBJECT))
    schema.check(T5_KEY, manifest[T5_KEY], _T5_KEYS)
    schema.check("captions", manifest["captions"], _CAPTION_KEYS)
    for number, file in enumerate(manifest["captions"]["files"]):
        schema.check("captions", {"files": file}, {"files": _OBJECT})
        schema.check(f"captions, file {number}", file, _FILE_KEYS)
        if Path(file["file"]) != Path(CAPTIONS_FOLDER) / Path(file["file"]).name:
            raise UserError(f"captions, file {number}: file = {file['file']!r} leads out of the folder")


def check_manifest(
    manifest: JsonObject,
    fingerprint: JsonObject,
    resolution: int | None = None,
    *,
    path: str | Path = MANIFEST,
) -> None:
    """Refuses shards that were not made for a model.

    Args:
      manifest: from `read_manifest`.
      fingerprint: `Pipeline.fingerprint()` of the model. Its `model` is only a name (a copied or fine-tuned
        model has another one) and is not compared.
      resolution: what the training expects, in pixels; None accepts any.
      path: the manifest's file or folder, for the message.

    Raises:
      UserError: names the file, the key, both values and the fix.
    """
    made_with, needed = comparable(manifest["model"], fingerprint)
    for key in sorted((made_with.keys() | needed.keys()) - {"model"}):
        theirs, ours = made_with.get(key), needed.get(key)
        if theirs != ours and key == "max_chunks":
            raise UserError(
                f"{path}: captions are in {theirs} chunk(s), but {ours} are asked for; set "
                f"--config.text.max_chunks={theirs}, or encode the data again with {ours}"
            )
        if theirs != ours and key == "t5_length" and theirs and ours:
            raise UserError(
                f"{path}: T5 has {theirs} tokens of a caption, but {ours} are asked for; set "
                f"--config.text.max_sequence_length={theirs}, or encode the data again with {ours}"
            )
        if theirs != ours:
            raise UserError(
                f"{path}: model.{key} = {theirs!r}, but this model has {ours!r}: the shards were encoded "
                f"with another model ({made_with.get('model')!r}); encode the data again with this one"
            )
    if resolution is not None and manifest["resolution"] != resolution:
        raise UserError(
            f"{path}: resolution = {manifest['resolution']}, but {resolution} is expected; encode the data "
            f"again with --config.resolution={resolution}"
        )


def verify_shards(
    directory: str | Path, manifest: JsonObject | None = None, *, checksums: bool = False
) -> None:
    """Checks that every shard is there and whole: its size, and on request its content.

    Args:
      directory: the dataset.
      manifest: of the dataset, if already read.
      checksums: also compare SHA-256 sums, which reads every byte.

    Raises:
      FileNotFoundError: a shard is missing.
      UserError: a file is truncated or altered. Both name the file and the fix.
    """
    manifest = read_manifest(directory) if manifest is None else manifest
    files = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    files += manifest["captions"]["files"] if manifest.get(T5_KEY) else []
    for file in files:
        path = Path(directory) / file["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: file is missing; {_REMAKE}")
        size = path.stat().st_size
        if size != file["bytes"]:
            raise UserError(
                f"{path}: {size} bytes, the manifest says {file['bytes']}: truncated or altered; {_REMAKE}"
            )
        if checksums and sha256(path) != file["sha256"]:
            raise UserError(f"{path}: content does not match the manifest's sha256: damaged; {_REMAKE}")


def is_complete(out: str | Path, manifest: JsonObject, splits: Iterable[str]) -> bool:
    """Returns whether `out` holds exactly the dataset about to be written, intact.

    Args:
      out: the output folder.
      manifest: what would be passed to `DatasetWriter`.
      splits: the splits that would be written.

    Raises:
      UserError: `out` holds anything else: another dataset (the message says which key differs), a damaged
        one, other files, or it is not a folder. It is never overwritten.
    """
    out = Path(out)
    if not out.exists() or (out.is_dir() and is_empty(out)):
        return False
    if not out.is_dir():
        raise UserError(f"--out={out}: exists and is not a folder; choose another")
    if not (out / MANIFEST).is_file():
        if (out / UNFINISHED).is_dir() or _holds_scores_alone(out):
            return False
        raise UserError(f"--out={out}: not empty and not an encoded dataset; choose another folder")
    there = read_manifest(out)
    wanted = {**manifest, "splits": sorted(splits)}
    found = {key: there.get(key) for key in manifest} | {"splits": sorted(there["splits"])}
    found["model"], wanted["model"] = comparable(found["model"] or {}, wanted["model"])
    difference = first_difference(found, wanted)
    if difference is not None:
        key, theirs, ours = difference
        raise UserError(
            f"--out={out}: holds another dataset ({key} = {theirs!r} there, {ours!r} here); choose another "
            "folder or delete it"
        )
    verify_shards(out, there, checksums=True)
    return True


def _holds_scores_alone(out: Path) -> bool:
    """Tells whether nothing but scores lies in a folder, as before the first of its rows is encoded."""
    entries = {entry.name for entry in out.iterdir() if not is_lock(entry)}
    files = {file.name for file in out.glob(f"{SCORES_FOLDER}/*")}
    # At the same moment another share may be making the first file, under a hidden name.
    begins = all(name.startswith(f".{SCORES_MADE_OF}.") for name in files)
    return entries == {SCORES_FOLDER} and (SCORES_MADE_OF in files or begins)


def first_difference(theirs: object, ours: object) -> tuple[str, object, object] | None:
    """Finds where two JSON trees first differ: (dotted key, value in theirs, value in ours), or None."""
    # Through JSON, as a tuple read back is a list.
    return next(_differences(theirs, json.loads(json.dumps(ours))), None)


def _differences(a: object, b: object, key: str = "") -> Iterator[tuple[str, object, object]]:
    """Yields (dotted key, value in a, value in b) wherever two JSON trees differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key, a, b
