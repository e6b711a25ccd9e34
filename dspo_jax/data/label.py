"""Pairs from AI feedback: images of the same prompts, ordered by a reward, as a folder that encode reads.

    python -m dspo_jax.data.label --model MODEL_DIR --prompts prompts.txt --reward pickscore --out data/drawn
    python -m dspo_jax.encode --config configs/encode/folder.py --config.source.path=data/drawn ...

Every prompt is drawn with several seeds, the images are scored, and pairs.jsonl says which of two is better.
--images_from=DIR, in place of --model and --prompts, takes images that exist already: what sample wrote, or a
folder with a metadata.jsonl of prompts and images. A run that was stopped goes on where it was.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import cli
from dspo_jax.parallel.process_flags import define_process_flags
from dspo_jax.sampling.drawing_flags import define_drawing_flags


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from dspo_jax.errors import UserError
    from dspo_jax.evaluation.image_folders import ImageFolder
    from dspo_jax.feedback.labelling import Pairing, label, label_images
    from dspo_jax.parallel import processes
    from dspo_jax.parallel.mesh import use_cpu_cores
    from dspo_jax.rewards import load_reward
    from dspo_jax.sampling.options import read_drawing_flags
    from dspo_jax.sampling.prompts import read_prompts

    del argv
    use_cpu_cores()
    processes.initialize_from_flags()
    values = flags.FLAGS
    out = Path(values.out)
    drawn = (values.model, values.prompts)
    if not (all(drawn) if values.images_from is None else not any(drawn)):
        raise UserError("give --model and --prompts, or --images_from alone, whose folder names its prompts")
    if values.images_from is not None and values["num_images"].present:
        raise UserError("--num_images: is of drawing; leave it out with --images_from")
    with processes.claim(out):
        pairing = Pairing(values.num_images, values.pairs, values.temperature)
        if values.images_from is not None:
            folder = ImageFolder(Path(values.images_from), values.allow_outside)
            reward = load_reward(values.reward, values.reward_dir, batch_size=values.batch_size)
            done = label_images(folder, reward, out, pairing)
        else:
            found = read_prompts(values.prompts, allow_outside=values.allow_outside)
            prompts, rendering = read_drawing_flags(values, found)
            reward = load_reward(values.reward, values.reward_dir, batch_size=rendering.batch_size)
            done = label(values.model, prompts, reward, out, rendering, pairing, overwrite=values.overwrite)
    if processes.is_first():
        print(
            f"{out / 'pairs.jsonl'}: {done['pairs']} pairs of {done['images']} images by {reward.name} "
            f"({reward.version}); {done['ties']} tie(s) left out; mean score of the winners "
            f"{done['winners']:.4g}, of the losers {done['losers']:.4g}"
        )


def run() -> None:
    """Defines the flags and runs the command."""
    flags.DEFINE_string(
        "model", None, "Draws the images: a diffusers folder or a training workdir (or WORKDIR@best)."
    )
    flags.DEFINE_string("prompts", None, "A prompt, or a .txt, .jsonl, .json, .tsv, .csv or .parquet file.")
    flags.DEFINE_string(
        "images_from",
        None,
        "In place of --model and --prompts: images that exist, a folder of sample or with metadata.jsonl "
        "or .csv.",
    )
    flags.DEFINE_string(
        "reward",
        None,
        "FILE.py:FUNCTION, or one of compressibility, colourfulness, aesthetic, b_vqa, clip-b, clip-h, "
        "clip-l, hpsv2.0, hpsv2.1, imagereward, pickscore.",
    )
    flags.DEFINE_string("reward_dir", "rewards", "Folder of the rewards' weights.")
    flags.DEFINE_string("out", None, "Folder to write to; what is there is not done again.")
    flags.DEFINE_integer("num_images", 4, "Images to draw of each prompt, with --model.")
    flags.DEFINE_enum("pairs", "best_worst", ("best_worst", "all"), "Which images of a prompt are compared.")
    flags.DEFINE_float(
        "temperature",
        0.0,
        "Above 0 the winner is drawn, P = sigmoid(difference of the scores / temperature).",
    )
    define_drawing_flags()
    define_process_flags()
    cli.run(main, required=("reward", "out"))


if __name__ == "__main__":
    run()
