"""Encodes a source of preference pairs into TFDS shards, once, so that training never sees an image."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import jax
from ml_collections import ConfigDict

from dspo_jax import spelling
from dspo_jax.data import shards
from dspo_jax.data.encoder import BadRowLog, PairEncoder
from dspo_jax.data.prepare import Framing, bucket_sizes, worker_pool
from dspo_jax.data.settings import EncodeSettings, parse
from dspo_jax.data.sources import PreferencePair, Source, get_source
from dspo_jax.data.writer import DatasetWriter
from dspo_jax.errors import UserError
from dspo_jax.monitoring.progress import Progress
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import cpu_cores
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline

# Seconds between two looks at the shards that all processes have finished.
_SECONDS_BETWEEN_LOOKS = 3.0


def encode(config: ConfigDict, out: Path, share: tuple[int, int] | None = None) -> bool:
    """Encodes the source that `config` names into a dataset at `out`, or the part of it that is missing.

    Args:
      config: see configs/encode/common.py.
      out: the dataset's folder.
      share: (i, n): of the shards, only every n-th from the i-th on. None: all of them or, where several
        processes are one run, those of this process; the others are then waited for.

    Returns:
      Whether the dataset is complete; False if shards of other shares are missing.

    Raises:
      UserError: a config value, the source's data or the content of `out` is refused, or another process
        encodes into it.
      FileNotFoundError: the model or a file of the source is missing.
      OSError: a shard cannot be written, or a process that decodes was ended.
    """
    settings = parse(config)
    with processes.claim(out, share):
        return _encode(settings, out, share)


def _encode(settings: EncodeSettings, out: Path, share: tuple[int, int] | None) -> bool:
    source = get_source(settings.source.name, **settings.source.arguments)
    splits = _choose_splits(settings, source)
    pipe = load_pipeline(settings.model)
    resolution = pipe.image_side if settings.resolution is None else settings.resolution
    framing = _frame(settings, resolution, pipe)
    manifest = {
        "model": pipe.fingerprint(),
        "resolution": resolution,
        "source": {
            "name": settings.source.name,
            # Where images may lie is a matter of trust; it does not change the rows.
            "arguments": {
                key: value for key, value in settings.source.arguments.items() if key != "allow_outside"
            },
            "rows_sha256": {split: source.digest(split) for split in splits},
        },
        "encoding": {key: getattr(settings, key) for key in _ENCODING},
    }
    if shards.is_complete(out, manifest, splits):
        return True
    rows = {split: source.num_examples(split) for split in splits}
    per_shard = settings.rows_per_shard
    num_shards = {split: math.ceil(count / per_shard) for split, count in rows.items()}
    rows_of = {
        (split, number): min(per_shard, rows[split] - number * per_shard)
        for split in splits
        for number in range(num_shards[split])
    }
    buckets = [f"{height}x{width}" for height, width in framing.sizes] if len(framing.sizes) > 1 else []
    side = None if buckets else resolution // pipe.vae_scale_factor
    features = shards.feature_spec(
        (source.images_per_example, side, side, 2 * pipe.latent_channels),
        pipe.conditioning_shapes(source.images_per_example),
    )
    writer = DatasetWriter(out, features, manifest, num_shards, buckets)
    workers = cpu_cores() if settings.num_workers is None else settings.num_workers
    # Imports of this module, which take long; each worker imports the module itself.
    with worker_pool(workers, [PairEncoder.__module__, DatasetWriter.__module__]) as pool:
        encoder = PairEncoder(
            pipe,
            framing,
            batch_size=settings.batch_size,
            vae_dtype=settings.vae_dtype,
            pool=pool,
            ahead=max(2 * settings.batch_size, 4 * workers),
        )
        index, count = share or (jax.process_index(), jax.process_count())
        with _Progress(writer, encoder, rows_of, source.images_per_example) as progress:
            for split, number in list(rows_of)[index::count]:
                if writer.is_written(split, number):
                    continue
                first = number * per_shard
                of_shard = source.pairs(split, first, first + rows_of[split, number])
                log = BadRowLog(split, rows[split], settings.source.max_skipped, writer.skipped(split))
                examples = encoder.examples(progress.track(of_shard), log)
                writer.write_shard(split, number, examples, log.reasons)
            while share is None and not _is_ready(out, writer, len(rows_of)):
                time.sleep(_SECONDS_BETWEEN_LOOKS)  # for the other processes of this run
                progress.look()
    if (out / shards.MANIFEST).is_file():
        return True
    if len(writer.finished()) < len(rows_of):
        return False
    try:
        for split in splits:
            skipped = writer.skipped(split)
            BadRowLog(split, rows[split], settings.source.max_skipped, skipped).check()
            if skipped.total() >= rows[split]:
                raise UserError(
                    f"split {split!r} of source {settings.source.name!r}: no usable row ({dict(skipped)})"
                )
        writer.commit({split: source.left_out(split) for split in splits})
    except FileNotFoundError:
        if not (out / shards.MANIFEST).is_file():  # else another process has just finished the dataset
            raise
    return True


# Keys of the config that decide the content of the shards, besides the model and the source.
_ENCODING = (
    "flip",
    "seed",
    "batch_size",
    "rows_per_shard",
    "vae_dtype",
    "max_aspect_ratio",
    "bucket_step",
)


def _choose_splits(settings: EncodeSettings, source: Source) -> tuple[str, ...]:
    splits = tuple(settings.splits) or tuple(source.splits)
    for split in splits:
        if split not in source.splits:
            raise UserError(spelling.unknown("config.splits", split, source.splits))
        if source.num_examples(split) == 0:
            left_out = ", ".join(f"{reason}: {count}" for reason, count in source.left_out(split).items())
            raise UserError(
                f"config.source.name = {settings.source.name!r}: split {split!r} is empty; check its "
                "arguments" + (f" (left out: {left_out})" if left_out else "")
            )
    return splits


def _frame(settings: EncodeSettings, resolution: int, pipe: Pipeline) -> Framing:
    sizes = bucket_sizes(resolution, settings.bucket_step, settings.max_aspect_ratio)
    units = {"resolution": resolution, "bucket_step": math.gcd(*sizes[-1])}
    for key, pixels in units.items():
        if pixels % pipe.vae_scale_factor:
            raise UserError(
                f"config.{key} = {getattr(settings, key)}: must be a multiple of {pipe.vae_scale_factor}, "
                "the pixels per latent of this model's VAE"
            )
    return Framing(sizes, settings.flip, settings.seed)


def _is_ready(out: Path, writer: DatasetWriter, num_shards: int) -> bool:
    """Returns whether the dataset is finished or, in the first process, can now be finished."""
    if (out / shards.MANIFEST).is_file():
        return True
    return processes.is_first() and len(writer.finished()) == num_shards


class _Progress:
    """A bar over the rows of all processes, with images/s and the share of time spent waiting for images."""

    def __init__(
        self, writer: DatasetWriter, encoder: PairEncoder, rows_of: Mapping[tuple[str, int], int], images: int
    ):
        """Takes the rows of every shard, and the number of images of a row."""
        self._writer, self._encoder, self._rows_of, self._images = writer, encoder, rows_of, images
        self._started = self._looked = time.perf_counter()
        self._before = self._finished_rows()
        self._bar = Progress(
            "encode", sum(rows_of.values()), self._before, first="compiling", active=processes.is_first()
        )

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.look()
        self._bar.__exit__(*error)

    def track(self, rows: Iterable[PreferencePair]) -> Iterator[PreferencePair]:
        """The rows of a shard, showing now and then how many are taken."""
        for taken, row in enumerate(rows, start=1):
            yield row
            if time.perf_counter() - self._looked > _SECONDS_BETWEEN_LOOKS:
                self.look(taken)

    def look(self, taken: int = 0) -> None:
        """Counts the finished shards of all processes and the rows taken of the one in work."""
        self._looked = time.perf_counter()
        done = self._finished_rows() + taken
        seconds = self._looked - self._started - self._encoder.seconds_compiling
        waiting = self._encoder.seconds_waiting / seconds
        speed = (done - self._before) * self._images / seconds
        self._bar.update(done, {"images/s": speed, "waiting for images": waiting})

    def _finished_rows(self) -> int:
        return sum(self._rows_of[shard] for shard in self._writer.finished())
