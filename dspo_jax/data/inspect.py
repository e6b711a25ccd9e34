"""What is in an encoded dataset, to look at before training: numbers, and with --model a contact sheet.

    python -m dspo_jax.data.inspect DIR --model MODEL_DIR

The numbers go to standard output, and with --json also to a file. The sheet shows random examples as the
model's VAE decodes them: the caption, the winner in a green frame, the loser. Exit status 2 if something is
wrong with the dataset.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image
from rich.filesize import decimal

from dspo_jax import cli
from dspo_jax.data import shards
from dspo_jax.data.summary import Examples, summarize_dataset
from dspo_jax.files import whole, write_text


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `summarize_dataset` as text."""
    model = {key: value for key, value in report["model"].items() if "sha256" not in key}
    name, source = model.pop("model"), report["source"]
    kind = "pairs" if report["images_per_example"] == 2 else "single images"
    lines = [
        f"{report['directory']}: {kind}, resolution {report['resolution']}",
        _line("encoded with", ", ".join([name, *_settings(model | report["encoding"])])),
        _line("source", ", ".join([source["name"], *_settings(source["arguments"])])),
    ]
    if report["checksums_verified"]:
        lines.append(_line("checksums", "as in the manifest"))
    for split, content in report["splits"].items():
        lines += ["", *_format_split(split, content)]
    return "\n".join(lines)


def _format_split(name: str, content: Mapping[str, Any]) -> Iterator[str]:
    total = content["num_examples"]
    each = f", {decimal(content['bytes'] // total)} each" if total else ""
    yield name
    yield _line(
        "examples", f"{total:,} in {content['num_shards']:,} shard(s), {decimal(content['bytes'])}{each}"
    )
    if "buckets" in content:
        yield _line("buckets", _counts(content["buckets"]))
    yield _line("left out", _counts(content["left_out"]) or "none")
    yield _line("skipped", _counts(content["skipped"]) or "none")
    if "examples_read" not in content:
        return
    read, captions, images = content["examples_read"], content["captions"], content["images"]
    if read < total:
        yield _line("sample", f"what follows is over {read:,} of the {total:,} examples, evenly spread")
    yield _line("caption tokens", f"{_format(captions['tokens'])}, with the two that begin and end it")
    if captions["full"]:
        yield _line("", f"{_share(captions['full'], read, 'captions')} fill all places: cut, or just fit")
    yield _line("characters", _format(captions["characters"]))
    if captions["empty"]:
        yield _line("", f"{_share(captions['empty'], read, 'captions')} are empty")
    yield _line("captions", f"{captions['distinct']:,} different ones in {read:,} examples")
    for caption, count in captions["most_repeated"].items():
        yield _line("", f"{count:,} x {textwrap.shorten(caption, 80, placeholder=' ...')!r}")
    if "captions_in_train" in content:
        shared = content["captions_in_train"]
        among = f"one of the {shared['train_examples_read']:,} examples read of train"
        yield _line("", f"{_share(shared['examples'], read)} have the caption of {among}")
    yield _line("image width", _format(images["width"]))
    yield _line("height", _format(images["height"]))
    yield _line("width : height", _format(images["width_by_height"]))
    yield _line("enlarged", _share(images["enlarged"], images["count"], "images"))
    if "preferences" in content:
        preferences = content["preferences"]
        yield _line("preferences", f"{_share(preferences['hard'], read)} are hard (1)")
        if preferences["hard"] < read:
            yield _line("", f"soft: {_counts(preferences['soft'])}")
        yield _line("loser won", f"{_share(preferences['loser_won'], read, 'losers')} win another pair")


def check_keys(report: Mapping[str, Any]) -> None:
    """Refuses a dataset in which a key occurs twice in a split.

    Raises:
      ValueError: names the splits and the first such keys.
    """
    found = []
    for name, content in report["splits"].items():
        repeated = content.get("duplicate_keys")
        if repeated and repeated["count"]:
            found.append(f"split {name!r}: {repeated['count']:,} ({_counts(repeated['first'])})")
    if found:
        raise ValueError(
            f"{report['directory']}: keys that more than one example has: {'; '.join(found)}; a key must be "
            "unique in its split: mend the source and encode the data again"
        )


def _line(label: str, text: str) -> str:
    return textwrap.fill(f"  {label:<16}{text}", 110, subsequent_indent=" " * 18, break_long_words=False)


def _settings(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} {value}" for key, value in values.items()]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


