"""Preference fine-tuning: one command that starts or resumes a run.

    python -m dspo_jax.train --config configs/emoji_dspo.py --workdir runs/emoji

Every key of the config, with its default, stands in configs/common.py. The same command resumes a run that
was stopped: by Ctrl-C, SIGTERM or a terminal that closed (saved then, with exit status 143), or by a crash.
The workdir holds config.json, checkpoints/, metrics.jsonl, tensorboard/, curves.png and samples/. With
--dry_run nothing is trained and nothing written: it says what the run would take.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from dspo_jax import cli
from dspo_jax.errors import UserError
from dspo_jax.parallel.process_flags import define_process_flags

if TYPE_CHECKING:  # its import takes seconds
    from dspo_jax.training.settings import TextSettings


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status, which tells a finished run from one that was stopped."""
    import jax

    from dspo_jax.monitoring.metrics import read_validations
    from dspo_jax.parallel import processes
    from dspo_jax.parallel.mesh import use_cpu_cores
    from dspo_jax.pipelines import published
    from dspo_jax.pipelines.loading import load_pipeline, with_text
    from dspo_jax.training.dry_run import dry_run, estimate
    from dspo_jax.training.run import train
    from dspo_jax.training.settings import parse
    from dspo_jax.training.validation_scalars import format_accuracy

    del argv
    values = flags.FLAGS
    settings = dataclasses.replace(parse(values.config), recipe=cli.recipe_name())
    use_cpu_cores(settings.batch_size // (settings.accumulation * (values.num_processes or 1)))
    processes.initialize_from_flags()
    without_data = values.published or values.pairs or values.gpu
    if without_data and not values.dry_run:
        raise UserError("--published, --pairs and --gpu: only go with --dry_run")
    if without_data:
        if values.published:
            pipe = with_text(published.architecture(values.published), **dataclasses.asdict(settings.text))
        elif settings.model:
            pipe = load_pipeline(settings.model, **dataclasses.asdict(settings.text))
        else:
            raise UserError("--dry_run: needs a model: --config.model=DIR, or --published=NAME, such as sd15")
        for line in estimate(settings, pipe, values.pairs, values.gpu):
            print(line, flush=True)
        return 0
    if values.dry_run:
        for line in dry_run(settings):
            print(line, flush=True)
        return 0
    reads_data = not settings.stream.needs_prompts
    needed = {
        "--config.model=DIR, a diffusers folder": settings.model,
        "--config.data.path=DIR, written by dspo_jax.encode": settings.data.path or not reads_data,
        "--workdir=DIR, the folder of the run": values.workdir,
    }
    if missing := [name for name, value in needed.items() if not value]:
        raise UserError(f"give {'; '.join(missing)}")
    workdir = Path(values.workdir)
    try:
        outcome = train(settings, workdir)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise OSError(
            f"another process of this run was lost, or this one failed ({str(error).splitlines()[0]}); start "
            "all of them again, and the run resumes from its last checkpoint"
        ) from error
    status = 0 if outcome.finished else cli.EXIT_STOPPED
    if not processes.is_first():
        return status
    print(f"{workdir}: step {outcome.step}")
    validations = list(read_validations(workdir / "metrics.jsonl").values())
    for when, scores in zip(("before", "after"), validations[:1] + validations[1:][-1:], strict=False):
        if "implicit_accuracy" in scores:
            print(f"held-out implicit accuracy {when}: {format_accuracy(scores)}")
        for name in (name for name in scores if name.startswith("reward_")):
            win_rate = name.replace("reward", "win_rate", 1)
            won = f", higher in {scores[win_rate]:.0%} of the images" if when == "after" else ""
            print(f"held-out {name.replace('_', ' ', 1)} {when}: {scores[name]:.4g}{won}")
    if status == cli.EXIT_STOPPED:
        print(f"stopped: after step {outcome.step}; the same command resumes it")
        return status
    chosen, of_best = workdir, ""
    if outcome.best is not None and outcome.best != outcome.step:
        print(f"the held-out {'pairs' if reads_data else 'prompts'} find step {outcome.best} best")
        chosen, of_best = Path(f"{workdir}@best"), " --step=best"
    base, trained = shlex.quote(f"--base={settings.model}"), shlex.quote(f"--model={chosen}")
    run = shlex.quote(f"--run={workdir}")
    text = " ".join(["", *flags_of_text(settings.text)])
    print(
        f"next: python -m dspo_jax.evaluate {base} {trained} --prompts=FILE --rewards=NAMES --out=DIR{text}"
    )
    print(f"  or: python -m dspo_jax.convert export {run}{of_best} --out=DIR")
    return status


def flags_of_text(text: "TextSettings") -> list[str]:
    """Returns the flags by which a folder, which records none of this, reads captions as a run does."""
    defaults = {"max_chunks": 1, "clip_skip": 1, "max_sequence_length": None}
    asked = dataclasses.asdict(text).items()
    return [f"--{key}={value}" for key, value in asked if value != defaults[key]]


def run() -> None:
    """Defines the flags and runs the command."""
    cli.define_config("What to train, e.g. configs/emoji_dspo.py.")
    flags.DEFINE_string("workdir", None, "Folder of the run; a run that is there is resumed.")
    flags.DEFINE_bool(
        "dry_run", False, "Say what the run would take (memory, FLOPs, batches), check the data, and stop."
    )
    flags.DEFINE_enum(
        "published",
        None,
        ("sd15", "sd21", "sdxl", "sd3-medium", "sd35-medium", "sd35-large"),
        "For --dry_run before a model is at hand.",
    )
    flags.DEFINE_integer("pairs", None, "For --dry_run before data are at hand: how many.", lower_bound=1)
    flags.DEFINE_string("gpu", None, "For --dry_run before a GPU is at hand, e.g. rtx4090 or h100.")
    define_process_flags()
    cli.run(main, required=("config",))


if __name__ == "__main__":
    run()
