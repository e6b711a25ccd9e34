r"""Encodes preference pairs into shards once, so that training never reads an image.

    python -m dspo_jax.encode --config configs/encode/folder.py --config.source.path=DIR \
        --config.model=MODEL_DIR --out OUT

Every key of the config, with its default, stands in configs/encode/common.py. The same command goes on where
a stopped one was. Several processes share the work as parts of one run (parallel/processes.py), or without
knowing of one another with --shard=0/4 to --shard=3/4.
"""

import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from dspo_jax import cli
from dspo_jax.errors import UserError
from dspo_jax.parallel.process_flags import define_process_flags


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from dspo_jax.data import shards
    from dspo_jax.data.encoding import encode
    from dspo_jax.parallel import processes

    del argv
    processes.initialize_from_flags()
    started = time.perf_counter()
    out = Path(flags.FLAGS.out)
    already_there = (out / shards.MANIFEST).is_file()
    complete = encode(flags.FLAGS.config, out, parse_share(flags.FLAGS.shard))
    if not processes.is_first():
        return
    seconds = time.perf_counter() - started
    if not complete:
        if (out / shards.UNFINISHED).is_dir():
            done = "encoded", "the last share to end finishes the dataset"
        else:
            done = (
                "scored",
                "run it again when the other shares are scored, as which rows are encoded follows from all",
            )
        print(f"{out}: share {flags.FLAGS.shard} {done[0]} in {seconds:.1f} s; {done[1]}")
        return
    for split, content in shards.read_manifest(out)["splits"].items():
        notes = [f"{count} skipped: {reason}" for reason, count in content["skipped"].items()]
        notes += [f"{count} left out: {reason}" for reason, count in content["left_out"].items()]
        count, files = content["num_examples"], len(content["shards"])
        print(", ".join([f"{out}: {split}: {count} examples in {files} shards", *notes]))
    print("already encoded, verified" if already_there else f"encoded in {seconds:.1f} s")
    print(f"next: {training_command(flags.FLAGS.config, out)}")


def training_command(config: ConfigDict, out: Path) -> str:
    """Returns the command that trains on a dataset, with the keys by which it has to read captions.

    Args:
      config: of the encoding.
      out: the dataset's folder.
    """
    keys = {"model": config.model, "data.path": out}
    if config.text.max_chunks != 1:
        keys["text.max_chunks"] = config.text.max_chunks
    if config.text.max_sequence_length is not None:
        keys["text.max_sequence_length"] = config.text.max_sequence_length
    listed = shlex.join(f"--config.{key}={value}" for key, value in keys.items())
    return f"python -m dspo_jax.train --config=RECIPE {listed} --workdir=DIR"


def parse_share(text: str | None) -> tuple[int, int] | None:
    """Parses a share, "1/4" -> (1, 4).

    Raises:
      UserError: it is none of the shares.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard={text}: must be I/N with I from 0 to N - 1, for example 0/4")
    return int(match[1]), int(match[2])


def run() -> None:
    """Defines the flags and runs the command."""
    cli.define_config("What to encode, e.g. configs/encode/emoji.py.")
    flags.DEFINE_string("out", None, "Folder of the dataset.")
    flags.DEFINE_string(
        "shard",
        None,
        "I/N: encode every N-th of the dataset's files from the I-th on (from 0), beside processes that do "
        "the others; the last one to end finishes the dataset.",
    )
    define_process_flags()
    cli.run(main, required=("config", "out"))


if __name__ == "__main__":
    run()
