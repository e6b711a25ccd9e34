"""An evaluation as one page: tables, figures, and the pairs that the models won and lost most clearly."""

import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

from dspo_jax.evaluation.result import BASE, Evaluation
from dspo_jax.evaluation.tables import NOTE, Table, describe_evaluation, make_tables

_PAIRS = 24

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 0 0 1.5em; }
th, td { text-align: left; vertical-align: top; padding: .35em .9em .35em 0; border-bottom: 1px solid #ddd; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
td small { color: #666; white-space: nowrap; }
img { max-width: 100%; height: auto; }
summary { cursor: pointer; font-weight: 600; margin: .6em 0; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1.2em; }
.pairs figure { margin: 0; }
.pairs div { display: flex; gap: 4px; }
.pairs span { flex: 1 1 0; min-width: 0; font-size: 12px; color: #666; overflow-wrap: anywhere; }
.pairs img { width: 100%; display: block; border: 1px solid #ddd; }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
"""


def make_page(evaluation: Evaluation, out: Path, figures: Sequence[str]) -> str:
    """Makes the page as HTML, without scripts or anything from elsewhere; images are linked from `out`.

    Args:
      evaluation: what is shown.
      out: the folder that the page is written to.
      figures: names of picture files in it.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(', '.join(evaluation.models))} against the base</title>",
        f"<style>{_STYLE}</style></head>",
        "<body>",
        "<h1>Win rates over the base</h1>",
        _table(Table("", [], describe_evaluation(evaluation))),
    ]
    for table in make_tables(evaluation):
        parts += [f"<h2>{escape(table.title[0].upper() + table.title[1:])}</h2>", _table(table)]
    parts.append(f"<p>{escape(NOTE)}</p>")
    parts += [f'<p><img src="{quote(name)}" alt="{escape(Path(name).stem)}"></p>' for name in figures]
    for label in evaluation.models:
        parts.append(f"<h2>{escape(label)} beside the base</h2>")
        for reward in evaluation.rewards:
            parts += _pairs(evaluation, out, label, reward)
    return "\n".join([*parts, "</body>", "</html>"]) + "\n"


def _table(table: Table) -> str:
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in table.heading)
    rows = [heading, *("".join(map(_cell, row)) for row in table.rows)]
    return "<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in rows if row) + "\n</table>"


def _cell(text: str) -> str:
    first, *rest = text.split("\n")
    lines = [escape(first), *(f"<small>{escape(line)}</small>" for line in rest)]
    return f"<td>{'<br>'.join(lines)}</td>"


def _pairs(evaluation: Evaluation, out: Path, label: str, reward: str) -> Iterator[str]:
    """The pairs of one model whose rewards are furthest apart, either way."""
    scores = evaluation.scores[label][reward]
    base = evaluation.scores[BASE][reward][:, : evaluation.seeds]
    difference = scores - base
    for what, sign in (("won", 1), ("lost", -1)):
        order = np.argsort(-sign * difference, axis=None, kind="stable")[:_PAIRS]
        chosen = [np.unravel_index(i, difference.shape) for i in order if sign * difference.flat[i] > 0]
        count = int((sign * difference > 0).sum())
        if not count:
            yield f"<p>{escape(reward)}: none {what}</p>"
            continue
        heading = f"{escape(reward)}: {what} most clearly, {len(chosen)} of {count:,}"
        yield f"<details{' open' if sign > 0 else ''}><summary>{heading}</summary>"
        yield '<div class="pairs">'
        for number, seed in chosen:
            prompt = evaluation.prompts.prompts[number]
            pictures = [] if prompt.image is None else [_picture("from", prompt.image, out)]
            for of, score in ((BASE, base), (label, scores)):
                file = evaluation.images[of].files[number][seed]
                pictures.append(_picture(f"{of} {score[number, seed]:.4g}", file, out))
            yield f"<figure><div>{''.join(pictures)}</div>"
            yield f"<figcaption>{escape(prompt.text)} (prompt {number}, seed {seed})</figcaption></figure>"
        yield "</div></details>"


def _picture(caption: str, file: Path, out: Path) -> str:
    link = quote(Path(os.path.relpath(file, out)).as_posix())
    return f'<span><img loading="lazy" src="{link}" alt="">{escape(caption)}</span>'
