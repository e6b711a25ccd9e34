"""Pairs from AI feedback: a model's own images, ordered by a reward, as a folder that encode reads.

    python -m dspo_jax.data.label --model MODEL_DIR --prompts prompts.txt --reward pickscore --out data/drawn
    python -m dspo_jax.encode --config configs/encode/folder.py --config.source.path=data/drawn ...

Every prompt is drawn with several seeds, the images are scored, and pairs.jsonl says which of two is better.
A run that was stopped goes on where it was.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import cli
from dspo_jax.feedback.labelling import PAIRS, Pairing, label
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import use_cpu_cores
from dspo_jax.rewards import REWARDS, load_reward
from dspo_jax.sampling.drawing_flags import define_drawing_flags, read_drawing_flags
from dspo_jax.sampling.prompts import read_prompts


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    use_cpu_cores()
    processes.initialize_from_flags()
    values = flags.FLAGS
    out = Path(values.out)
    with processes.claim(out):
        pairing = Pairing(values.images, values.pairs, values.temperature)
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


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A diffusers folder or a training workdir.", required=True)
    flags.DEFINE_string(
        "prompts", None, "A prompt, or a .txt, .jsonl, .json, .tsv, .csv or .parquet file.", required=True
    )
    flags.DEFINE_string("reward", None, f"FILE.py:FUNCTION, or one of {', '.join(REWARDS)}.", required=True)
    flags.DEFINE_string("reward_dir", "rewards", "Folder of the rewards' weights.")
    flags.DEFINE_string("out", None, "Folder to write to; what is there is not done again.", required=True)
    flags.DEFINE_integer("images", 4, "Images of each prompt.")
    flags.DEFINE_enum("pairs", "best_worst", PAIRS, "Which images of a prompt are compared.")
    flags.DEFINE_float(
        "temperature",
        0.0,
        "Above 0 the winner is drawn, P = sigmoid(difference of the scores / temperature).",
    )
    define_drawing_flags()
    processes.define_flags()
    cli.run(main)
