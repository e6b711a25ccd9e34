"""Shared by the benchmarks of the training step: flags, clock, results, the table of results.

python -m benchmarks.measuring RESULTS_DIR     # all results in a folder as a Markdown table
"""

import itertools
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from dspo_jax import cli
from dspo_jax.errors import UserError
from dspo_jax.files import write_json

Result = dict[str, Any]

PACKAGES = ("jax", "jaxlib", "torch", "diffusers")

# Key of a result -> heading and format of its column.
COLUMNS = {
    "what": ("what", "{}"),
    "implementation": ("by", "{}"),
    "pairs_per_second": ("pairs/s", "{:.4g}"),
    "tflops_per_device": ("TFLOP/s a device", "{:.3g}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak_memory_gib": ("peak GiB", "{:.1f}"),
    "compile_seconds": ("compiling, s", "{:.0f}"),
    "device": ("device", "{}"),
    "date": ("date", "{}"),
    "versions": ("versions", "{}"),
    "command": ("command", "`{}`"),
}


def define_flags() -> None:
    """Defines the flags of a step's benchmark, the same for this project's step and for torch's."""
    cli.define_config("The recipe, e.g. configs/emoji_diffusion_dpo.py.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("published", None, "sd15 or sdxl: random weights in place of config.model's.")
    flags.DEFINE_integer("resolution", None, "Side of the images in pixels; the UNet's own by default.")
    flags.DEFINE_integer("steps", 10, "Timed steps, after one that is not.", lower_bound=1)
    flags.DEFINE_string("json", None, "File for the result.")


def check_model(config: ConfigDict) -> None:
    """Refuses a benchmark of nothing, or of two things."""
    published = flags.FLAGS.published
    if not config.model and not published:
        raise UserError(
            "config.model is not set: give --config.model=DIR, a diffusers folder, or --published=sd15 or "
            "sdxl for that architecture with random weights"
        )
    if config.model and published:
        raise UserError(
            f"--published={published}: the recipe names a model, config.model = {config.model!r}; "
            "leave one of them away"
        )


def describe_recipe(config: ConfigDict, resolution: int) -> str:
    """Describes the measured step in a few words, the same for both implementations."""
    trained = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "all parameters"
    model = f"{flags.FLAGS.published}, random weights" if flags.FLAGS.published else config.model
    parts = f" in {config.accumulation} parts" if config.accumulation > 1 else ""
    return (
        f"{config.objective.name} of {model}, {trained}, {resolution} pixels, {config.batch_size} pairs"
        f"{parts}, {config.compute_dtype}, {config.optimizer.name}, remat {config.remat}"
    )


def time_steps(
    step: Callable[[], Any],
    wait: Callable[[Any], None],
    count: int,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds from the end of each step to the end of the next.

    Args:
      step: dispatches a step and returns what tells of its end.
      wait: waits for that. The next step is dispatched before, as the training loop does.
      count: how many are timed; one more is run before them, and one after.
      now: a clock in seconds.
    """
    ends, pending = [], step()
    for _ in range(count + 1):
        following = step()
        wait(pending)
        ends.append(now())
        pending = following
    wait(pending)
    return [after - before for before, after in itertools.pairwise(ends)]


def make_result(
    what: str, implementation: str, *, pairs: int, seconds: Sequence[float], **measured: Any
) -> Result:
    """Returns a result: what, where, when and by which command, beside what was measured.

    Args:
      what: in words.
      implementation: who computes it.
      pairs: how many each of `seconds` was spent on.
      seconds: of all measurements; their median counts.
      **measured: whatever else belongs to the benchmark.
    """
    middle = statistics.median(seconds)
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--json")]
    return {
        "what": what,
        "implementation": implementation,
        "pairs": pairs,
        "seconds": middle,
        "all_seconds": list(seconds),
        "pairs_per_second": pairs / middle,
        **measured,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments]),
    }


def torch_device(platform: str) -> Any:
    """Returns torch's device for a JAX platform ("cpu" or "gpu"), with TF32 where XLA uses it too.

    Raises:
      UserError: torch sees no such device.
    """
    import torch  # which this project's own step is measured without

    if platform == "cpu":
        return torch.device("cpu")
    if platform != "gpu" or not torch.cuda.is_available():
        raise UserError(
            f"JAX computes on a {platform} and torch {torch.__version__} sees none; install one that does, "
            "or set JAX_PLATFORMS=cpu"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return torch.device("cuda")


def versions() -> str:
    """Lists the versions of Python and of the libraries that compute."""
    found = [f"{name} {metadata.version(name)}" for name in PACKAGES if _is_installed(name)]
    return ", ".join([f"Python {platform.python_version()}", *found])


def _is_installed(name: str) -> bool:
    return any(True for _ in metadata.distributions(name=name))


def report(result: Result, path: str | None) -> None:
    """Prints the result of a step in a line, and writes it to `path`, if there is one."""
    shown = f"{result['implementation']:<24}{result['pairs_per_second']:9.4g} pairs/s"
    if result.get("tflops_per_device"):
        shown += f", {result['tflops_per_device']:.3g} TFLOP/s a device"
    if result.get("mfu"):
        shown += f", MFU {result['mfu']:.1%}"
    shown += f", peak memory {result['peak_memory_gib']:.2f} GiB"
    print(f"{shown}; before the first step {result['compile_seconds']:.1f} s", flush=True)
    write([result], path)


def write(results: Sequence[Result], path: str | None) -> None:
    """Writes results as a JSON list; `path` None writes nothing."""
    if path:
        write_json(Path(path), results, shared=True)


def markdown(results: Iterable[Mapping[str, Any]]) -> str:
    """Results as a Markdown table; a cell is empty where nothing was measured."""
    rows = [[heading for heading, _ in COLUMNS.values()], ["---"] * len(COLUMNS)]
    for result in results:
        rows.append(
            [
                "" if result.get(key) is None else form.format(result[key])
                for key, (_, form) in COLUMNS.items()
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    folder = Path(argv[1])
    files = sorted(folder.glob("*.json"))
    results = [result for file in files for result in json.loads(file.read_text(encoding="utf-8"))]
    if not results:
        raise FileNotFoundError(f"{folder}: no results (*.json) there")
    print(markdown(results))


if __name__ == "__main__":
    cli.run(main, operand="RESULTS_DIR")
