"""Writes shards: any number of processes fill one dataset, stop anywhere, and go on where they were."""

import contextlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module
from tensorflow_datasets.core import naming

from dspo_jax.data import shards
from dspo_jax.data.records import Example, to_record
from dspo_jax.errors import UserError
from dspo_jax.files import name_write_errors, sha256
from dspo_jax.json_files import JsonObject, member, read_object
from dspo_jax.pipelines.stored import T5_KEY, comparable

# One record a group: a random read touches one record only. Compression would make SD1.5 moments 6 % smaller,
# for more than half of the time to read and to write them.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_PLAN = "plan.json"


class DatasetWriter:
    """Fills the folder of a dataset, shard by shard, in any order and from any number of processes.

    A shard is written under a temporary name and gets its own when it is whole; a note beside it then says
    what it holds. Notes lie in a folder of their own until `commit` writes the manifest, without which the
    folder is no dataset. Files depend on the examples only, so that a rerun is byte-identical.
    """

    def __init__(
        self,
        out: Path,
        features: tfds.features.FeaturesDict,
        manifest: JsonObject,
        num_shards: Mapping[str, int],
        buckets: Sequence[str] = (),
    ):
        """Starts a dataset, or takes up one that was started with the same arguments.

        Args:
          out: the dataset's folder; see `shards.is_complete` for what it may hold.
          features: see `shards.feature_spec`.
          manifest: what makes the dataset (model, source, ...), free of dates.
          num_shards: into how many shards each split is divided.
          buckets: "HEIGHTxWIDTH" in pixels of the sizes that the images may have; each has files of its own.
            Empty: one size.

        Raises:
          UserError: an unfinished dataset of other settings is there.
        """
        self._out, self._unfinished = out, out / shards.UNFINISHED
        self._id = uuid.uuid4().hex  # processes of several hosts may have the same number
        self._features = features
        self._manifest, self._num_shards, self._buckets = manifest, num_shards, tuple(buckets)
        plan = json.loads(json.dumps({**manifest, "num_shards": num_shards, "buckets": self._buckets}))
        self._unfinished.mkdir(parents=True, exist_ok=True)
        path = self._unfinished / _PLAN
        if path.exists() and any(self._unfinished.glob("*-*.json")):
            fix = "delete the folder"
            there = read_object(path, fix)
            models = comparable(member(there, "model", dict, path, fix), plan["model"])
            pair = [each | {"model": model} for each, model in zip((there, plan), models, strict=True)]
            difference = shards.first_difference(*pair)
            if difference is not None:
                key, theirs, ours = difference
                raise UserError(
                    f"--out={out}: holds an unfinished dataset of other settings ({key} = {theirs!r} there, "
                    f"{ours!r} here); choose another folder or delete it"
                )
        self._replace(path, json.dumps(plan, indent=2, ensure_ascii=False) + "\n")

    def finished(self) -> set[tuple[str, int]]:
        """Lists (split, number) of the shards that any process has finished."""
        there = set(os.listdir(self._unfinished)) if self._unfinished.is_dir() else set()
        return {
            (split, number)
            for split, count in self._num_shards.items()
            for number in range(count)
            if self._note(split, number).name in there
        }

    def skipped(self, split: str) -> Counter[str]:
        """Rows left out of a split's finished shards, by reason."""
        notes = (self._read_note(*shard) for shard in self.finished() if shard[0] == split)
        return sum((Counter(note["skipped"]) for note in notes), Counter())

    def captions(self) -> set[str]:
        """Returns the captions of all finished shards, of a dataset that stores T5's states."""
        found: set[str] = set()
        for shard in self.finished():
            found.update(json.loads(self._captions(*shard).read_text(encoding="utf-8")))
        return found

    def is_written(self, split: str, number: int) -> bool:
        """Returns whether a shard is finished; if its files have changed, it no longer is."""
        if not self._note(split, number).exists():
            return False
        for file in self._read_note(split, number)["files"]:
            written = self._out / file["file"]
            if not written.is_file() or written.stat().st_size != file["bytes"]:
                logging.warning("%s: not as it was written; it is written again", written)
                self._note(split, number).unlink()
                return False
        return True

    def write_shard(
        self,
        split: str,
        number: int,
        examples: Iterable[Example],
        skipped: Mapping[str, int] | None = None,
    ) -> int:
        """Writes one shard; returns the number of examples in it.

        Args:
          split: of the shard.
          number: of the shard within the split.
          examples: as `shards.feature_spec` says; with buckets, the shape of `moments` says which one.
          skipped: rows left out by reason; read after the last example.
        """
        with contextlib.ExitStack() as stack:
            files = {
                bucket: stack.enter_context(self._open(self._file_name(split, number, bucket)))
                for bucket in self._buckets or [""]
            }
            disliked = 0
            captions = set()
            for example in examples:
                captions.add(example["caption"])
                disliked += int(len(example["moments"]) == 1 and example["preference"] < 0.5)
                file = files[self._bucket_of(example) if self._buckets else ""]
                file.write(to_record(example, sized=bool(self._buckets)))
        records = []
        for bucket, file in files.items():
            in_bucket = {"bucket": bucket} if self._buckets else {}
            records.append({"file": file.name, **in_bucket, **file.finish(self._out)})
        if self._manifest.get(T5_KEY):
            self._replace(self._captions(split, number), json.dumps(sorted(captions)))
        note: JsonObject = {"files": records, "skipped": dict(sorted((skipped or {}).items()))}
        if disliked:
            note["disliked"] = disliked
        self._replace(self._note(split, number), json.dumps(note))
        return sum(record["num_examples"] for record in records)

    def _bucket_of(self, example: Example) -> str:
        scale = self._manifest["model"]["vae_scale_factor"]
        _, height, width, _ = example["moments"].shape
        return f"{height * scale}x{width * scale}"

    def commit(
        self, left_out: Mapping[str, Mapping[str, int]] | None = None, captions: JsonObject | None = None
    ) -> JsonObject:
        """Writes TFDS's metadata and the manifest; every shard must have been written.

        Several processes may do so at once: all write the same.

        Args:
          left_out: by split, how many rows of the source's files it did not take, by reason.
          captions: what `CaptionFiles.finish` says of T5's states, if they are stored.

        Returns:
          The manifest, with `format_version`, `images_per_example` (P), `splits` and, if there are, `buckets`
          added. A split with `disliked` single images, of a preference below 1/2, says how many.

        """
        try:
            complete = self._commit(left_out or {}, captions)
        except FileNotFoundError:  # another process was faster, and has cleared the notes away
            complete = shards.read_manifest(self._out)
        shutil.rmtree(self._unfinished, ignore_errors=True)
        return complete

    def _commit(self, left_out: Mapping[str, Mapping[str, int]], captions: JsonObject | None) -> JsonObject:
        splits: JsonObject = {}
        for split, count in self._num_shards.items():
            of_split = [self._read_note(split, number) for number in range(count)]
            files = [file for note in of_split for file in note["files"]]
            splits[split] = {
                "num_examples": sum(file["num_examples"] for file in files),
                "skipped": dict(sorted(self.skipped(split).items())),
                "left_out": dict(sorted(left_out.get(split, {}).items())),
                "shards": self._drop_empty_buckets(files),
            }
            disliked = sum(note.get("disliked", 0) for note in of_split)
            if disliked:
                splits[split]["disliked"] = disliked
        complete = {
            "format_version": shards.FORMAT_VERSION,
            **self._manifest,
            "images_per_example": self._features["moments"].shape[0],
            "splits": splits,
            **({} if captions is None else {"captions": captions}),
        }
        if self._buckets:
            used = {file["bucket"] for split in splits.values() for file in split["shards"]}
            complete["buckets"] = [bucket for bucket in self._buckets if bucket in used]
        staging = self._unfinished / f"metadata-{self._id}"
        try:
            self._write_metadata(staging, splits)
            self._replace(
                self._out / shards.MANIFEST, json.dumps(complete, indent=2, ensure_ascii=False) + "\n"
            )
        except FileNotFoundError:  # another process was faster
            return shards.read_manifest(self._out)
        shutil.rmtree(self._unfinished, ignore_errors=True)
        return complete

    def _drop_empty_buckets(self, files: list[JsonObject]) -> list[JsonObject]:
        """Drops the files of buckets that no image of the split fell into."""
        kept = []
        for bucket in self._buckets or [None]:
            of_bucket = [file for file in files if file.get("bucket") == bucket]
            if bucket is None or any(file["num_examples"] for file in of_bucket):
                kept += of_bucket
                continue
            for file in of_bucket:
                (self._out / file["file"]).unlink(missing_ok=True)
        return kept

    def _write_metadata(self, staging: Path, splits: JsonObject) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for content in splits.values():
            for file in content["shards"]:
                (staging / file["file"]).touch()  # TFDS looks for the names
        infos = []
        for split, content in splits.items():
            for bucket in dict.fromkeys(file.get("bucket") for file in content["shards"]):
                files = [file for file in content["shards"] if file.get("bucket") == bucket]
                name = shards.tfds_split(split, bucket)
                infos.append(
                    tfds.core.SplitInfo(
                        name=name,
                        shard_lengths=[file["num_examples"] for file in files],
                        num_bytes=sum(file["bytes"] for file in files),
                        filename_template=naming.ShardedFileTemplate(
                            data_dir=staging,
                            dataset_name=shards.DATASET_NAME,
                            split=name,
                            filetype_suffix="array_record",
                        ),
                    )
                )
        tfds.folder_dataset.write_metadata(
            data_dir=staging,
            features=self._features,
            split_infos=infos,
            version="1.0.0",
            check_data=False,  # the check reads through TensorFlow
        )
        for path in staging.glob("*.json"):
            path.replace(self._out / path.name)

    def _file_name(self, split: str, number: int, bucket: str) -> str:
        name = shards.tfds_split(split, bucket)
        return f"{shards.DATASET_NAME}-{name}.array_record-{number:05d}-of-{self._num_shards[split]:05d}"

    def _note(self, split: str, number: int) -> Path:
        return self._unfinished / f"{split}-{number:05d}.json"

    def _captions(self, split: str, number: int) -> Path:
        return self._unfinished / f"{split}-{number:05d}.captions"

    def _read_note(self, split: str, number: int) -> JsonObject:
        return read_object(self._note(split, number), "delete it, and its shard is written again")

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator["_File"]:
        # Two processes that write the same shard do not disturb each other.
        file = _File(name, self._unfinished / f"{name}.{self._id}")
        try:
            yield file
        except BaseException:
            file.discard()
            raise

    def _replace(self, path: Path, text: str) -> None:
        # Not by `files.whole`, which makes the folder again that a faster process has cleared away.
        temporary = self._unfinished / f"{path.name}.{self._id}"
        with temporary.open("w", encoding="utf-8") as file, name_write_errors(path):
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class _File:
    """An array_record file under a temporary path until `finish` gives it its name."""

    def __init__(self, name: str, path: Path):
        self.name = name
        self._path = path
        self._count = 0
        with self._naming_errors():
            self._writer = array_record_module.ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)

    def write(self, record: bytes) -> None:
        with self._naming_errors():
            self._writer.write(record)
        self._count += 1

    def finish(self, folder: Path) -> JsonObject:
        """Gives the file its name in `folder`; returns its `num_examples`, `bytes` and `sha256`."""
        with self._naming_errors():
            self._writer.close()
        record = {
            "num_examples": self._count,
            "bytes": self._path.stat().st_size,
            "sha256": sha256(self._path),
        }
        self._path.replace(folder / self.name)
        return record

    def discard(self) -> None:
        if self._writer.is_open():
            with contextlib.suppress(RuntimeError):  # a file that failed fails again
                self._writer.close()
        self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """Turns array_record's RuntimeError (disk full, folder not writable) into an OSError."""
        try:
            yield
        except RuntimeError as error:
            raise OSError(f"{self._path}: cannot be written: {error}") from error
