"""Metrics of a run: metrics.jsonl, TensorBoard and Weights & Biases."""

import importlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, SupportsFloat, TextIO

import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image

from dspo_jax.errors import UserError
from dspo_jax.files import name_write_errors, write_text
from dspo_jax.json_files import JsonObject

VALIDATION_PREFIX = "validation/"  # prefix of the held-out scalars among a run's metrics


class MetricsWriter:
    """Writes each step's metrics to `metrics.jsonl` and `tensorboard/` in a workdir, and to W&B if asked.

    A line of `metrics.jsonl` is `{"step": ..., "wall_seconds": ..., <name>: <float>, ...}`; wall_seconds is
    the age of the run without the time between a stop and its resumption. Each line is handed to the
    operating system at once, so a killed process loses none. NaN and infinity are written as Python's json
    reads them, and left out of TensorBoard. TensorBoard and W&B call a metric without a group `train/<name>`.
    """

    def __init__(
        self,
        workdir: str | Path,
        step: int = 0,
        *,
        active: bool = True,
        wandb_project: str | None = None,
        config: JsonObject | None = None,
    ):
        """Opens the files, dropping what was written after `step`: a resumed run writes those steps again.

        Args:
          workdir: folder of the run; created if absent.
          step: the restored step, 0 for a fresh start.
          active: False opens and writes nothing: for all processes of a run but the first.
          wandb_project: also log to this project of Weights & Biases. A resumed run goes on in the run whose
            id `wandb_run_id` in the workdir holds; of steps that are written again W&B keeps the first.
          config: shown with the run in TensorBoard (under Text) and in W&B.

        Raises:
          UserError: a `wandb_project` without the package wandb.
        """
        self._active, self._wandb = active, None
        if not active:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if wandb_project:
            self._wandb = _start_wandb(workdir, wandb_project, config)
        path = workdir / "metrics.jsonl"
        self._seconds_before = _keep_until(path, step) - time.perf_counter()
        self._file: TextIO = path.open("a", encoding="utf-8", buffering=1)
        self._tensorboard = _import_summary_writer()(str(workdir / "tensorboard"), purge_step=step + 1)
        if config and not step:
            rows = [f"|{key}|{value}|" for key, value in flatten_dict(config, sep=".").items()]
            self._tensorboard.add_text("config", "\n".join(["|key|value|", "|---|---|", *rows]), 0)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Appends one line, and one point per metric to TensorBoard and W&B.

        Args:
          step: number of optimizer updates done.
          metrics: scalars (Python, NumPy or JAX); reading a JAX array waits for the device.
        """
        if not self._active:
            return
        values = {name: float(value) for name, value in metrics.items()}
        wall_seconds = round(self._seconds_before + time.perf_counter(), 3)
        with name_write_errors(Path(self._file.name)):
            self._file.write(json.dumps({"step": step, "wall_seconds": wall_seconds, **values}) + "\n")
        tagged = {name if "/" in name else f"train/{name}": value for name, value in values.items()}
        for name, value in tagged.items():
            if math.isfinite(value):  # at any other tensorboardX warns, each time
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(tagged, step=step)

    def write_image(self, step: int, name: str, picture: Path) -> None:
        """Shows a picture in TensorBoard and W&B.

        Args:
          step: number of optimizer updates done.
          name: tag, e.g. `"samples"`.
          picture: a PNG file.
        """
        if not self._active:
            return
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._tensorboard.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({name: importlib.import_module("wandb").Image(str(picture))}, step=step)

    def close(self) -> None:
        """Flushes and closes what is open."""
        if not self._active:
            return
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[JsonObject]:
    """Returns the lines of a `metrics.jsonl` in order, without a last one that was cut short.

    Each has `step`, a whole number, and finite or infinite floats or NaN.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: another line than the last is damaged, or one is not of this kind.
    """
    lines = Path(path).read_bytes().removesuffix(b"\n").split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # not UTF-8 or JSON; a nesting without end
            if number == len(lines):
                break
            raise UserError(f"{where}: not JSON ({error}); mend or delete the line") from error
        if not isinstance(record, dict) or not _is_number(record.get("step"), int):
            raise UserError(f"{where}: {line.decode()[:60]}: must be an object with step, a whole number")
        for name, value in record.items():
            if not _is_number(value, int | float):
                raise UserError(f"{where}: {name} = {str(value)[:60]}: must be a number")
        records.append(record)
    return records


def _is_number(value: object, kind: type | UnionType) -> bool:
    """Returns whether a value is an int or float, no bool, and no int that a float could not hold."""
    return (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and not (isinstance(value, int) and abs(value) > 2**63)
    )


def read_validations(path: str | Path) -> dict[int, dict[str, float]]:
    """Returns the validation scalars in a `metrics.jsonl` by step, in order, without their prefix."""
    found = {}
    for record in read_metrics(path):
        scores = {
            name.removeprefix(VALIDATION_PREFIX): value
            for name, value in record.items()
            if name.startswith(VALIDATION_PREFIX)
        }
        if scores:
            found[record["step"]] = scores
    return found


def _import_summary_writer() -> Any:
    """Keeps tensorboardX from loading torch, which it does wherever torch is installed."""
    hide_torch = "torch" not in sys.modules
    if hide_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise ImportError
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide_torch:
            del sys.modules["torch"]
    return SummaryWriter


def import_wandb(project: str) -> Any:
    """Returns the package wandb, which the config asks for by naming a project.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")  # as a statement, mypy would want it installed
    except ImportError as error:
        raise UserError(
            f"config.wandb_project = {project!r}: needs the package wandb: pip install 'dspo_jax[wandb]'"
        ) from error


def _start_wandb(workdir: Path, project: str, config: JsonObject | None) -> Any:
    """Starts or resumes the workdir's W&B run."""
    wandb = import_wandb(project)
    id_file = workdir / "wandb_run_id"
    known = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
    run = wandb.init(project=project, config=config, id=known, resume="allow", dir=str(workdir))
    write_text(id_file, f"{run.id}\n")
    return run


def _keep_until(path: Path, step: int) -> float:
    """Drops the records after `step` from a metrics file; returns the wall_seconds of the last one kept."""
    if not path.exists():
        return 0.0
    kept = [record for record in read_metrics(path) if record["step"] <= step] if step > 0 else []
    if kept and "wall_seconds" not in kept[-1]:
        raise UserError(f"{path}: the line of step {kept[-1]['step']} has no wall_seconds; delete the line")
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return float(kept[-1]["wall_seconds"]) if kept else 0.0
