"""Compares models with their base: same prompts and seeds, rewards, win rates with intervals, a page.

    python -m dspo_jax.evaluate --base MODEL_DIR --model runs/mine --prompts parti=PartiPrompts.tsv \\
        --rewards compressibility,own.py:my_reward --out eval

What has been drawn and scored is kept: the same command, stopped anywhere, goes on; more models, rewards or
seeds add to it.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import cli
from dspo_jax.parallel.process_flags import define_process_flags
from dspo_jax.sampling.drawing_flags import define_drawing_flags


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from rich.console import Console

    from dspo_jax.evaluation.options import read_options
    from dspo_jax.evaluation.report import print_report
    from dspo_jax.evaluation.run import evaluate
    from dspo_jax.parallel import processes
    from dspo_jax.parallel.mesh import use_cpu_cores

    del argv
    use_cpu_cores()
    processes.initialize_from_flags()
    settings = flags.FLAGS
    out = Path(settings.out)
    with processes.claim(out):
        comparison, rendering = read_options(settings)
        evaluation = evaluate(
            comparison,
            out,
            rendering,
            rewards=settings.rewards,
            reward_dir=settings.reward_dir,
            overwrite=settings.overwrite,
            single_file=settings.single_file,
        )
    if processes.is_first():
        print_report(evaluation, Console())
        print(out / "index.html")


def run() -> None:
    """Defines the flags and runs the command."""
    flags.DEFINE_string(
        "base", None, "What is compared with: a diffusers folder or a training workdir (or WORKDIR@best)."
    )
    flags.DEFINE_multi_string("model", [], "Such a folder, or NAME=DIR; may be repeated.")
    flags.DEFINE_multi_string(
        "lora",
        [],
        "A LoRA file that is added to every --model, not to the base: FILE or FILE:WEIGHT; may be repeated.",
    )
    flags.DEFINE_string("base_images", None, "In place of --base, a folder of images made elsewhere.")
    flags.DEFINE_multi_string("images", [], "In place of --model, the same; may be repeated.")
    flags.DEFINE_string(
        "prompts",
        None,
        "NAME=FILE, FOLDER or HUB_ID of a published set (parti, hpsv2, pickapic, pickapic-validation, "
        "instructpix2pix, t2i-compbench), or a file as sample takes it.",
    )
    flags.DEFINE_list("rewards", None, "Rewards, separated by commas; FILE.py:FUNCTION is your own.")
    flags.DEFINE_string("reward_dir", "rewards", "Folder with the weights of each reward under its name.")
    flags.DEFINE_integer("num_seeds", 5, "Images of each prompt, with seeds 0, 1, ...")
    flags.DEFINE_integer("num_base_seeds", None, "More images of the base, for rejection sampling.")
    flags.DEFINE_string("out", None, "Folder for images, scores and reports.")
    flags.DEFINE_string("people", None, "Votes that collect wrote: people's win rates beside the rewards'.")
    flags.DEFINE_float(
        "min_checks", 0.0, "With --people: attention checks, as a share, that a person must pass."
    )
    flags.DEFINE_bool("single_file", False, "Write index.html with its pictures inside it, to pass it on.")
    define_drawing_flags()
    define_process_flags()
    cli.run(main, required=("prompts", "rewards", "out"))


if __name__ == "__main__":
    run()
