"""Prompts to images, from one model or several side by side: a folder for each, a manifest, a contact sheet.

    python -m dspo_jax.sample --model examples/emoji/model --model runs/emoji --prompts "red heart" --out out

Every model starts from the same noise, which depends on the seed and the number of the prompt alone. A folder
that was left unfinished is gone on with.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import cli
from dspo_jax.parallel.process_flags import define_process_flags
from dspo_jax.sampling.drawing_flags import define_drawing_flags


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from dspo_jax.parallel import processes
    from dspo_jax.parallel.mesh import use_cpu_cores
    from dspo_jax.pipelines.loading import Adapted
    from dspo_jax.sampling.drawing import sample
    from dspo_jax.sampling.options import read_options

    del argv
    use_cpu_cores()
    processes.initialize_from_flags()
    settings = flags.FLAGS
    out = Path(settings.out)
    with processes.claim(out):
        options = read_options(settings)
        sheet = sample(
            {path: Adapted(path, tuple(settings.lora)) if settings.lora else path for path in settings.model},
            options.prompts,
            out,
            options.rendering,
            seeds=options.seeds,
            init_latents=options.init_latents,
            overwrite=settings.overwrite,
        )
    if sheet is not None:
        print(sheet)


def run() -> None:
    """Defines the flags and runs the command."""
    flags.DEFINE_multi_string(
        "model",
        None,
        "A diffusers folder or a training workdir (WORKDIR@best: its best step); may be repeated.",
    )
    flags.DEFINE_multi_string(
        "lora", [], "A LoRA file that is added to every model, FILE or FILE:WEIGHT; may be repeated."
    )
    flags.DEFINE_string(
        "negative_model",
        None,
        "A model of the same kind (objective npo) that predicts the unconditional half of guidance.",
    )
    flags.DEFINE_string("prompts", None, "A prompt, or a .txt, .jsonl, .json, .tsv, .csv or .parquet file.")
    flags.DEFINE_string("out", None, "Folder to write to; what is there already is not drawn again.")
    flags.DEFINE_list("seeds", ["0"], "Seeds, separated by commas; one image of each prompt for each.")
    flags.DEFINE_string("init_latents", None, "A .npy file of standard normal noise [prompts, h, w, C].")
    flags.DEFINE_string(
        "preview_vae", None, "Folder of an AutoencoderTiny (TAESD) that decodes instead, faster."
    )
    flags.DEFINE_string(
        "optimize_noise",
        None,
        "A reward, or a sum such as pickscore,0.5*aesthetic, for which each image's noise is optimised.",
    )
    flags.DEFINE_integer(
        "optimize_steps", 50, "Updates of the noise, each of which takes about as long as three images."
    )
    flags.DEFINE_string("reward_dir", "rewards", "Folder of the reward's weights.")
    define_drawing_flags()
    define_process_flags()
    cli.run(main, required=("model", "prompts", "out"))


if __name__ == "__main__":
    run()
