"""Encodes a source of preference pairs into TFDS shards, once, so that training never sees an image."""

import dataclasses
import math
import re
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from dspo_jax import spelling
from dspo_jax.data import shards
from dspo_jax.data.caption_encoder import store_captions
from dspo_jax.data.caption_states import CaptionFiles
from dspo_jax.data.chosen_rows import ChosenRows, check_selection
from dspo_jax.data.encoder import BadRowLog, PairEncoder
from dspo_jax.data.prepare import Framing, bucket_sizes, worker_pool
from dspo_jax.data.row_progress import SECONDS_BETWEEN_LOOKS, RowProgress
from dspo_jax.data.scoring import ColumnScorer, RowScorer, ScoreFiles, score_shards
from dspo_jax.data.settings import EncodeSettings, parse
from dspo_jax.data.source_shards import SourceShards
from dspo_jax.data.sources import Source, get_source
from dspo_jax.data.sources.single_images import divide_pairs
from dspo_jax.data.writer import DatasetWriter
from dspo_jax.errors import UserError
from dspo_jax.json_files import JsonObject
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import cpu_cores
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.same_kind import component_digest
from dspo_jax.pipelines.stored import T5_KEY
from dspo_jax.rewards import Reward, load_reward

COLUMN = "column"
"""The `config.score` that takes the scores of the source."""


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
    from_column = COLUMN in settings.scores
    if from_column != bool(settings.source.arguments.get("scores")):
        raise UserError(
            f"config.score = {settings.score!r} and config.source.scores = "
            f"{settings.source.arguments.get('scores', ())!r}: {COLUMN!r} takes the scores of columns that "
            "config.source.scores names (of the source 'parquet'); set both or neither"
        )
    if settings.select.images == "single" and from_column:
        raise UserError(
            "config.select.images = 'single': compares pictures, which config.score = 'column' does not "
            "read; leave it 'pairs'"
        )
    if settings.select.images == "single":
        source = divide_pairs(source)
    splits = _choose_splits(settings, source)
    check_selection(settings.select, splits, source.images_per_example)
    rows = SourceShards(source, splits, settings.rows_per_shard)
    made_by, reward = [], None
    for name in settings.scores:  # of several, one after the other is in memory
        reward = None if name == COLUMN else _load_reward(name, settings, source.images_per_example)
        made_by.append(_describe_score(reward))
    if len(made_by) > 1:
        reward = None
    names = [description["reward"] for description in made_by]
    if len(set(names)) < len(names):
        raise UserError(f"config.score = {settings.score!r}: two are called {max(names, key=names.count)!r}")
    text = settings.text
    pipe = load_pipeline(
        settings.model, max_chunks=text.max_chunks, max_sequence_length=text.max_sequence_length
    )
    resolution = pipe.image_side if settings.resolution is None else settings.resolution
    framing = _frame(settings, resolution, pipe)
    t5 = _describe_t5(settings, pipe)
    manifest = {
        "model": pipe.fingerprint(),
        "resolution": resolution,
        "source": {
            "name": settings.source.name,
            # Where images may lie is a matter of trust; it does not change the rows.
            "arguments": {
                key: value
                for key, value in settings.source.arguments.items()
                if key != "allow_outside" and (value or key not in _LATER_ARGUMENTS)
            },
            "rows_sha256": {split: source.digest(split) for split in splits},
        },
        "encoding": {key: getattr(settings, key) for key in _ENCODING},
        **({T5_KEY: t5} if pipe.stored_encoder else {}),
        "score": made_by[0] if made_by else None,
        "select": _describe_selection(settings),
        **({"judges": made_by[1:]} if made_by[1:] else {}),
    }
    if shards.is_complete(out, manifest, splits):
        return True
    index, count = share or (jax.process_index(), jax.process_count())
    mine = list(rows.rows)[index::count]
    workers = cpu_cores() if settings.num_workers is None else settings.num_workers
    ahead = max(2 * settings.batch_size, 4 * workers)
    # Imports of this module, which take long; each worker imports the module itself.
    with worker_pool(workers, [PairEncoder.__module__, DatasetWriter.__module__]) as pool:
        files: list[ScoreFiles] = []
        for name, description in zip(settings.scores, made_by, strict=True):
            folder = re.sub(r"[^\w.-]", "_", description["reward"]) if files else ""
            of_reward = ScoreFiles(out, _scores_of(manifest, settings, description), rows, folder)
            scorer: RowScorer | ColumnScorer = ColumnScorer()
            if name != COLUMN:
                reward = reward or _load_reward(name, settings, source.images_per_example)
                scorer = RowScorer(reward, batch_size=settings.batch_size, pool=pool, ahead=ahead)
            score_shards(rows, mine, scorer, of_reward, settings.source.max_skipped)
            reward = None
            del scorer  # the devices have room for the next reward, or the VAE
            files.append(of_reward)
        while share is None and not all(each.are_complete() for each in files):
            time.sleep(SECONDS_BETWEEN_LOOKS)  # for the other processes of this run
        if not all(each.are_complete() for each in files):
            return False
        chosen = ChosenRows(rows, files, settings.select)
        buckets = [f"{height}x{width}" for height, width in framing.sizes] if len(framing.sizes) > 1 else []
        side = None if buckets else resolution // pipe.vae_scale_factor
        features = shards.feature_spec(
            (source.images_per_example, side, side, 2 * pipe.latent_channels),
            pipe.conditioning_shapes(source.images_per_example),
            scored=bool(files) or source.images_per_example > 2,
        )
        writer = DatasetWriter(out, features, manifest, rows.count, buckets)
        encoder = PairEncoder(
            pipe,
            framing,
            batch_size=settings.batch_size,
            vae_dtype=settings.vae_dtype,
            pool=pool,
            ahead=ahead,
        )
        with RowProgress("encode", rows, writer.finished, encoder) as progress:
            for split, number in mine:
                if writer.is_written(split, number):
                    continue
                of_shard = chosen.take((split, number), progress.track(rows.pairs((split, number))))
                log = BadRowLog(
                    split, rows.of_split[split], settings.source.max_skipped, writer.skipped(split)
                )
                writer.write_shard(split, number, encoder.examples(of_shard, log), log.reasons)
            while share is None and not _is_ready(out, writer, len(rows.rows)):
                time.sleep(SECONDS_BETWEEN_LOOKS)  # for the other processes of this run
                progress.look()
    del encoder, progress  # the devices have room for T5
    if (out / shards.MANIFEST).is_file():
        return True
    if len(writer.finished()) < len(rows.rows):
        return (out / shards.MANIFEST).is_file()  # notes vanish when another process finishes the dataset
    try:
        for split in splits:  # in every process: else others would wait for one that was refused
            skipped = writer.skipped(split)
            BadRowLog(split, rows.of_split[split], settings.source.max_skipped, skipped).check()
            if skipped.total() >= chosen.count(split):
                raise UserError(
                    f"split {split!r} of source {settings.source.name!r}: no usable row ({dict(skipped)})"
                )
        captions = None
        if t5 is not None:
            stored = CaptionFiles(out, writer.captions(), t5["length"])
            store_captions(pipe, stored, text.t5_dtype, settings.batch_size, share)
            captions = stored.finish()
        if share is None and not processes.is_first():
            while not (out / shards.MANIFEST).is_file():
                time.sleep(SECONDS_BETWEEN_LOOKS)
            return True
        left_out = {split: {**source.left_out(split), **chosen.left_out(split)} for split in splits}
        writer.commit(left_out, captions)
    except FileNotFoundError:
        if not (out / shards.MANIFEST).is_file():  # else another process has just finished the dataset
            raise
    return True


