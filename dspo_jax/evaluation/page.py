"""An evaluation as one page: the result, pairs of pictures, tables, figures, and how it was measured."""

import base64
import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from dspo_jax.evaluation.figures import COLOURS
from dspo_jax.evaluation.result import BASE, Evaluation
from dspo_jax.evaluation.tables import (
    MARKS,
    Table,
    describe_evaluation,
    list_notes,
    list_verdicts,
    make_tables,
)
from dspo_jax.rewards.scores import read_image

_PAIRS = 12  # random ones, and of each kind of extreme
_JPEG_QUALITY = 90
_HINT = "A click on a pair enlarges it, another closes it. Below a pair: rewards, base → model."

_VERDICTS = {mark: verdict for verdict, mark in MARKS.items()}
_COLOURS = "".join(f"\n.{verdict} {{ color: {colour}; }}" for verdict, colour in COLOURS.items())
_STYLE = """
.better, .worse { font-weight: 600; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 1160px; margin: 2em auto; padding: 0 1em; }
h2 { margin-top: 2em; }
.summary { font-size: 18px; margin: .3em 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 0 0 1em; }
th, td { text-align: left; vertical-align: top; padding: .35em 1.4em .35em 0; border-bottom: 1px solid #ddd; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 7em; }
td small, .note { color: #666; }
td small { white-space: nowrap; }
img { max-width: 100%; height: auto; }
summary { cursor: pointer; font-weight: 600; margin: .8em 0; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1.4em; }
.pairs figure { margin: 0; }
.pairs input { position: absolute; opacity: 0; }
.pictures { display: flex; gap: 4px; cursor: zoom-in; }
.pictures > span { flex: 1 1 0; min-width: 0; font-size: 12px; color: #666; overflow-wrap: anywhere; }
.pictures img { width: 100%; display: block; border: 1px solid #ddd; }
input:focus-visible + .pictures { outline: 3px solid #888; }
input:checked + .pictures { position: fixed; inset: 0; z-index: 1; padding: 2vh 2vw; gap: 1vw; }
input:checked + .pictures { background: #fff; align-items: center; cursor: zoom-out; }
input:checked + .pictures > span { font-size: 16px; }
input:checked + .pictures img { height: 86vh; object-fit: contain; border: 0; }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
figcaption small { color: #666; }
"""

Address = Callable[[Path], str]
"""Address of a picture on the page, by its file: a link, or a data: URI that holds it."""


def make_page(evaluation: Evaluation, out: Path, figures: Sequence[str], *, single_file: bool = False) -> str:
    """Makes the page as HTML, without scripts or anything from elsewhere.

    Args:
      evaluation: what is shown.
      out: the folder that the page is written to.
      figures: names of picture files in it.
      single_file: whether figures and pictures (these as JPEG) stand in the page itself; else they are links.

    Raises:
      UserError: a picture that cannot be read, for a single file.
    """
    address: Address = functools.cache(_embed_picture) if single_file else functools.partial(_link, out)
    embed = _embed_figure if single_file else functools.partial(_link, out)
    images = {
        name: f'<p><img src="{embed(out / name)}" alt="{escape(Path(name).stem)}"></p>' for name in figures
    }
    title = f"{', '.join(evaluation.models)} against the base"
    first, *others = make_tables(evaluation)
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title>",
        f"<style>{_COLOURS}{_STYLE}</style></head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        *_summary(evaluation),
        *_section(first),
        *(f'<p class="note">{escape(note)}</p>' for note in list_notes(evaluation)),
        *(images.pop(name) for name in figures if name == "win_rates.png"),
    ]
    for label in evaluation.models:
        parts += _compare(evaluation, label, address)
    for table in others:
        parts += _section(table)
    if images:
        parts += ["<h2>Figures</h2>", *images.values()]
    parts += _section(Table("how this was measured", [], describe_evaluation(evaluation)))
    return "\n".join([*parts, "</body>", "</html>"]) + "\n"


def _link(out: Path, file: Path) -> str:
    return quote(Path(os.path.relpath(file, out)).as_posix())


