"""Encodes preference pairs once, so that training never sees an image: captions and pictures in, shards out.

    python -m dspo_jax.encode --config configs/encode/emoji.py --config.model=MODEL_DIR --out OUT

Every key of the config, with its default, stands in configs/encode/common.py.
"""

import hashlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict, config_flags
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dspo_jax import cli, spelling
from dspo_jax.data import shards
from dspo_jax.data.sources import BadRow, PreferencePair, Source, decode_pair, get_source
from dspo_jax.pipeline import Pipeline, load_pipeline

_FLIPS = ("none", "random")


def prepare_image(image: Image.Image, resolution: int, flip: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Resizes the shortest side to `resolution` (bilinear) and keeps the centre, as the released code does.

    Returns:
      Pixels [resolution, resolution, 3] uint8, and what SDXL is told about it, [6] int32: original height and
      width, top and left of the crop in the resized image, target height and width.
    """
    width, height = image.size
    resized_width, resized_height = (resolution * side // min(width, height) for side in (width, height))
    left, top = round((resized_width - resolution) / 2), round((resized_height - resolution) / 2)
    resized = image.resize((resized_width, resized_height), Image.Resampling.BILINEAR)
    if flip:
        resized = ImageOps.mirror(resized)
    square = resized.crop((left, top, left + resolution, top + resolution))
    return np.asarray(square), np.asarray([height, width, top, left, resolution, resolution], np.int32)


class Encoder:
    """Turns a source's rows into shard examples with one model."""

    def __init__(self, pipe: Pipeline, config: ConfigDict):
        if config.flip not in _FLIPS:
            raise ValueError(spelling.unknown("config.flip", config.flip, _FLIPS))
        for key in ("resolution", "batch_size", "rows_per_shard"):
            if config[key] < 1:
                raise ValueError(f"config.{key} = {config[key]}: must be at least 1")
        if config.resolution % pipe.vae_scale_factor:
            raise ValueError(
                f"config.resolution = {config.resolution}: must be a multiple of {pipe.vae_scale_factor}, "
                "the pixels per latent of this model's VAE"
            )
        self._pipe = pipe
        self._config = config

    def moments_shape(self, images_per_example: int) -> tuple[int, int, int, int]:
        """[P, h, w, 2C] of the examples."""
        side = self._config.resolution // self._pipe.vae_scale_factor
        return images_per_example, side, side, 2 * self._pipe.latent_channels

    def examples(self, rows: Iterable[PreferencePair], on_bad_row: "BadRowLog") -> Iterator[dict[str, Any]]:
        """Yields the examples of the good rows in order; tells `on_bad_row` of the others."""
        rows = iter(rows)
        while batch := list(itertools.islice(rows, self._config.batch_size)):
            decoded = []
            for row in batch:
                try:
                    decoded.append((row, self._prepare(row)))
                except BadRow as problem:
                    on_bad_row(row, problem)
            if not decoded:
                continue
            moments = self._encode_images(np.stack([pixels for _, (pixels, _) in decoded]))
            tokens = self._pipe.tokenize([row.caption for row, _ in decoded])
            for i, (row, (_, micro_conditioning)) in enumerate(decoded):
                try:
                    rounded = shards.to_float16(moments[i])
                except BadRow as problem:
                    on_bad_row(row, problem)
                    continue
                yield {
                    "moments": rounded,
                    "tokens": np.asarray(tokens[i], np.int32),
                    "micro_conditioning": micro_conditioning,
                    "preference": np.float32(row.preference),
                    "loser_won": np.bool_(row.loser_won),
                    "caption": row.caption,
                    "key": row.key,
                }

    def _prepare(self, row: PreferencePair) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [P, H, W, 3] uint8 and micro-conditioning [P, 6]; a pair is flipped whole or not at all."""
        flip = False
        if self._config.flip == "random":
            flip = hashlib.sha256(f"{self._config.seed}|{row.key}".encode()).digest()[0] < 128
        prepared = [prepare_image(image, self._config.resolution, flip) for image in decode_pair(row)]
        return np.stack([pixels for pixels, _ in prepared]), np.stack([micro for _, micro in prepared])

    def _encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels [n, P, H, W, 3] uint8 -> moments [n, P, h, w, 2C] float32."""
        n, per_example = pixels.shape[:2]
        # The VAE always sees a full batch, so that it is compiled once.
        images = pixels.reshape(-1, *pixels.shape[2:]).astype(np.float32) / 127.5 - 1.0
        missing = (self._config.batch_size - n) * per_example
        padded = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.float32)])
        moments = np.asarray(self._pipe.encode_moments(padded), np.float32)[: n * per_example]
        return moments.reshape(n, per_example, *moments.shape[1:])


