"""Commands as processes of their own, or several as one run, each with its own fake devices."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspo_jax.monitoring.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(
    module: str, flags: Sequence[str], logs: Path, *, processes: int = 1, devices: int = 1
) -> list[subprocess.Popen]:
    """Starts `python -m module`, of the project or beside this file; several find one another over loopback.

    Each has `devices` fake devices, and writes what it says into `logs`-process-N.log.
    """
    address = f"localhost:{free_port()}"
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), *inherited]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
    }
    started = []
    for number in range(processes):
        joined = [
            f"--coordinator_address={address}",
            f"--num_processes={processes}",
            f"--process_id={number}",
        ]
        command = [sys.executable, "-m", module, *flags, *(joined if processes > 1 else [])]
        with log_of(logs, number).open("w") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return started


def start_training(
    workdir: Path,
    changes: Mapping[str, Any],
    *,
    processes: int,
    devices: int,
    more: Sequence[str] = (),
) -> list[subprocess.Popen]:
    """Starts `python -m dspo_jax.train` on configs/common.py with `changes` by dotted key."""
    flags = [f"--workdir={workdir}", "--config=configs/common.py"]
    flags += [f"--config.{key}={value}" for key, value in changes.items()]
    return start("dspo_jax.train", [*flags, *more], workdir, processes=processes, devices=devices)


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
