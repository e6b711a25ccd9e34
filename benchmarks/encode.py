"""Encoding a synthetic Pick-a-Pic of growing size: rows/s, and whether memory stays flat.

    python -m benchmarks.encode --out runs/benchmark_encode

Parquet files of Pick-a-Pic's columns are made from emoji, enlarged on a gradient and stored as JPEG, so that
decoding costs what it does for photographs of that size. Each size is encoded by the command, in a process of
its own; memory is the proportional share (PSS) of it and its workers, the largest of samples half a second
apart. Needs the `demo` extra; 20,000 rows take minutes.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from PIL import Image
from rich.console import Console
from rich.table import Table

from dspo_jax import cli
from dspo_jax.data.sources.emoji import Emoji, load_emoji
from dspo_jax.files import appear, write_json
from dspo_jax.locks import claim

ROWS_PER_FILE, ROWS_PER_GROUP = 1000, 100


def picture(emoji: Emoji, side: int, rng: np.random.Generator) -> bytes:
    """Returns an emoji on a noisy gradient, as the bytes of a JPEG file of side x side pixels."""
    ramp = np.linspace(0, 120, side)[:, None, None] + rng.integers(0, 100, 3)
    background = Image.fromarray((ramp + rng.integers(0, 35, (side, side, 3))).astype(np.uint8))
    with Image.open(emoji.path) as image:
        art = image.convert("RGBA").resize((side, side))
    background.paste(art, (0, 0), art)
    buffer = io.BytesIO()
    background.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_parquet(folder: Path, num_rows: int, side: int) -> None:
    """Writes `num_rows` rows, a tie in every eighth, into files of `ROWS_PER_FILE`; all of them or none."""
    rng = np.random.default_rng(0)
    emoji = load_emoji()[:256]
    pictures = [picture(each, side, rng) for each in emoji]
    num_files = -(-num_rows // ROWS_PER_FILE)
    with appear(folder) as partial:
        partial.mkdir()
        for file in range(num_files):
            count = min(ROWS_PER_FILE, num_rows - file * ROWS_PER_FILE)
            # Different pictures, or the row would be a bad one.
            first = rng.integers(0, len(emoji), count)
            second = (first + rng.integers(1, len(emoji), count)) % len(emoji)
            label = rng.choice([0.0, 1.0], count)
            label[::8] = 0.5
            table = {
                "caption": [
                    f"{emoji[i].name} or {emoji[j].name}" for i, j in zip(first, second, strict=True)
                ],
                "jpg_0": [pictures[i] for i in first],
                "jpg_1": [pictures[j] for j in second],
                "label_0": label,
                "label_1": 1 - label,
                "image_0_uid": [f"{file}-{row}-0" for row in range(count)],
                "image_1_uid": [f"{file}-{row}-1" for row in range(count)],
                "has_label": [True] * count,
            }
            path = partial / f"train-{file:05d}-of-{num_files:05d}.parquet"
            pq.write_table(pa.table(table), path, row_group_size=ROWS_PER_GROUP)


def family(pid: int) -> list[int]:
    """Returns a process and its descendants."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            pids += family(int(child))
    return pids


def memory(pid: int) -> float:
    """Measures the GiB that a process and its descendants hold; shared memory counts once."""
    total = 0
    for member in family(pid):
        try:
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        total += sum(int(kib) for kib in re.findall(r"^Pss:\s+(\d+)", rollup, re.MULTILINE))
    return total / 2**20


def measure(source: Path, out: Path) -> tuple[float, float, str]:
    """Encodes `source`; returns seconds, peak memory in GiB and the bar's last line."""
    command = [
        *(sys.executable, "-m", "dspo_jax.encode", "--config=configs/encode/pickapic_sd15.py"),
        *(f"--config.source.path={source}", f"--config.model={flags.FLAGS.model}", f"--out={out}"),
        *(f"--config.resolution={flags.FLAGS.resolution}", f"--config.num_workers={flags.FLAGS.num_workers}"),
        "--config.splits=('train',)",
    ]
    started, peak = time.perf_counter(), 0.0
    log = out.with_suffix(".log")
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors)
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.5)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise OSError(f"{log}: encoding failed: {log.read_text().splitlines()[-1]}")
    return seconds, peak, log.read_text()


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    out = Path(flags.FLAGS.out)
    with claim(out):
        measure_all(out)


def measure_all(out: Path) -> None:
    """Encodes every number of rows, prints the table and writes it to encode.json."""
    side, results = flags.FLAGS.image_side, []
    table = Table(title=f"JPEG of {side}x{side} to {flags.FLAGS.resolution} pixels, {os.cpu_count()} cores")
    for heading in ("rows", "pairs", "seconds", "pairs/s", "waiting for images", "peak GiB"):
        table.add_column(heading, justify="right")
    for rows in map(int, flags.FLAGS.rows):
        source = out / f"pickapic-{rows}"
        if not source.exists():
            write_parquet(source, rows, side)
        encoded = out / f"encoded-{rows}"
        shutil.rmtree(encoded, ignore_errors=True)  # of an earlier run, which may not have ended
        seconds, peak, log = measure(source, encoded)
        waiting = float(re.findall(r"waiting for images ([\d.e-]+)", log)[-1])
        manifest = json.loads((encoded / "manifest.json").read_text(encoding="utf-8"))
        pairs = manifest["splits"]["train"]["num_examples"]
        results.append({"rows": rows, "pairs": pairs, "seconds": seconds, "peak_gib": peak})
        table.add_row(
            f"{rows:,}",
            f"{pairs:,}",
            f"{seconds:.0f}",
            f"{pairs / seconds:.0f}",
            f"{waiting:.0%}",
            f"{peak:.2f}",
        )
    Console().print(table)
    write_json(out / "encode.json", results)


if __name__ == "__main__":
    flags.DEFINE_string(
        "out", "runs/benchmark_encode", "Folder for the data, what is encoded and encode.json."
    )
    flags.DEFINE_list("rows", ["1000", "10000", "20000"], "Sizes of the input.")
    flags.DEFINE_string("model", "examples/emoji/model", "The model that encodes.")
    flags.DEFINE_integer("resolution", 64, "Side of the training images in pixels.")
    flags.DEFINE_integer("image_side", 512, "Side of the JPEG images in pixels.")
    flags.DEFINE_integer("num_workers", os.cpu_count(), "Processes that decode.")
    cli.run(main)
