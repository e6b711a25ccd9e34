"""The report of an evaluation: files in its folder, and tables in the terminal."""

from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dspo_jax.evaluation.figures import draw_figures
from dspo_jax.evaluation.page import make_page
from dspo_jax.evaluation.result import Evaluation
from dspo_jax.evaluation.tables import (
    MARKS,
    describe_evaluation,
    list_notes,
    list_scores,
    make_tables,
    rejection_to_csv,
    summarize,
    to_csv,
    to_json,
    to_markdown,
    to_tex,
)
from dspo_jax.evaluation.win_rates import Verdict
from dspo_jax.files import whole, write_text

_STYLES: dict[Verdict, str] = {"better": "bold blue", "worse": "bold dark_orange3"}


def write_report(evaluation: Evaluation, out: Path, *, single_file: bool = False) -> None:
    """Writes scores, tables, figures and index.html; each file appears when it is whole.

    Args:
      evaluation: what is reported.
      out: the folder.
      single_file: whether index.html holds its pictures itself, in place of links to them.
    """
    figures = {f"{name}.png": figure for name, figure in draw_figures(evaluation).items()}
    for name, figure in figures.items():
        with whole(out / name) as partial:
            figure.savefig(partial, format="png")
    texts = {
        "win_rates.md": to_markdown(evaluation),
        "win_rates.csv": to_csv(evaluation),
        "win_rates.json": to_json(evaluation),
        "win_rates.tex": to_tex(evaluation),
        "index.html": make_page(evaluation, out, list(figures), single_file=single_file),
    }
    if any(evaluation.rejection.values()):
        texts["rejection.csv"] = rejection_to_csv(evaluation)
    with whole(out / "scores.parquet") as partial:
        pq.write_table(list_scores(evaluation, out), partial)
    for name, text in texts.items():
        write_text(out / name, text)
    for name in {"rejection.csv", "rejection.png", "wins_by_prompt.png"} - {*texts, *figures}:
        (out / name).unlink(missing_ok=True)  # left by an earlier run with more seeds


def print_report(evaluation: Evaluation, console: Console) -> None:
    """Prints what was compared, the win rates, the mean rewards and what follows from them."""
    for name, value in describe_evaluation(evaluation):
        console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
    for table in make_tables(evaluation)[: 3 if evaluation.people else 2]:
        console.print(f"\n{table.title}", highlight=False, markup=False)
        shown = Table(*map(escape, table.heading))
        for row in table.rows:
            shown.add_row(*map(_style, row))
        console.print(shown)
    for note in list_notes(evaluation):
        console.print(note, highlight=False, markup=False)
    for sentence in summarize(evaluation):
        console.print(sentence, highlight=False, markup=False)


def _style(cell: str) -> str:
    """Returns a cell with rich's markup, its verdict in colour."""
    styles = {MARKS[verdict]: style for verdict, style in _STYLES.items()}
    lines = [(escape(line), styles.get(line)) for line in cell.split("\n")]
    return "\n".join(f"[{style}]{line}[/]" if style else line for line, style in lines)
