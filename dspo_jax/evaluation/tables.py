"""An evaluation as tables: Markdown, CSV, JSON, LaTeX, and the scores of every image."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from dspo_jax.evaluation.people import PeopleWinRate
from dspo_jax.evaluation.result import BASE, Evaluation, count_categories
from dspo_jax.evaluation.win_rates import Estimate, Rejection, Verdict, WinRate
from dspo_jax.hub_cache import hide_folders
from dspo_jax.json_files import JsonObject

# Columns of how images were drawn.
_DRAWING = ("sampler", "steps", "guidance_scale", "eta", "strength")
# The widest guidance interval, which is none, as commands and as code write it.
_EVERYWHERE = ([0, 1000], [0, 10**6])
MARKS: dict[Verdict, str] = {"better": "↑ better", "worse": "↓ worse", "undecided": "undecided"}
"""Words for a verdict, as a line of a cell."""
PEOPLE_NOTE = (
    "people: votes in place of images, and the interval is over prompts and people; alpha: Krippendorff's, "
    "of their agreement; same answer again: pairs that were shown twice; a reward agrees where it scores the "
    "image higher that a vote is for"
)
NOTE = (
    "won, tied, lost: images, a tie counts one half; [ ]: 95 % bootstrap interval over prompts; "
    "p: sign test over prompts, two-sided; ↑ better, ↓ worse: the interval is above or below 50 %, "
    "and p < 0.05"
)


class Table(NamedTuple):
    """A table as people read it; a cell may have several lines."""

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]


def list_notes(evaluation: Evaluation) -> list[str]:
    """Explains the tables of win rates."""
    return [NOTE, PEOPLE_NOTE] if evaluation.people else [NOTE]


def list_verdicts(win_rates: Mapping[str, WinRate | PeopleWinRate]) -> list[tuple[Verdict, str]]:
    """Lists by whom a model is found better or worse than the base: (verdict, "↑ better by r, s")."""
    by = {
        verdict: [name for name, found in win_rates.items() if found.verdict == verdict] for verdict in MARKS
    }
    return [(verdict, f"{MARKS[verdict]} by {', '.join(names)}") for verdict, names in by.items() if names]


def summarize(evaluation: Evaluation) -> list[str]:
    """Says in a line for each model which rewards and people find it better or worse than the base."""
    return [
        f"{label} against the base: {'; '.join(text for _, text in list_verdicts(evaluation.judged(label)))}"
        for label in evaluation.models
    ]


def describe_evaluation(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Lists the conditions of an evaluation, such as prompts, seeds and settings: (name, value)."""
    prompts, seeds = evaluation.prompts, evaluation.seeds
    lines = [
        ("prompts", f"{prompts.name}: {len(prompts.prompts):,}, sha256 {prompts.sha256}"),
        ("seeds", f"{seeds}: 0 to {seeds - 1}" if seeds > 1 else "1: 0"),
    ]
    for label, images in evaluation.images.items():
        more = ""
        if len(images.files[0]) > seeds:
            more = f"; {len(images.files[0])} seeds for rejection sampling"
        lines.append((label, f"{hide_folders(images.source)}{_describe_drawing(images.how)}{more}"))
    return lines + [(f"reward {name}", version) for name, version in evaluation.rewards.items()]


def _describe_drawing(how: JsonObject) -> str:
    """Lists the settings that images were drawn with: the main ones, and others that are not the defaults."""
    if not how:
        return ", images made elsewhere"
    steps = f"{how['steps']} step{'s' * (how['steps'] > 1)}"
    parts = [how["sampler"], steps, f"guidance {how['guidance_scale']:g}"]
    if how.get("step") is not None:
        parts.insert(0, f"checkpoint {how['step']}")
    if list(how["guidance_interval"]) not in _EVERYWHERE:
        parts.append("guided at timesteps {} to {}".format(*how["guidance_interval"]))
    if how.get("guidance_rescale"):
        parts.append(f"guidance rescale {how['guidance_rescale']:g}")
    if skipped := how.get("skip_layer_guidance"):
        layers = ", ".join(map(str, skipped["layers"]))
        within = f"{skipped['start']:g} to {skipped['stop']:g}"
        parts.append(f"guided by {skipped['scale']:g} from without blocks {layers} at shares {within}")
    if how["negative_prompt"] is not None:
        parts.append(f"negative prompt {how['negative_prompt']!r}")
    if how.get("eta"):
        parts.append(f"eta {how['eta']:g}")
    if how.get("max_chunks", 1) > 1:
        parts.append(f"prompts of up to {how['max_chunks']} chunks")
    if how.get("clip_skip", 1) > 1:
        parts.append(f"clip skip {how['clip_skip']}")
    if how.get("max_sequence_length") is not None:
        parts.append(f"T5 tokens {how['max_sequence_length']}")
    if how["strength"] != 1:
        parts.append(f"strength {how['strength']:g}")
    if how["size"]:
        parts.append("{1} x {0} pixels".format(*how["size"]))
    return ", " + ", ".join(parts)