def _share(count: int, total: int, what: str = "examples") -> str:
    return f"{count:,} of {total:,} {what} ({100 * count / total:.3g} %)"


def _format(spread: Mapping[str, float]) -> str:
    if spread["min"] == spread["max"]:
        return "all {min:,.6g}".format(**spread)
    return "{min:,.6g} to {max:,.6g}, median {median:,.6g}, 95 % up to {p95:,.6g}".format(**spread)


def choose_examples(
    directory: Path, splits: Sequence[str], count: int, seed: int
) -> list[tuple[str, dict[str, Any]]]:
    """Random examples of the splits, all examples being as likely, with the names of their splits, in order.

    Raises:
      ValueError: there is none, or a split does not fit the manifest.
      OSError: a shard cannot be read.
    """
    manifest = shards.read_manifest(directory)
    opened = {split: Examples(directory, split, manifest) for split in splits}
    total = sum(map(len, opened.values()))
    if not total:
        raise ValueError(f"{directory}: no example to draw in {', '.join(splits)}")
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    found, first = [], 0
    for split, examples in opened.items():
        numbers = chosen[(first <= chosen) & (chosen < first + len(examples))] - first
        found += [(split, example) for example in examples.read(numbers.tolist(), moments=True)]
        first += len(examples)
    return found


def draw_examples(model: str, directory: Path, chosen: Sequence[tuple[str, dict[str, Any]]]) -> Image.Image:
    """Draws what `choose_examples` has chosen.

    Args:
      model: the model directory that decodes.
      directory: the dataset.
      chosen: names of splits, and examples with `moments`.

    Raises:
      ValueError: the dataset was encoded with another model, or the model is damaged.
      FileNotFoundError: no such model.
    """
    # Here, as a report alone need not wait for JAX to start.
    from dspo_jax.data import sheet
    from dspo_jax.pipeline import load_pipeline

    pipe = load_pipeline(model)
    manifest = shards.read_manifest(directory)
    shards.check_manifest(manifest, pipe.fingerprint(), path=directory / shards.MANIFEST)
    images = sheet.decode_examples(pipe, [example for _, example in chosen])
    return sheet.draw_sheet(
        [
            (example["caption"], _notes(split, example), pixels)
            for (split, example), pixels in zip(chosen, images, strict=True)
        ]
    )


def _notes(split: str, example: Mapping[str, Any]) -> list[str]:
    sizes = " and ".join(f"{width} x {height}" for height, width, *_ in example["micro_conditioning"])
    notes = [f"{split} {example['key']}", f"from {sizes} pixels"]
    if example["preference"] < 1:
        notes.append(f"preference {example['preference']:.2f}")
    return notes


def check_flags(settings: Any) -> None:
    """Refuses options that say nothing or contradict each other.

    Raises:
      ValueError: names the option.
    """
    if settings.pairs < 1:
        raise ValueError(f"--pairs={settings.pairs}: must be at least 1")
    if settings.sheet and not settings.model:
        raise ValueError(f"--sheet={settings.sheet}: needs --model=MODEL_DIR, which decodes the images")
    if settings.sheet and Path(settings.sheet).suffix != ".png":
        raise ValueError(f"--sheet={settings.sheet}: must end in .png")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
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
        resolved = directory.resolve()  # "." has no name
        path = Path(settings.sheet or resolved.with_name(f"{resolved.name}-contact_sheet.png"))
        chosen = choose_examples(directory, list(report["splits"]), settings.pairs, settings.seed)
        picture = draw_examples(settings.model, directory, chosen)
        with whole(path, shared=True) as partial:
            picture.save(partial, format="PNG")
        print(f"{path}: contact sheet")
    check_keys(report)


if __name__ == "__main__":
    flags.DEFINE_string("split", None, "Only this split.")
    flags.DEFINE_integer("max_examples", 20_000, "Read at most so many of a split, evenly spread.")
    flags.DEFINE_bool("verify", False, "Compare the checksums of all shards, which reads every byte.")
    flags.DEFINE_string("json", None, "Also write the numbers to this file.")
    flags.DEFINE_string("model", None, "The model it was encoded with; draws the contact sheet.")
    flags.DEFINE_string("sheet", None, "The contact sheet; default: DIR-contact_sheet.png, beside DIR.")
    flags.DEFINE_integer("pairs", 12, "Random examples on the sheet.")
    flags.DEFINE_integer("seed", 0, "Of what is random: which examples are on the sheet.")
    cli.run(main, operand="DIR")
