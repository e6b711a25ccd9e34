"""Formats the summary of a dataset as text."""

import textwrap
from collections.abc import Iterator, Mapping

from rich.filesize import decimal

from dspo_jax.errors import UserError
from dspo_jax.json_files import JsonObject


def format_report(report: JsonObject) -> str:
    """Returns the report of `summarize_dataset` as text."""
    model = {key: value for key, value in report["model"].items() if "sha256" not in key}
    name, source = model.pop("model"), report["source"]
    images = report["images_per_example"]
    kind = {1: "single images", 2: "pairs"}.get(images, f"lists of {images} images")
    lines = [
        f"{report['directory']}: {kind}, resolution {report['resolution']}",
        _line("encoded with", ", ".join([name, *_settings(model | report["encoding"])])),
        _line("source", ", ".join([source["name"], *_settings(source["arguments"])])),
    ]
    if report["score"]:
        score = {key: value for key, value in report["score"].items() if value is not None}
        lines.append(_line("score", ", ".join(_settings(score))))
    if states := report["caption_states"]:
        text = "{captions:,} captions of {length} tokens, float16 from {computed_in}".format(**states)
        lines.append(_line("T5's states", f"{text}, {decimal(states['bytes'])}"))
    if report["checksums_verified"]:
        lines.append(_line("checksums", "as in the manifest"))
    for split, content in report["splits"].items():
        lines += ["", *_format_split(split, content)]
    return "\n".join(lines)


def _format_split(name: str, content: JsonObject) -> Iterator[str]:
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
    if "labels" in content:
        yield _line("labels", _counts(content["labels"]))
    if "scores" in content:
        scores = content["scores"]
        yield _line("score", _format(scores["winner"]) + (", of winners" if "loser" in scores else ""))
        if "loser" in scores:
            yield _line("", f"{_format(scores['loser'])}, of losers")
            yield _line("score gap", f"{_format(scores['gap'])}, winner less loser")
            yield _line("", f"{_share(scores['agree'], read, 'pairs')} have the higher score on the winner")


def check_keys(report: JsonObject) -> None:
    """Refuses a dataset in which a key occurs twice in a split.

    Raises:
      UserError: names the splits and the first such keys.
    """
    found = []
    for name, content in report["splits"].items():
        repeated = content.get("duplicate_keys")
        if repeated and repeated["count"]:
            found.append(f"split {name!r}: {repeated['count']:,} ({_counts(repeated['first'])})")
    if found:
        raise UserError(
            f"{report['directory']}: keys that more than one example has: {'; '.join(found)}; a key must be "
            "unique in its split: mend the source and encode the data again"
        )


def _line(label: str, text: str) -> str:
    return textwrap.fill(f"  {label:<16}{text}", 110, subsequent_indent=" " * 18, break_long_words=False)


def _settings(values: JsonObject) -> list[str]:
    return [f"{key} {value}" for key, value in values.items()]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


def _share(count: int, total: int, what: str = "examples") -> str:
    return f"{count:,} of {total:,} {what} ({100 * count / total:.3g} %)"


def _format(spread: Mapping[str, float]) -> str:
    if spread["min"] == spread["max"]:
        return "all {min:,.6g}".format(**spread)
    return "{min:,.6g} to {max:,.6g}, median {median:,.6g}, 95 % up to {p95:,.6g}".format(**spread)