def make_tables(evaluation: Evaluation) -> list[Table]:
    """Makes the tables: win rates, mean rewards, and if there are any, categories and rejection sampling."""
    names, win_rates = list(evaluation.rewards), evaluation.win_rates
    count, seeds = len(evaluation.prompts.prompts), evaluation.seeds
    size = f"{count:,} prompt{'s' * (count > 1)}, {seeds} seed{'s' * (seeds > 1)}"
    tables = [
        Table(
            f"win rate over the base, %, {size}",
            ["model", *evaluation.judges],
            [
                [label, *(_win_rate(found.get(name)) for name in evaluation.judges)]
                for label in evaluation.models
                for found in [evaluation.judged(label)]
            ],
        )
    ]
    first = win_rates[evaluation.models[0]]
    means = [[BASE, *(_estimate(first[name].base_mean_reward) for name in names)]]
    means += [[label, *map(_mean_reward, of_model.values())] for label, of_model in win_rates.items()]
    tables.append(Table(f"mean reward, {size}", ["model", *names], means))
    if evaluation.people:
        tables.append(_people_table(evaluation))
    counts = count_categories(evaluation.prompts)
    for label, of_model in evaluation.by_category.items():
        rows = [
            [category or "none", f"{count:,}", *(_win_rate(of_model[name][category]) for name in names)]
            for category, count in counts.items()
        ]
        if rows:
            tables.append(Table(f"win rate of {label} by category, %", ["category", "prompts", *names], rows))
    rows = [
        [
            label,
            name,
            f"{found.mean_draws:.1f}",
            f"{found.median_draws}",
            f"{100 * found.never:.1f} %",
            count_images(found),
        ]
        for label, of_model in evaluation.rejection.items()
        for name, found in of_model.items()
    ]
    if rows:
        draws = len(evaluation.images[BASE].files[0])
        heading = ["model", "reward", "mean", "median", f"not in {draws}", f"by the best of {draws}"]
        tables.append(Table("draws of the base until one scores higher than the model's", heading, rows))
    return tables


def _people_table(evaluation: Evaluation) -> Table:
    """Makes the table of how many people said what, and with whom they agree."""
    rows = []
    for question, answers in evaluation.people.items():
        again = f"{answers.consistent:,} of {answers.repeated:,}"
        row = [question, f"{answers.votes:,}", f"{answers.people:,}", f"{answers.prompts:,}", again]
        row.append("none" if answers.alpha is None else f"{answers.alpha:.2f}")
        for found in answers.agreement.values():
            row.append("none" if found is None else f"{100 * found.value:.1f}\n{_interval(found)}")
        rows.append(row)
    agreed = [f"{name} agrees, %" for name in evaluation.rewards]
    heading = ["question", "votes", "people", "prompts", "same answer again", "alpha", *agreed]
    return Table("people", heading, rows)


def _interval(share: Estimate) -> str:
    return f"[{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _win_rate(found: WinRate | PeopleWinRate | None) -> str:
    if found is None:
        return "no votes"
    share = found.share
    p = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
    counts = count_images(found)
    return "\n".join([f"{100 * share.value:.1f}", MARKS[found.verdict], _interval(share), counts, p])


def _mean_reward(found: WinRate) -> str:
    return f"{_estimate(found.mean_reward)}\n{count_images(found)}"


def count_images(found: WinRate | PeopleWinRate | Rejection) -> str:
    """Says how many images (or votes) won, tied and lost: "56 won, 118 tied, 18 lost"."""
    return f"{found.images_won:,} won, {found.images_tied:,} tied, {found.images_lost:,} lost"


def _estimate(mean: Estimate) -> str:
    return f"{mean.value:#.4g}\n[{mean.low:#.4g}, {mean.high:#.4g}]"


def to_markdown(evaluation: Evaluation) -> str:
    """Formats all tables as Markdown, above the conditions of the evaluation."""
    sections = ["# Win rates", *summarize(evaluation)]
    for table in make_tables(evaluation):
        sections += [f"## {table.title[0].upper()}{table.title[1:]}", _markdown(table)]
    about = Table("", ["", ""], describe_evaluation(evaluation))
    return (
        "\n\n".join([*sections, *list_notes(evaluation), "## How this was measured", _markdown(about)]) + "\n"
    )


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(table.heading), "|" + "---|" * len(table.heading), *map(line, table.rows)])


_TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": "$<$",
    ">": "$>$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "\n": " ",
}


def to_tex(evaluation: Evaluation) -> str:
    """Returns the tables of win rates and of mean rewards, for a document with booktabs."""
    about = "; ".join(f"{name}: {value}" for name, value in describe_evaluation(evaluation))
    tables = []
    for table in make_tables(evaluation)[:2]:
        lines = [
            r"\begin{table}",
            rf"\caption{{{_tex(table.title)}. {_tex(about)}. {_tex('; '.join(list_notes(evaluation)))}.}}",
            rf"\begin{{tabular}}{{{'l' * len(table.heading)}}}",
            r"\toprule",
            " & ".join(map(_tex, table.heading)) + r" \\",
            r"\midrule",
            *(" & ".join(map(_tex, row)) + r" \\" for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def to_csv(evaluation: Evaluation) -> str:
    """Formats a CSV line for each model and judge, with the conditions of the evaluation.

    A question to people is a judge beside the rewards: its images won, tied and lost are votes, and it has no
    version, mean or win rate of a seed.
    """
    rows: list[dict[str, object]] = []
    for label in evaluation.win_rates:
        images = evaluation.images[label]
        for name, found in evaluation.judged(label).items():
            means: dict[str, float] = {}
            of_seeds: dict[str, float] = {}
            if isinstance(found, WinRate):
                means = _flatten("mean_reward", found.mean_reward)
                means |= _flatten("base_mean_reward", found.base_mean_reward)
                of_seeds = {f"win_rate_seed_{seed}": share for seed, share in enumerate(found.per_seed)}
            row: dict[str, object] = {
                "model": label,
                "reward": name,
                "reward_version": evaluation.rewards.get(name),
                **_flatten("win_rate", found.share),
                "p_value": found.p_value,
                **{f"images_{what}": getattr(found, f"images_{what}") for what in ("won", "tied", "lost")},
                **{f"prompts_{what}": getattr(found, what) for what in ("won", "lost", "tied")},
                **means,
                "prompts": evaluation.prompts.name,
                "num_prompts": len(evaluation.prompts.prompts),
                "prompts_sha256": evaluation.prompts.sha256,
                "source": hide_folders(images.source),
                **{key: images.how.get(key) for key in _DRAWING},
                **of_seeds,
            }
            rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")  # a reward's, which has all columns
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flatten(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def to_json(evaluation: Evaluation) -> str:
    """Formats every number as JSON, with those of each seed and of each category."""
    content = {
        "prompts": {
            "name": evaluation.prompts.name,
            "count": len(evaluation.prompts.prompts),
            "sha256": evaluation.prompts.sha256,
        },
        "seeds": evaluation.seeds,
        "images": {
            label: hide_folders({"source": images.source, "seeds": len(images.files[0]), "how": images.how})
            for label, images in evaluation.images.items()
        },
        "rewards": evaluation.rewards,
        "win_rates": evaluation.win_rates,
        "by_category": evaluation.by_category,
        "rejection": evaluation.rejection,
        "people": evaluation.people,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> object:
    return value.tolist() if hasattr(value, "tolist") else dataclasses.asdict(value)


def rejection_to_csv(evaluation: Evaluation) -> str:
    """Returns the win rate of the best of n draws of the base against one image of the model, for each n."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "reward", "draws", "win_rate"])
    for label, of_model in evaluation.rejection.items():
        for name, found in of_model.items():
            writer.writerows([label, name, n, share] for n, share in enumerate(found.win_rate.tolist(), 1))
    return text.getvalue()


def list_scores(evaluation: Evaluation, out: Path) -> pa.Table:
    """Returns a row for each image, with a column for each reward; files are relative to `out`."""
    rows = [
        (label, number, seed, prompt.text, prompt.category, os.path.relpath(file, out))
        for label, images in evaluation.images.items()
        for number, prompt in enumerate(evaluation.prompts.prompts)
        for seed, file in enumerate(images.files[number])
    ]
    columns = [pa.array(column) for column in zip(*rows, strict=True)]
    for name in evaluation.rewards:
        scores = [evaluation.scores[label][name].ravel().tolist() for label in evaluation.images]
        columns.append(pa.array([score for part in scores for score in part], pa.float32()))
    names = ["model", "prompt_index", "seed", "prompt", "category", "file"]
    return pa.Table.from_arrays(columns, [*names, *evaluation.rewards])