def _describe_t5(settings: EncodeSettings, pipe: Pipeline) -> JsonObject | None:
    """Returns what T5's stored states follow from beside the captions; None where they are not stored.

    Raises:
      UserError: their dtype is chosen where they are not stored.
    """
    if not settings.text.store_t5 or pipe.stored_encoder is None:
        if settings.text.t5_dtype != "float32":
            why = "config.text.store_t5 = False" if pipe.stored_encoder else f"{settings.model} has no T5"
            raise UserError(
                f"config.text.t5_dtype = {settings.text.t5_dtype!r}: {why}, so that no states of T5 are "
                "stored; leave it 'float32'"
            )
        return None
    return {
        "sha256": component_digest(pipe, pipe.stored_encoder),
        "length": pipe.max_sequence_length,
        "padding": "to the length, attended to",
        "dtype": settings.text.t5_dtype,
    }


def _load_reward(name: str, settings: EncodeSettings, images: int) -> Reward:
    """Returns a reward that scores batches of rows of so many images."""
    try:
        return load_reward(name, settings.rewards.folder, batch_size=settings.batch_size * images)
    except UserError as error:
        raise UserError(f"config.score: {error}") from error


def _describe_score(reward: Reward | None) -> JsonObject:
    """Returns what the manifest says of the scores of a reward, or of columns."""
    if reward is None:
        return {"reward": COLUMN, "version": ""}
    return {"reward": reward.name, "version": reward.version}


def _describe_selection(settings: EncodeSettings) -> JsonObject | None:
    """Returns what the manifest says of the selection; earlier versions had no `agree`."""
    keys = dataclasses.asdict(settings.select)
    return {key: value for key, value in keys.items() if key != "agree" or value} if settings.score else None


def _scores_of(manifest: JsonObject, settings: EncodeSettings, description: JsonObject) -> JsonObject:
    """Returns what the scores of a source's images follow from."""
    return {
        **description,
        "source": manifest["source"],
        "images": settings.select.images,
        "rows_per_shard": settings.rows_per_shard,
    }


# Arguments of sources that datasets of earlier versions do not name; where they are not set, no row changes.
_LATER_ARGUMENTS = ("length", "winner_id", "loser_id", "scores")

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
        if pixels % pipe.side_multiple:
            raise UserError(
                f"config.{key} = {getattr(settings, key)}: must be a multiple of {pipe.side_multiple}, "
                "the pixels per latent of this model's VAE, or per patch of its transformer"
            )
    return Framing(sizes, settings.flip, settings.seed)


def _is_ready(out: Path, writer: DatasetWriter, num_shards: int) -> bool:
    """Returns whether the dataset is finished, or all of its shards are."""
    return (out / shards.MANIFEST).is_file() or len(writer.finished()) == num_shards
