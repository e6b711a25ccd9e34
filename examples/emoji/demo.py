"""The whole path in minutes on a CPU: encode real pairs, align the shipped model, measure, compare, export.

    python -m examples.emoji.demo

Everything lands in runs/demo. Stopped half-way, the same command goes on where it was.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from configs import emoji_diffusion_dpo
from configs.encode import emoji
from dspo_jax import cli, locks
from dspo_jax.conversion.export_model import export
from dspo_jax.data import shards
from dspo_jax.data.encoding import encode
from dspo_jax.data.sources.emoji import EmojiPairs
from dspo_jax.evaluation.prompt_sets import PromptSet
from dspo_jax.evaluation.report import print_report
from dspo_jax.evaluation.run import Comparison, evaluate
from dspo_jax.monitoring.metrics import read_validations
from dspo_jax.parallel.mesh import use_cpu_cores
from dspo_jax.sampling.drawing import sample
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Drawing, Rendering
from dspo_jax.training.run import train

HERE = Path(__file__).parent
MODEL = HERE / "model"
RENDERING = Rendering(Drawing(steps=20, guidance_scale=4.0))
# Categories are what the pairs compare; the names show what the model still draws.
PROMPTS = (
    "smileys & emotion",
    "people & body",
    "animals & nature",
    "food & drink",
    "activities",
    "smiling face with sunglasses",
    "heavy black heart",
)


def run_demo(out: Path, console: Console) -> None:
    """Runs every stage and prints what was done and where it lies."""
    started = time.perf_counter()
    rows: list[tuple[str, str, str]] = []

    def announce(text: str) -> None:
        console.print(f"[{time.perf_counter() - started:4.0f} s] {text}", highlight=False)

    announce("encode: emoji pairs -> latents and token ids")
    config = emoji.get_config()
    config.model = str(MODEL)
    encode(config, out / "pairs")
    splits = shards.read_manifest(out / "pairs")["splits"]
    counts = {name: split["num_examples"] for name, split in splits.items()}
    rows.append(("pairs", f"{counts['train']} to train on, {counts['validation']} held out", "pairs/"))

    config = emoji_diffusion_dpo.get_config()
    config.model = str(MODEL)
    config.data.path = str(out / "pairs")
    config.samples.every = 0  # the sheet below shows more
    announce(f"train: {config.objective.name}, {config.steps} steps of {config.batch_size} pairs")
    outcome = train(config, out / "run")
    if outcome.stop_requested:
        announce(f"stopped at step {outcome.step} of {config.steps}; the same command goes on from there")
        return
    validations = read_validations(out / "run" / "metrics.jsonl")
    for step, when in ((0, "before"), (config.steps, "after")):
        scores = validations[step]
        low, high = scores["implicit_accuracy_low"], scores["implicit_accuracy_high"]
        share = f"{scores['implicit_accuracy']:.3f}  (95 % interval {low:.3f} to {high:.3f})"
        rows.append((f"held-out implicit accuracy {when}", share, "run/metrics.jsonl"))

    announce("evaluate: categories, from the same noise by both models")
    categories = sorted({pair.caption for pair in EmojiPairs().pairs("train")})
    prompts = PromptSet("categories of emoji", tuple(Prompt(text) for text in categories * 24))
    evaluation = evaluate(
        Comparison(MODEL, {"aligned": out / "run"}, prompts, seeds=1),
        out / "evaluation",
        RENDERING,
        rewards=[f"{HERE / 'sentiment.py'}:sentiment", "compressibility", "colourfulness"],
    )
    rows.append(("win rates over the base", "the table above, figures, pairs", "evaluation/index.html"))

    announce("sample: the same prompts and seeds from both models")
    models = {"base": MODEL, "aligned": out / "run"}
    sample(models, [Prompt(text) for text in PROMPTS], out / "samples", RENDERING, seeds=range(4))
    rows.append(
        (
            "pictures, base beside aligned",
            f"{len(PROMPTS)} prompts x 4 seeds",
            "samples/contact_sheet.png",
        )
    )

    announce("export: a diffusers folder")
    exported = out / "exported"
    if not exported.exists():
        export(out / "run", exported)
    rows.append(("aligned model", "a folder for diffusers' StableDiffusionPipeline", "exported/"))

    print_report(evaluation, console)
    table = Table(title=f"results in {out}/, {time.perf_counter() - started:.0f} s")
    for heading in ("what", "result"):
        table.add_column(heading)
    table.add_column("where", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(
        "The pairs' order, and the reward `sentiment`, are the affect of tweets that use an emoji, not a "
        "judgement of its picture; held-out pairs share emoji with one another, so the interval of the "
        "implicit accuracy is a little too narrow. The loss and the errors of winner and loser rise here: "
        "examples/emoji/README.md says why.",
        highlight=False,
    )


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    use_cpu_cores()
    out = Path(flags.FLAGS.out)
    with locks.claim(out):
        run_demo(out, Console())


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/demo", "Folder for everything the demo makes.")
    cli.run(main)
