"""Any dataset of TensorFlow Datasets in array_record files, read by position and without TensorFlow."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dspo_jax.data.sources.pairs import PreferencePair, Row
from dspo_jax.data.sources.selection import Candidates, Selection, check_ids, require, sort_splits
from dspo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tfds(Selection):
    """A prepared dataset of TensorFlow Datasets, in array_record files.

    Every example has a caption (feature `Text`), the winner and the loser (features `Image`, taken as the
    bytes of their files). `preference`, in [0.5, 1], is 1 where there is no such feature; the key is the
    number of the example where there is none. `loser_won` is known where the images have ids. Of single
    images `preference` is the label, in [0, 1] or true and false. Nothing is downloaded or prepared.

    A record holds all of an example, so that captions cannot be read without the images beside them: holding
    captions out and every filter read the whole split once. Without these only what is yielded is read.

    Attributes:
      dataset: "NAME", "NAME/CONFIG" or "NAME/CONFIG:VERSION".
      data_dir: the folder that datasets are in; "" is TFDS's default.
      caption, winner, loser, preference, key: names of the features. Datasets without `preference` or `key`
        are fine as long as these have not been given other names. An empty `loser` is for single images.
      winner_id, loser_id: names of the features that tell images apart, both or neither; with them the whole
        split is read once.
      min_margin (of `Selection`): smallest 2 * preference - 1, from 0 to 1; of labels, its size.
    """

    dataset: str = ""
    data_dir: str = ""
    caption: str = "caption"
    winner: str = "winner"
    loser: str = "loser"
    preference: str = "preference"
    key: str = "key"
    winner_id: str = ""
    loser_id: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ids(self.winner_id, self.loser_id, self.loser)

    @property
    def images_per_example(self) -> int:
        return 2 if self.loser else 1

    def file_splits(self) -> tuple[str, ...]:
        require("dataset", self.dataset)
        return sort_splits(list(_builder(self).info.splits))

    def candidates(self, split: str) -> Candidates:
        examples = _examples(self, split)
        captions, preferences = [""] * len(examples), np.ones(len(examples))
        held_out = self.validation_share and self.file_splits() == ("train",)
        ids: dict[str, list[str]] = {name: [] for name in (self.winner_id, self.loser_id) if name}
        if held_out or self.caption_pattern or self.min_margin or self.one_pair_per_prompt or ids:
            for i in range(len(examples)):
                example = examples[i]
                captions[i] = self._decode(example[self.caption], i)
                preferences[i] = example.get(self.preference, 1.0)
                for name, found in ids.items():
                    found.append(str(example[name]))
        margins = 2 * preferences - 1
        rows = pa.table(
            {
                "caption": pa.array(captions, pa.large_string()),
                "margin": pa.array(margins if self.loser else np.abs(margins)),
                "row": pa.array(np.arange(len(examples))),
                **{f"id {name}": pa.array(found, pa.large_string()) for name, found in ids.items()},
            }
        )
        images = (f"id {self.winner_id}", f"id {self.loser_id}") if ids else None
        return Candidates(rows, ("row",), {}, ("row",), images)

    def _decode(self, caption: bytes, row: int) -> str:
        try:
            return caption.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"config.source.dataset = {self.dataset!r}: example {row}: feature {self.caption!r} is not "
                f"UTF-8 ({error}); write the dataset anew"
            ) from error

    def digest(self, split: str) -> str:
        """Hashes the selected rows' numbers and 256 examples; to read all would take as long as encoding."""
        digest = hashlib.sha256(super().digest(split).encode())
        rows = self.selected(split).rows["row"].to_numpy()
        examples = _examples(self, split if split in self.file_splits() else "train")
        for place in np.unique(np.linspace(0, len(rows) - 1, min(256, len(rows))).astype(int)):
            example = examples[int(rows[place])]
            for name in filter(None, (self.caption, self.winner, self.loser)):
                digest.update(example[name])
            digest.update(str(example.get(self.preference, 1.0)).encode())
        return digest.hexdigest()

    def pairs(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
        selected = self.selected(split).rows[start:stop]
        examples = _examples(self, split if split in self.file_splits() else "train")
        for row, loser_won in zip(*(selected[name].to_numpy() for name in ("row", "loser_won")), strict=True):
            example = examples[int(row)]
            key = example.get(self.key, str(row))
            yield PreferencePair(
                caption=self._decode(example[self.caption], int(row)),
                winner=example[self.winner],
                loser=example[self.loser] if self.loser else None,
                preference=float(example.get(self.preference, 1.0)),
                key=key.decode(errors="backslashreplace") if isinstance(key, bytes) else str(key),
                loser_won=bool(loser_won),
            )


@functools.cache
def _builder(source: Tfds) -> Any:
    """Returns the dataset, once it is seen to be there and to have what the source reads.

    Raises:
      FileNotFoundError: it is not there, or not prepared.
      UserError: its files or features are of another kind.
    """
    import tensorflow_datasets as tfds  # slow to import, and needed by this source only
    from tensorflow_datasets.core.file_adapters import FileFormat

    what = f"config.source.dataset = {source.dataset!r}"
    try:
        builder = tfds.builder(source.dataset, data_dir=source.data_dir or None)
    except ValueError as error:
        raise FileNotFoundError(
            f"{what}: not found in {source.data_dir or 'the default folder of TFDS'}; "
            "--config.source.data_dir=DIR names the folder that holds NAME/VERSION or NAME/CONFIG/VERSION"
        ) from error
    if not builder.info.splits:
        raise FileNotFoundError(f"{what}: not prepared in {builder.data_dir}; prepare it with TFDS")
    if builder.info.file_format != FileFormat.ARRAY_RECORD:
        file_format = builder.info.file_format.value
        raise UserError(
            f"{what}: its files are of format {file_format!r}; prepare it with file_format='array_record'"
        )
    features = builder.info.features
    wanted = {
        "caption": tfds.features.Text,
        "winner": tfds.features.Image,
        "loser": tfds.features.Image,
        "preference": tfds.features.Tensor,
        "key": tfds.features.Tensor,
        "winner_id": tfds.features.Tensor,
        "loser_id": tfds.features.Tensor,
    }
    for argument, kind in wanted.items():
        name = getattr(source, argument)
        if (argument in ("loser", "winner_id", "loser_id") and not name) or (
            argument in ("preference", "key") and name == argument and name not in features
        ):
            continue
        fix = f"name one with --config.source.{argument}=FEATURE"
        if name not in features:
            raise UserError(f"{what}: no feature {name!r} (found: {', '.join(sorted(features))}); {fix}")
        found = type(features[name]).__name__
        if not isinstance(features[name], kind):
            raise UserError(f"{what}: feature {name!r} is of type {found}, not {kind.__name__}; {fix}")
    return builder


@functools.cache
def _examples(source: Tfds, split: str) -> Sequence[Row]:
    """Returns the examples of a split of the files, by number; images are left undecoded."""
    import tensorflow_datasets as tfds

    images = [name for name in (source.winner, source.loser) if name]
    decoders = {name: tfds.decode.SkipDecoding() for name in images}
    return _builder(source).as_data_source(split, decoders=decoders)
