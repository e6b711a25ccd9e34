"""Converts a reward's published weights to the folder that it is loaded from.

    python -m dspo_jax.rewards.convert --reward=pickscore --out=rewards/pickscore
    python -m dspo_jax.rewards.convert --reward=hpsv2.1 --weights=HPS_v2.1_compressed.pt \\
        --tokenizer=CLIP-ViT-H-14-laion2B-s32B-b79K --out=rewards/hpsv2.1
    python -m dspo_jax.rewards.convert --reward=aesthetic --head=sac+logos+ava1-l14-linearMSE.pth \\
        --out=rewards/aesthetic

Tensors are renamed, not computed with: they keep the dtype that they were published in.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import cli
from dspo_jax.locks import reserve


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from dspo_jax.rewards.publish import RECIPES, prepare

    del argv
    values = flags.FLAGS
    out = Path(values.out)
    with reserve(out):
        wanted = prepare(
            values.reward, out, weights=values.weights, tokenizer=values.tokenizer, head=values.head
        )
        RECIPES[wanted.reward].write(wanted)
    print(f"{out}: the reward {wanted.reward} of {wanted.source}")


def run() -> None:
    """Defines the flags and runs the command."""
    flags.DEFINE_string(
        "reward",
        None,
        "What to convert: pickscore, hpsv2.0, hpsv2.1, clip-b, clip-h, clip-l, aesthetic, imagereward or "
        "b_vqa.",
    )
    flags.DEFINE_string(
        "weights", None, "A file, a transformers folder or a hub id; default: the published hub id."
    )
    flags.DEFINE_string("out", None, "The folder to write; must not exist.")
    flags.DEFINE_string(
        "tokenizer",
        None,
        "A folder or hub id whose tokenizer to take; default: that beside the weights, or the published one.",
    )
    flags.DEFINE_string("head", None, "aesthetic: the file sac+logos+ava1-l14-linearMSE.pth.")
    cli.run(main, required=("reward", "out"))


if __name__ == "__main__":
    run()
