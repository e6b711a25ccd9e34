"""Draws batches of self-play as one of several processes, and writes the part of each: `processes.start`."""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from tiny_run import make_config


def main() -> None:
    """Reads {model, pairs, changes} from --given, and writes OUT/BATCH-PROCESS.npz for two batches."""
    parser = argparse.ArgumentParser()
    for flag in ("given", "out", "coordinator_address"):
        parser.add_argument(f"--{flag}", required=True)
    for flag in ("num_processes", "process_id"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    values = parser.parse_args()
    jax.distributed.initialize(values.coordinator_address, values.num_processes, values.process_id)

    from dspo_jax.parallel.mesh import read_share
    from dspo_jax.training.start import make_state, prepare
    from dspo_jax.training.streams import open_stream

    given = json.loads(Path(values.given).read_text())
    experiment = prepare(make_config(given["model"], given["pairs"], given["changes"]))
    _, reference = make_state(experiment.task, experiment.mesh)
    stream = open_stream(experiment, reference)
    for number in range(2):
        batch = stream.next({})
        parts = {name: read_share(batch[name]) for name in ("moments", "index")}
        np.savez(Path(values.out) / f"{number}-{values.process_id}.npz", **parts)
    stream.close()


if __name__ == "__main__":
    main()
