"""The training step of this project and that of torch, in turn in one run, and the ratio of their speeds.

    python -m benchmarks.compare --config configs/emoji_diffusion_dpo.py --torch=channels_last,online_vae
    python -m benchmarks.compare --config configs/sd15_dspo.py --published=sd15 --config.batch_size=8

Each is a process of its own, so that neither holds memory of the other: `train_step`, then `torch_reference`
in each way that --torch names, and so round after round. What is compared are medians over the rounds; what
else the machine does falls on all of them alike. A way that fails is left out of what follows.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import measuring
from dspo_jax import cli
from dspo_jax.errors import UserError

OWN_FLAGS = ("json", "rounds", "torch")
OURS = "dspo_jax"


def arguments_for_both(argv: Sequence[str]) -> Iterator[str]:
    """The command line without what `compare` alone understands."""
    rest = iter(argv)
    for argument in rest:
        name, has_value, _ = argument.lstrip("-").partition("=")
        if name not in OWN_FLAGS:
            yield argument
        elif not has_value:
            next(rest, None)


def run(module: str, arguments: Sequence[str]) -> measuring.Result | None:
    """Runs a benchmark; returns its result, or None if it failed. What it says is printed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, f"--json={path}"]
        if subprocess.run(command).returncode:
            return None
        [result] = json.loads(path.read_text(encoding="utf-8"))
        return result


def combine(rounds: Sequence[measuring.Result]) -> measuring.Result:
    """Returns the same measurement of several rounds as one: the median of speeds, the most memory."""
    combined = dict(rounds[0])
    for key in ("seconds", "pairs_per_second", "tflops_per_device", "mfu"):
        values = [each[key] for each in rounds if each.get(key) is not None]
        combined[key] = statistics.median(values) if values else None
    combined["all_seconds"] = [seconds for each in rounds for seconds in each["all_seconds"]]
    combined["peak_memory_gib"] = max(each["peak_memory_gib"] for each in rounds)
    return combined


def summarise(found: Mapping[str, Sequence[measuring.Result]]) -> list[measuring.Result]:
    """Returns a result for each way that has any, ours first, with the ratio of our speed to its."""
    results = [combine(rounds) for rounds in found.values() if rounds]
    ours = results[0]
    for result in results:
        result["ratio"] = ours["pairs_per_second"] / result["pairs_per_second"]
        for key in ("tflops_per_device", "mfu"):
            # The same model does the same arithmetic; what online encoding adds is not counted.
            result[key] = ours[key] and ours[key] / result["ratio"]
    return results


def options_of(way: str, ours: measuring.Result) -> list[str]:
    """Flags for torch's step in that way, on a device like ours.

    Raises:
      UserError: torch cannot use as many as we did.
    """
    if ours["platform"] != "cpu" and ours["devices"] > 1:
        raise UserError(
            f"JAX computes on {ours['devices']} devices and torch on one; set CUDA_VISIBLE_DEVICES=0"
        )
    options = [] if way == "plain" else [f"--options={way.replace('+', ',')}"]
    return [*options, f"--platform={ours['platform']}"]


def main(argv: Sequence[str]) -> None:
    """Measures, prints the table and writes the results, those so far after every process."""
    del argv
    values = flags.FLAGS
    measuring.check_model(values.config)
    arguments = list(arguments_for_both(sys.argv[1:]))
    found: dict[str, list[measuring.Result]] = {OURS: []} | {way: [] for way in values.torch}
    failed: list[str] = []
    for _ in range(values.rounds):
        for way, rounds in found.items():
            if way in failed:
                continue
            if way == OURS:
                result = run("train_step", arguments)
            else:
                result = run("torch_reference", [*arguments, *options_of(way, found[OURS][0])])
            if result is not None:
                rounds.append(result)
                measuring.write(summarise(found), values.json)
            elif way == OURS:
                raise UserError("benchmarks.train_step failed; see above")
            else:
                failed.append(way)
    ours, *theirs = summarise(found)
    table = Table(title=f"{ours['what']}; {ours['device']}; {values.rounds} round(s)")
    for heading in ("by", "pairs/s", "ours / theirs"):
        table.add_column(heading, justify="left" if heading == "by" else "right")
    for result in (ours, *theirs):
        table.add_row(result["implementation"], f"{result['pairs_per_second']:.4g}", f"{result['ratio']:.2f}")
    Console().print(table)
    best = max(
        (result for result in theirs if "online_vae" not in result["implementation"]),
        key=lambda result: result["pairs_per_second"],
        default=None,
    )
    if best is not None:
        print(f"ratio to the fastest way of torch with cached latents: {best['ratio']:.2f}")
    if failed:
        raise UserError(f"--torch={','.join(failed)}: failed; see above")


if __name__ == "__main__":
    measuring.define_flags()
    flags.DEFINE_integer("rounds", 3, "How often each is run.", lower_bound=1)
    flags.DEFINE_list(
        "torch",
        ["plain", "channels_last"],
        "Ways of torch: plain, or options of torch_reference joined by +, e.g. channels_last+compile.",
    )
    cli.run(main)
