"""Training commands of several processes over loopback, each with its own fake devices."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspo_jax.metrics import read_metrics

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start_training(
    workdir: Path,
    changes: Mapping[str, Any],
    *,
    processes: int,
    devices: int,
    more: Sequence[str] = (),
) -> list[subprocess.Popen]:
    """Starts `python -m dspo_jax.train` on configs/common.py with `changes` by dotted key.

    Each process has `devices` fake devices, and writes what it says into `workdir`-process-N.log.
    """
    flags = [f"--workdir={workdir}", "--config=configs/common.py"]
    flags += [f"--config.{key}={value}" for key, value in changes.items()]
    address = f"localhost:{free_port()}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
    }
    started = []
    for number in range(processes):
        joined = [
            f"--coordinator_address={address}",
            f"--num_processes={processes}",
            f"--process_id={number}",
        ]
        with log_of(workdir, number).open("w") as log:
            command = [
                sys.executable,
                "-m",
                "dspo_jax.train",
                *flags,
                *more,
                *(joined if processes > 1 else []),
            ]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return started


def log_of(workdir: Path, number: int) -> Path:
    """Where process `number` writes what it says."""
    return workdir.with_name(f"{workdir.name}-process-{number}.log")


def finish(started: Sequence[subprocess.Popen], timeout: float = 300) -> list[int]:
    """The exit statuses, when all have ended; none outlives `timeout` seconds."""
    end = time.monotonic() + timeout
    try:
        return [process.wait(max(0.1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()


def last_step(workdir: Path) -> int:
    """The step of the last line of metrics, 0 before there is one."""
    path = workdir / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return records[-1]["step"] if records else 0


def wait_until(started: Sequence[subprocess.Popen], reached: Callable[[], bool]) -> None:
    """Returns as soon as `reached()`; fails if a process ends first."""
    while not reached():
        for process in started:
            assert process.poll() is None, f"process ended with {process.returncode} before it was to"
        time.sleep(0.002)
