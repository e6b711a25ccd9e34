"""The loop without people: sample, label, encode, train, evaluate, with a reward that needs no weights.

    python -m examples.emoji.closed_loop

The shipped model draws, JPEG's compressibility says which of its pictures is better, Diffusion-DPO trains on
the pairs, and 60 prompts and other noise show whether the model's pictures compress better now; 8 of them,
the categories, were trained on too. A run that was stopped goes on where it was.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console

from configs import emoji_diffusion_dpo
from configs.encode import folder
from dspo_jax import cli, locks
from dspo_jax.data.encoding import encode
from dspo_jax.data.sources.emoji import EmojiImages
from dspo_jax.evaluation.prompt_sets import read_prompt_set
from dspo_jax.evaluation.report import print_report
from dspo_jax.evaluation.run import Comparison, evaluate
from dspo_jax.feedback.labelling import Pairing, label
from dspo_jax.parallel.mesh import use_cpu_cores
from dspo_jax.rewards import load_reward
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Drawing, Rendering
from dspo_jax.training.run import train

HERE = Path(__file__).parent
MODEL = HERE / "model"
RENDERING = Rendering(Drawing(steps=20, guidance_scale=4.0))


def choose_prompts(held_out: Sequence[Prompt]) -> list[Prompt]:
    """160 names that are not held out, and every category ten times, each time with other noise."""
    captions = [pair.caption for pair in EmojiImages(min_occurrences=20).pairs("train")]
    names, categories = captions[::3], sorted(set(captions[2::3]))
    free = sorted(set(names) - {prompt.text for prompt in held_out})
    return [Prompt(text) for text in (*random.Random(0).sample(free, 160), *categories * 10)]


def run_loop(out: Path, console: Console) -> None:
    """Runs every stage and prints what came of it."""
    started = time.perf_counter()

    def announce(text: str) -> None:
        console.print(f"[{time.perf_counter() - started:4.0f} s] {text}", highlight=False)

    held_out = read_prompt_set(str(HERE / "prompts.txt"), out)
    announce("label: four pictures of each prompt, the best against the worst")
    label(
        MODEL,
        choose_prompts(held_out.prompts),
        load_reward("compressibility"),
        out / "drawn",
        RENDERING,
        Pairing(images_per_prompt=4, pairs="best_worst"),
    )
    config = folder.get_config()
    config.model, config.source.path = str(MODEL), str(out / "drawn")
    config.resolution, config.num_workers = 64, 0
    announce("encode")
    encode(config, out / "pairs")

    config = emoji_diffusion_dpo.get_config()
    config.model, config.data.path = str(MODEL), str(out / "pairs")
    config.samples.every = 0
    announce(f"train: {config.objective.name}, {config.steps} steps of {config.batch_size} pairs")
    if train(config, out / "run").stop_requested:
        announce("stopped; the same command goes on from there")
        return
    announce("evaluate: other noise, and other prompts but for the categories")
    evaluation = evaluate(
        Comparison(MODEL, {"Diffusion-DPO": out / "run"}, held_out, seeds=2),
        out / "evaluation",
        RENDERING,
        rewards=["compressibility", "colourfulness"],
    )
    print_report(evaluation, console)
    announce(f"done; the pairs of pictures: {out / 'evaluation' / 'index.html'}")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    use_cpu_cores()
    out = Path(flags.FLAGS.out)
    with locks.claim(out):
        run_loop(out, Console())


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/closed_loop", "Folder for everything that is made.")
    cli.run(main)
