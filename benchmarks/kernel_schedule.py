"""How long the TPU's attention kernel takes, by the instructions that the compiler schedules for it.

    python -m benchmarks.kernel_schedule --topology=v5p:2x2x1
    python -m benchmarks.kernel_schedule --topology=v5p:2x2x1 --only="SD1.5 64x64" --blocks

XLA's own estimate leaves out what a kernel does. Here libtpu writes down the instructions of one step of the
kernel's grid: at one a cycle, times the steps of a core, they take as long as the kernel does if it never
waits for memory. `--blocks` also compiles other block sizes than those that `kernels/flash.py` chooses.
What XLA does around the kernels, such as moving heads to where they read them, is printed with the cycles
that libtpu expects of it. Nothing runs.
"""

import dataclasses
import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import programs
from benchmarks.attention import CASES, without_heads
from dspo_jax import cli
from dspo_jax.kernels import flash
from dspo_jax.planning.program_text import entry_instructions, estimated_cycles

# Cycles a second by JAX's name of the device: 459 TFLOP/s over two cores of four units of 128 x 128.
CLOCKS = {"TPU v5": 1.75e9}
_WRITES = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*(utilization|final_bundles).*"
_PIPELINED = 2  # steps of a grid that only load or only store


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's instructions.

    Attributes:
      name: of the kernel.
      instructions: in a step of its grid.
      steps: of one core.
      busy: share of the matrix units' slots that are taken.
    """

    name: str
    instructions: int
    steps: int
    busy: float


def read_schedules(folder: Path) -> Iterator[Schedule]:
    """Reads what libtpu wrote of attention kernels into its `--xla_jf_dump_to`."""
    for path in sorted(folder.glob("*-splash*final_hlo-static-per-bundle-utilization.txt")):
        stamp, name, *_ = path.name.split("-")
        # A heading, units, how many there are of each, a heading, and a line for each instruction.
        _, _, capacity, _, *lines = path.read_text().splitlines()
        taken = [int(line.split()[0]) for line in lines]
        bundles = next(folder.glob(f"{stamp}-{name}-*-final_bundles.txt")).read_text()
        steps = max(map(int, re.findall(r"totalorder %\w+, (\d+) /\* loop exit test", bundles))) - _PIPELINED
        yield Schedule(name, len(taken), steps, sum(taken) / int(capacity.split()[0]) / len(taken))


def cycles_around(text: str) -> int:
    """Adds the cycles that the compiler expects of a program's instructions, kernels left out."""
    kernel = 'custom_call_target="tpu_custom_call"'
    return sum(estimated_cycles(each) for each in entry_instructions(text) if kernel not in each.rest)


def tilings(case: tuple[int, ...], others: bool) -> Iterator[tuple[str, flash.Tiling]]:
    """Returns the tiling of `kernels/flash.py` for a case, and others that divide its lengths."""
    queries, keys, _, size = case
    chosen = flash.Tiling.of(queries, keys, size)
    yield "as chosen", chosen
    sizes = [block for block in (256, 512, 1024, 2048) if others]
    for query_block, key_block in itertools.product(sizes, sizes):
        if queries % query_block == 0 and keys % key_block == 0:
            block = query_block, key_block
            yield f"{query_block} x {key_block}", dataclasses.replace(chosen, forward=block, backward=block)


def measure(device: jax.Device, folder: Path) -> None:
    """Prints a line for each case, tiling and kernel."""
    values = flags.FLAGS
    print(f"one {device.device_kind}, {values.images} images, jax {jax.__version__}")
    for name, case in CASES.items():
        queries, keys, heads, size = case
        if values.only not in name or keys < 512:  # the plain backend computes those
            continue
        arrays = [
            jax.ShapeDtypeStruct((values.images, n, heads * size), jnp.bfloat16)
            for n in (queries, queries, keys, keys)
        ]
        for blocks, tiling in tilings(case, values.blocks):
            with mock.patch.object(flash.Tiling, "of", return_value=tiling):
                function = programs.forward_and_backward(without_heads(flash.splash_attention, heads))
                try:
                    program = programs.compile_for(device, function, arrays)
                except jax.errors.JaxRuntimeError as error:
                    if "Vmem" not in str(error):
                        raise
                    print(f"{name:<14}{blocks:<12}does not fit into vector memory", flush=True)
                    program = None
            for schedule in read_schedules(folder):
                line = f"{name:<14}{blocks:<12}{schedule.name:<32}"
                line += (
                    f"{schedule.steps:5} steps of {schedule.instructions:6}, units {schedule.busy:.1%} busy"
                )
                if clock := CLOCKS.get(device.device_kind):
                    line += f", {1e3 * schedule.steps * schedule.instructions / clock:.3f} ms"
                print(line, flush=True)
            if program is not None:
                cycles = cycles_around(program.as_text())
                line = f"{name:<14}{blocks:<12}{'around them':<32}{cycles:9} cycles"
                if clock := CLOCKS.get(device.device_kind):
                    line += f", {1e3 * cycles / clock:.3f} ms"
                print(line, flush=True)
            for path in folder.iterdir():
                path.unlink()


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        # Read when libtpu is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={folder} {_WRITES}"
        )
        with programs.chosen_device() as device:
            measure(device, Path(folder))


if __name__ == "__main__":
    programs.define_flags(images=8)
    flags.DEFINE_bool("blocks", False, "Other sizes of blocks, too.")
    cli.run(main, required=("topology",))