class BadRowLog:
    """Counts a split's unusable rows by reason and stops the run when there are too many."""

    def __init__(self, split: str, num_rows: int, max_skipped: float):
        self.reasons: Counter[str] = Counter()
        self._split, self._num_rows, self._max_skipped = split, num_rows, max_skipped

    def __call__(self, row: PreferencePair, problem: BadRow) -> None:
        """Records a row.

        Raises:
          ValueError: more than `max_skipped` of the split's rows are unusable.
        """
        self.reasons[problem.reason] += 1
        message = f"split {self._split!r}, row {row.key!r}: {problem}"
        if self.reasons.total() > self._max_skipped * self._num_rows:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common())
            raise ValueError(
                f"config.source.max_skipped = {self._max_skipped:g}: exceeded by {self.reasons.total()} of "
                f"{self._num_rows} rows ({reasons}); last: {message}; mend the source or raise the limit"
            )
        logging.warning("skipped %s", message)


def encode(config: ConfigDict, out: Path) -> tuple[dict[str, Any], bool]:
    """Encodes what `config` names into a dataset at `out`.

    Args:
      config: see configs/encode/common.py.
      out: the dataset's folder; it appears when it is complete.

    Returns:
      The dataset's manifest, and whether it was already there (then nothing is written).

    Raises:
      ValueError: a config value, the source's data or the content of `out` is refused.
      FileNotFoundError: the model or a file of the source is missing.
    """
    if not config.model:
        raise ValueError("config.model is not set: give --config.model=MODEL_DIR, a diffusers folder")
    arguments = config.source.to_dict()
    name, max_skipped = arguments.pop("name"), arguments.pop("max_skipped")
    if not name:
        raise ValueError("config.source.name is not set: start from a recipe in configs/encode")
    source = get_source(name, **arguments)
    splits = tuple(config.splits) or source.splits
    for split in splits:
        if split not in source.splits:
            raise ValueError(spelling.unknown("config.splits", split, source.splits))
        if source.num_examples(split) == 0:
            raise ValueError(f"config.source.name = {name!r}: split {split!r} is empty; check its arguments")

    pipe = load_pipeline(config.model)
    encoder = Encoder(pipe, config)
    manifest = {
        "model": pipe.fingerprint(),
        "resolution": config.resolution,
        "source": {"name": name, "arguments": arguments},
        "encoding": {key: config[key] for key in ("flip", "seed", "batch_size", "rows_per_shard")},
    }
    if shards.is_complete(out, manifest, splits):
        return shards.read_manifest(out), True
    features = shards.feature_spec(encoder.moments_shape(source.images_per_example), len(pipe.tokenizers))
    logs = {split: BadRowLog(split, source.num_examples(split), max_skipped) for split in splits}
    with shards.DatasetWriter(out, features) as writer, _progress_bar() as progress:
        for split in splits:
            rows = _track(progress, split, source)
            num_shards = math.ceil(source.num_examples(split) / config.rows_per_shard)
            written = 0
            for shard in range(num_shards):
                of_shard = itertools.islice(rows, config.rows_per_shard)
                examples = encoder.examples(of_shard, logs[split])
                written += writer.write_shard(split, shard, num_shards, examples)
            if written == 0:
                reasons = dict(logs[split].reasons)
                raise ValueError(f"split {split!r} of source {name!r}: no usable row ({reasons})")
        return writer.commit(manifest, {split: log.reasons for split, log in logs.items()}), False


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        rows_per_second = task.finished_speed or task.speed or 0
        return Text(f"{rows_per_second * task.fields['images_per_example']:.0f} images/s")


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _ImagesPerSecond(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def _track(progress: Progress, split: str, source: Source) -> Iterator[PreferencePair]:
    """The split's rows, advancing a progress bar as they are taken."""
    total = source.num_examples(split)
    task = progress.add_task(f"encode {split}", total=total, images_per_example=source.images_per_example)
    for row in source.pairs(split):
        yield row
        progress.advance(task)


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    started = time.perf_counter()
    out = Path(flags.FLAGS.out)
    manifest, already_there = encode(flags.FLAGS.config, out)
    for split, content in manifest["splits"].items():
        skipped = "".join(f", {count} skipped: {reason}" for reason, count in content["skipped"].items())
        num_shards = len(content["shards"])
        print(f"{out}: {split}: {content['num_examples']} examples in {num_shards} shards{skipped}")
    seconds = time.perf_counter() - started
    print("already encoded, verified" if already_there else f"encoded in {seconds:.1f} s")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "What to encode, e.g. configs/encode/emoji.py.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("out", None, "Folder to write the dataset to.", required=True)
    cli.run(main)
