"""Prints statistics of an encoded dataset, and with --model draws a contact sheet of it.

    python -m dspo_jax.data.inspect DIR --model MODEL_DIR

The numbers go to standard output, and with --json also to a file. The sheet shows random examples as the
model's VAE decodes them: the caption, the winner in a green frame, the loser. Exit status 2 if something is
wrong with the dataset.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import cli
from dspo_jax.data.report import check_keys, format_report
from dspo_jax.errors import UserError
from dspo_jax.files import whole, write_text


def check_flags(settings: flags.FlagValues) -> None:
    """Refuses options that say nothing or contradict each other.

    Raises:
      UserError: names the option.
    """
    if settings.pairs < 1:
        raise UserError(f"--pairs={settings.pairs}: must be at least 1")
    if settings.sheet and not settings.model:
        raise UserError(f"--sheet={settings.sheet}: needs --model=MODEL_DIR, which decodes the images")
    if settings.sheet and Path(settings.sheet).suffix != ".png":
        raise UserError(f"--sheet={settings.sheet}: must end in .png")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from dspo_jax.data.summary import summarize_dataset

    settings, directory = flags.FLAGS, Path(argv[1])
    check_flags(settings)
    report = summarize_dataset(
        directory, split=settings.split, max_examples=settings.max_examples, checksums=settings.verify
    )
    print(format_report(report))
    print()
    if settings.json:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_text(Path(settings.json), text, shared=True)
        print(f"{settings.json}: these numbers")
    if not settings.model:
        print("no contact sheet: --model=MODEL_DIR, the model this was encoded with, draws one")
    else:
        from dspo_jax.data.sheet import (  # starts JAX, which numbers do not need
            choose_examples,
            draw_examples,
        )

        resolved = directory.resolve()  # "." has no name
        path = Path(settings.sheet or resolved.with_name(f"{resolved.name}-contact_sheet.png"))
        chosen = choose_examples(directory, list(report["splits"]), settings.pairs, settings.seed)
        picture = draw_examples(settings.model, directory, chosen)
        with whole(path, shared=True) as partial:
            picture.save(partial, format="PNG")
        print(f"{path}: contact sheet")
    check_keys(report)


def run() -> None:
    """Defines the flags and runs the command."""
    flags.DEFINE_string("split", None, "Only this split.")
    flags.DEFINE_integer("max_examples", 20_000, "Read at most so many of a split, evenly spread.")
    flags.DEFINE_bool("verify", False, "Compare the checksums of all shards, which reads every byte.")
    flags.DEFINE_string("json", None, "Also write the numbers to this file.")
    flags.DEFINE_string("model", None, "The model it was encoded with; draws the contact sheet.")
    flags.DEFINE_string("sheet", None, "The contact sheet; default: DIR-contact_sheet.png, beside DIR.")
    flags.DEFINE_integer("pairs", 12, "Random examples on the sheet.")
    flags.DEFINE_integer("seed", 0, "Of what is random: which examples are on the sheet.")
    cli.run(main, operand="DIR")


if __name__ == "__main__":
    run()
