"""The training step of this project and that of torch, in turn in one run, and the ratio of their speeds.

    python -m benchmarks.compare --config configs/emoji_diffusion_dpo.py --torch=channels_last,online_vae
    python -m benchmarks.compare --config configs/sd15_dspo.py --published=sd15 --config.batch_size=8

Each is a process of its own, so that neither holds memory of the other: `train_step`, then `torch_reference`
in each way that --torch names, and so round after round. What is compared are medians over the rounds; what
else the machine does falls on all of them alike.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import measuring
from dspo_jax import cli

OWN_FLAGS = ("json", "rounds", "torch")


def arguments_for_both(argv: Sequence[str]) -> Iterator[str]:
    """The command line without what `compare` alone understands."""
    rest = iter(argv)
    for argument in rest:
        name, has_value, _ = argument.lstrip("-").partition("=")
        if name not in OWN_FLAGS:
            yield argument
        elif not has_value:
            next(rest, None)


def run(module: str, arguments: Sequence[str]) -> measuring.Result:
    """Runs a benchmark; returns its result.

    Raises:
      ValueError: it failed; what it said has been printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, f"--json={path}"]
        if subprocess.run(command).returncode:
            raise ValueError(f"benchmarks.{module} failed; see above")
        [result] = json.loads(path.read_text(encoding="utf-8"))
        return result


def combine(rounds: Sequence[measuring.Result]) -> measuring.Result:
    """The same measurement of several rounds as one: the median of speeds, the most memory."""
    combined = dict(rounds[0])
    for key in ("seconds", "pairs_per_second", "tflops_per_device", "mfu"):
        values = [each[key] for each in rounds if each.get(key) is not None]
        combined[key] = statistics.median(values) if values else None
    combined["all_seconds"] = [seconds for each in rounds for seconds in each["all_seconds"]]
    combined["peak_memory_gib"] = max(each["peak_memory_gib"] for each in rounds)
    return combined


def main(argv: Sequence[str]) -> None:
    """Measures, prints the table and writes the results."""
    del argv
    values = flags.FLAGS
    measuring.check_model(values.config)
    arguments = list(arguments_for_both(sys.argv[1:]))
    runs = [("train_step", arguments)]
    for way in values.torch:
        options = [] if way == "plain" else [f"--options={way.replace('+', ',')}"]
        runs.append(("torch_reference", [*arguments, *options]))
    found: list[list[measuring.Result]] = [[] for _ in runs]
    for _ in range(values.rounds):
        for results, (module, their_arguments) in zip(found, runs, strict=True):
            results.append(run(module, their_arguments))
    ours, *theirs = map(combine, found)
    table = Table(title=f"{ours['what']}; {ours['device']}; {values.rounds} round(s)")
    for heading in ("by", "pairs/s", "ours / theirs"):
        table.add_column(heading, justify="left" if heading == "by" else "right")
    for result in (ours, *theirs):
        result["ratio"] = ours["pairs_per_second"] / result["pairs_per_second"]
        for key in ("tflops_per_device", "mfu"):
            # The same model does the same arithmetic; what online encoding adds is not counted.
            result[key] = ours[key] and ours[key] / result["ratio"]
        table.add_row(result["implementation"], f"{result['pairs_per_second']:.4g}", f"{result['ratio']:.2f}")
    Console().print(table)
    best = max(
        (result for result in theirs if "online_vae" not in result["implementation"]),
        key=lambda result: result["pairs_per_second"],
        default=None,
    )
    if best is not None:
        print(f"ratio to the fastest way of torch with cached latents: {best['ratio']:.2f}")
    measuring.write([ours, *theirs], values.json)


if __name__ == "__main__":
    measuring.define_flags()
    flags.DEFINE_integer("rounds", 3, "How often each is run.", lower_bound=1)
    flags.DEFINE_list(
        "torch",
        ["plain", "channels_last"],
        "Ways of torch: plain, or options of torch_reference joined by +, e.g. channels_last+compile.",
    )
    cli.run(main)
