"""Compares models with their base: same prompts and seeds, rewards, win rates with intervals, a page.

    python -m dspo_jax.evaluate --base MODEL_DIR --model runs/mine --prompts parti=PartiPrompts.tsv \\
        --rewards compressibility,own.py:my_reward --out eval

What has been drawn and scored is kept: the same command, stopped anywhere, goes on; more models, rewards or
seeds add to it.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console

from dspo_jax import cli
from dspo_jax.errors import UserError
from dspo_jax.evaluation.image_folders import ImageFolder
from dspo_jax.evaluation.prompt_sets import SETS, PromptSet, read_prompt_set
from dspo_jax.evaluation.report import print_report
from dspo_jax.evaluation.run import PROMPT_IMAGES, Comparison, ModelOrImages, check_out, evaluate
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import use_cpu_cores
from dspo_jax.sampling.drawing_flags import define_drawing_flags, read_drawing_flags
from dspo_jax.sampling.rendering import Rendering


def read_options(settings: flags.FlagValues) -> tuple[Comparison, Rendering]:
    """Reads the models that the flags compare, and how they draw.

    Raises:
      UserError: a flag that is refused.
      OSError: a file that is missing.
    """
    if bool(settings.base) == bool(settings.base_images):
        raise UserError("--base or --base_images: give one of them")
    models: dict[str, ModelOrImages] = {}
    for flag, texts in (("model", settings.model), ("images", settings.images)):
        for text in texts:
            label, path = _parse_named(text)
            if label in models:
                raise UserError(f"--{flag}={text}: two are called {label!r}; name it: --{flag}=NAME=DIR")
            models[label] = path if flag == "model" else ImageFolder(Path(path), settings.allow_outside)
    out = Path(settings.out)
    check_out(out)  # before the pictures of a set of edits are unpacked into it
    found = read_prompt_set(settings.prompts, out / PROMPT_IMAGES, allow_outside=settings.allow_outside)
    prompts, rendering = read_drawing_flags(settings, found.prompts)
    comparison = Comparison(
        base=settings.base or ImageFolder(Path(settings.base_images), settings.allow_outside),
        models=models,
        prompts=PromptSet(found.name, tuple(prompts)),
        seeds=settings.seeds,
        base_seeds=settings.base_seeds,
    )
    return comparison, rendering


def _parse_named(text: str) -> tuple[str, str]:
    """Parses `DIR` or `NAME=DIR` to (label, path)."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return Path(text).name or Path(text).resolve().name, text
    return name, path


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
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
        )
    if processes.is_first():
        print_report(evaluation, Console())
        print(out / "index.html")


if __name__ == "__main__":
    flags.DEFINE_string("base", None, "What is compared with: a diffusers folder or a training workdir.")
    flags.DEFINE_multi_string("model", [], "Such a folder, or NAME=DIR; may be repeated.")
    flags.DEFINE_string("base_images", None, "In place of --base, a folder of images made elsewhere.")
    flags.DEFINE_multi_string("images", [], "In place of --model, the same; may be repeated.")
    flags.DEFINE_string(
        "prompts",
        None,
        f"NAME=FILE, FOLDER or HUB_ID of a published set ({', '.join(SETS)}), or a file as sample takes it.",
        required=True,
    )
    flags.DEFINE_list(
        "rewards", None, "Rewards, separated by commas; FILE.py:FUNCTION is your own.", required=True
    )
    flags.DEFINE_string("reward_dir", "rewards", "Folder with the weights of each reward under its name.")
    flags.DEFINE_integer("seeds", 5, "Images of each prompt, with seeds 0, 1, ...")
    flags.DEFINE_integer("base_seeds", None, "More images of the base, for rejection sampling.")
    flags.DEFINE_string("out", None, "Folder for images, scores and reports.", required=True)
    define_drawing_flags()
    processes.define_flags()
    cli.run(main)