def _embed_figure(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _embed_picture(file: Path) -> str:
    """Returns a picture as a data: URI, in JPEG, as a page of large PNG files could not be opened."""
    jpeg = io.BytesIO()
    Image.fromarray(read_image(file)).save(jpeg, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def _summary(evaluation: Evaluation) -> Iterator[str]:
    for label in evaluation.models:
        parts = [
            f'<span class="{verdict}">{escape(text)}</span>'
            for verdict, text in list_verdicts(evaluation.judged(label))
        ]
        yield f'<p class="summary">{escape(label)}: {"; ".join(parts)}</p>'


def _section(table: Table) -> list[str]:
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in table.heading)
    rows = [heading, *("".join(map(_cell, row)) for row in table.rows)]
    lines = [f"<tr>{row}</tr>" for row in rows if row]
    title = escape(table.title[0].upper() + table.title[1:])
    return [f"<h2>{title}</h2>", '<div class="scroll"><table>', *lines, "</table></div>"]


def _cell(text: str) -> str:
    first, *rest = text.split("\n")
    lines = [f"<span>{escape(first)}</span>"]
    for line in rest:
        verdict = _VERDICTS.get(line)
        lines.append(
            f'<span class="{verdict}">{line}</span>' if verdict else f"<small>{escape(line)}</small>"
        )
    return f"<td>{'<br>'.join(lines)}</td>"


def _compare(evaluation: Evaluation, label: str, address: Address) -> Iterator[str]:
    """Pictures of one model beside the base's: random pairs, those furthest apart either way, and all."""
    yield f"<h2>{escape(label)} beside the base</h2>"
    yield f'<p class="note">{_HINT}</p>'
    count = len(evaluation.prompts.prompts) * evaluation.seeds
    show = functools.partial(_show_pairs, evaluation, label, address)
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:_PAIRS])
    yield from show(f"random pairs, {len(chosen)} of {count:,}", chosen, opened=True)
    for reward in evaluation.rewards:
        difference = _difference(evaluation, label, reward).ravel()
        for what, sign in (("won", 1), ("lost", -1)):
            order = np.argsort(-sign * difference, kind="stable")
            chosen = order[sign * difference[order] > 0]
            heading = f"{reward}: {what} most clearly, {min(len(chosen), _PAIRS)} of {len(chosen):,}"
            yield from show(heading if len(chosen) else f"{reward}: none {what}", chosen[:_PAIRS])
    yield from show(f"all pairs, {count:,}", np.arange(count))


def _difference(evaluation: Evaluation, label: str, reward: str) -> np.ndarray:
    """Returns rewards of a model less the base's: [prompts, seeds]."""
    return evaluation.scores[label][reward] - evaluation.scores[BASE][reward][:, : evaluation.seeds]


def _show_pairs(
    evaluation: Evaluation,
    label: str,
    address: Address,
    heading: str,
    pairs: np.ndarray,
    *,
    opened: bool = False,
) -> Iterator[str]:
    """Shows pairs, each by its number: that of the prompt times the number of seeds, and its seed."""
    if not len(pairs):
        yield f"<p>{escape(heading)}</p>"
        return
    yield f"<details{' open' if opened else ''}><summary>{escape(heading)}</summary>"
    yield '<div class="pairs">'
    for pair in pairs.tolist():
        number, seed = divmod(pair, evaluation.seeds)
        prompt = evaluation.prompts.prompts[number]
        pictures = [] if prompt.image is None else [_picture("from", prompt.image, address)]
        for of in (BASE, label):
            pictures.append(_picture(of, evaluation.images[of].files[number][seed], address))
        scores = "<br>".join(_list_scores(evaluation, label, number, seed))
        yield f'<figure><label><input type="checkbox"><span class="pictures">{"".join(pictures)}</span>'
        yield f"</label><figcaption>{escape(prompt.text)} <small>(prompt {number}, seed {seed})</small><br>"
        yield f"{scores}</figcaption></figure>"
    yield "</div></details>"


def _list_scores(evaluation: Evaluation, label: str, number: int, seed: int) -> Iterator[str]:
    """Rewards of a pair, with an arrow where they differ."""
    for reward in evaluation.rewards:
        base, model = (float(evaluation.scores[of][reward][number, seed]) for of in (BASE, label))
        arrow, verdict = ("=", "undecided")
        if model != base:
            arrow, verdict = ("↑", "better") if model > base else ("↓", "worse")
        yield f'<span class="{verdict}">{arrow}</span> {escape(reward)} {base:.4g} → {model:.4g}'


def _picture(caption: str, file: Path, address: Address) -> str:
    return f'<span><img loading="lazy" src="{address(file)}" alt="">{escape(caption)}</span>'
