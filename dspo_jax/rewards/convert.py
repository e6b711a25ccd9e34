"""Published weights -> the folder that a reward is loaded from; CLI.

    python -m dspo_jax.rewards.convert --reward=pickscore --out=rewards/pickscore
    python -m dspo_jax.rewards.convert --reward=hpsv2.1 --weights=HPS_v2.1_compressed.pt \
        --tokenizer=CLIP-ViT-H-14-laion2B-s32B-b79K --out=rewards/hpsv2.1
    python -m dspo_jax.rewards.convert --reward=aesthetic --head=sac+logos+ava1-l14-linearMSE.pth \
        --out=rewards/aesthetic

Tensors are renamed, not computed with: they keep the dtype that they were published in.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import cli
from dspo_jax.locks import reserve
from dspo_jax.rewards.publish import PUBLISHED_HEAD, RECIPES, prepare


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    values = flags.FLAGS
    out = Path(values.out)
    with reserve(out):
        wanted = prepare(
            values.reward, out, weights=values.weights, tokenizer=values.tokenizer, head=values.head
        )
        RECIPES[wanted.reward].write(wanted)
    print(f"{out}: the reward {wanted.reward} of {wanted.source}")


if __name__ == "__main__":
    flags.DEFINE_string("reward", None, f"What to convert: {', '.join(RECIPES)}.", required=True)
    flags.DEFINE_string(
        "weights", None, "A file, a transformers folder or a hub id; default: the published hub id."
    )
    flags.DEFINE_string("out", None, "The folder to write; must not exist.", required=True)
    flags.DEFINE_string(
        "tokenizer",
        None,
        "A folder or hub id whose tokenizer to take; default: that beside the weights, or the published one.",
    )
    flags.DEFINE_string("head", None, f"aesthetic: the file {PUBLISHED_HEAD}.")
    cli.run(main)
