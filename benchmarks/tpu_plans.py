"""The table of whole steps compiled for TPUs in docs/measurements.md, row by row.

    python -m benchmarks.tpu_plans --out build/tpu_plans               # needs dspo_jax[plan], 18 to 33 GB
    python -m benchmarks.tpu_plans --out build/tpu_plans --only SD2.1

Each row is a `python -m dspo_jax.plan`, which takes half an hour to an hour and a half of one core. A row
that is kept in --out is not compiled again: the script may be stopped and started anew. Rows of another
version of JAX or libtpu are; after a change of the code, delete those that it concerns. Nothing runs on a
TPU.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags

from dspo_jax import cli
from dspo_jax.errors import UserError
from dspo_jax.files import write_json

_FSDP = ("mesh.data=1", "mesh.fsdp=-1")
_LORA = ("lora.rank=8",)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: the first words of its label name the model."""

    label: str
    config: str
    published: str
    topology: str
    pairs: int
    changes: tuple[str, ...] = ()
    resolution: int | None = None

    def command(self) -> list[str]:
        """Returns the arguments of `python -m dspo_jax.plan`."""
        changes = [f"--config.{change}" for change in self.changes]
        command = [f"--config=configs/{self.config}.py", *changes, f"--published={self.published}"]
        command += [f"--topology={self.topology}", f"--pairs_per_device={self.pairs}"]
        return command + ([f"--resolution={self.resolution}"] if self.resolution else [])


ROWS = (
    # MLPerf Training v4.1's network, at its 512 pixels: as the record counts, and in pairs.
    Row("SD2.1, SFT, images", "sd15_dspo", "sd21", "v5p:2x2x1", 32, ("objective.name=sft",), 512),
    Row("SD2.1, DSPO", "sd15_dspo", "sd21", "v5p:2x2x1", 16, (), 512),
    Row("SD1.5, DSPO", "sd15_dspo", "sd15", "v5p:2x2x1", 16),
    Row("SD1.5, DSPO", "sd15_dspo", "sd15", "v5p:2x2x1", 32),
    Row("SD1.5, DSPO", "sd15_dspo", "sd15", "v5p:4x4x4", 16),
    Row("SD1.5, DSPO", "sd15_dspo", "sd15", "v6e:4x4", 8),
    Row("SD1.5, DSPO", "sd15_dspo", "sd15", "v5e:2x4", 4, _FSDP),
    Row("SD1.5, LoRA of rank 8", "sd15_dspo_lora", "sd15", "v5p:4x4x4", 16),
    Row("SD1.5, LoRA of rank 8", "sd15_dspo_lora", "sd15", "v5p:2x2x1", 16),
    Row("SD1.5, LoRA of rank 8", "sd15_dspo_lora", "sd15", "v5e:2x4", 8),
    Row("SD1.5, LoRA of rank 8", "sd15_dspo_lora", "sd15", "v6e:4x4", 16),
    Row("SDXL, DSPO", "sdxl_dspo", "sdxl", "v5p:2x2x1", 4),
    Row("SDXL, DSPO", "sdxl_dspo", "sdxl", "v5p:4x4x4", 4),
    Row("SDXL, DSPO", "sdxl_dspo", "sdxl", "v6e:4x4", 1, _FSDP),
    Row("SDXL, LoRA of rank 8", "sdxl_dspo", "sdxl", "v5p:4x4x4", 4, _LORA),
    Row("SDXL, LoRA of rank 8", "sdxl_dspo", "sdxl", "v5p:2x2x1", 4, _LORA),
    Row("SDXL, LoRA of rank 8", "sdxl_dspo", "sdxl", "v5e:2x4", 1, (*_LORA, "remat=blocks")),
    Row("SDXL, LoRA of rank 8", "sdxl_dspo", "sdxl", "v6e:4x4", 1, _LORA),
)
HEADING = (
    "| | `--topology` | also set | on a chip | peak memory | compiler | with kernels | rate a chip | MFU |"
)


def versions() -> dict[str, str]:
    """Returns the versions of what compiles."""
    try:
        return {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    except metadata.PackageNotFoundError as error:
        raise UserError(f"{error.name}: not installed; pip install 'dspo_jax[plan]'") from error


def kept(row: Row, folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """Returns a row's file, and its plan where that command was compiled by these versions."""
    name = "_".join([row.config, row.published, row.topology.replace(":", "_"), str(row.pairs), *row.changes])
    path = folder / f"{name}.json"
    if not path.is_file():
        return path, None
    found = json.loads(path.read_text())
    same = found["command"] == row.command() and found["versions"] == versions()
    return path, found["plan"] if same else None


def describe(row: Row, plan: dict[str, Any]) -> str:
    """Returns a row as Markdown."""
    peak, most = plan["peak_bytes"] / 2**30, plan["hbm_bytes"] / 2**30
    cells = [row.label, f"`{row.topology}`", f"`{' '.join(row.changes)}`" if row.changes else ""]
    cells += [f"{row.pairs} {plan['unit']}", f"{peak:.1f} of {most:.1f} GiB"]
    if plan["estimated_seconds"] is None:
        cells += ["does not fit", "", "", ""]
    else:
        compiler = plan["compiler_seconds"] + plan["loop_seconds"]
        cells += [f"{compiler:.3f} s", f"{plan['estimated_seconds']:.3f} s"]
        cells += [f"{plan['pairs_per_second_per_device']:.3g}/s", f"{plan['mfu']:.1%}"]
    return f"| {' | '.join(cells)} |"


def compile_rows(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Compiles what is missing, and says why where that failed."""
    missing = [row for row in rows if kept(row, folder)[1] is None]
    print(f"{len(rows) - len(missing)} of {len(rows)} rows are kept in {folder}", flush=True)
    for number, row in enumerate(missing):
        path = kept(row, folder)[0]
        scratch = path.with_suffix(".part")
        command = [sys.executable, "-m", "dspo_jax.plan", *row.command(), f"--json={scratch}"]
        print(f"{len(missing) - number} left: {' '.join(command[1:-1])}", flush=True)
        before = time.monotonic()
        status = subprocess.run(command, check=False).returncode
        print(f"{(time.monotonic() - before) / 60:.0f} minutes", flush=True)
        if status:
            yield f"{' '.join(row.command())}: ended with status {status}"
            continue
        plan = json.loads(scratch.read_text())
        write_json(path, {"command": row.command(), "versions": versions(), "plan": plan})
        scratch.unlink()


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark."""
    del argv
    values = flags.FLAGS
    folder = Path(values.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if values.only in f"{row.label}, {row.topology}"]
    failed = list(compile_rows(rows, folder))
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(HEADING, "|---" * (HEADING.count("|") - 1) + "|", sep="\n")
    for row in rows:
        if (plan := kept(row, folder)[1]) is not None:
            print(describe(row, plan))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    flags.DEFINE_string("out", "build/tpu_plans", "Folder of the rows that are kept.")
    flags.DEFINE_string("only", "", "Rows whose model, method or topology holds this.")
    cli.run(main)
