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
    NOTE,
    describe_evaluation,
    list_scores,
    make_tables,
    rejection_to_csv,
    to_csv,
    to_json,
    to_markdown,
    to_tex,
)
from dspo_jax.files import whole, write_text


def write_report(evaluation: Evaluation, out: Path) -> None:
    """Writes scores, tables, figures and index.html; each file appears when it is whole."""
    figures = {f"{name}.png": figure for name, figure in draw_figures(evaluation).items()}
    texts = {
        "win_rates.md": to_markdown(evaluation),
        "win_rates.csv": to_csv(evaluation),
        "win_rates.json": to_json(evaluation),
        "win_rates.tex": to_tex(evaluation),
        "index.html": make_page(evaluation, out, list(figures)),
    }
    if any(evaluation.rejection.values()):
        texts["rejection.csv"] = rejection_to_csv(evaluation)
    with whole(out / "scores.parquet") as partial:
        pq.write_table(list_scores(evaluation, out), partial)
    for name, figure in figures.items():
        with whole(out / name) as partial:
            figure.savefig(partial, format="png")
    for name, text in texts.items():
        write_text(out / name, text)
    for name in {"rejection.csv", "rejection.png", "wins_by_prompt.png"} - {*texts, *figures}:
        (out / name).unlink(missing_ok=True)  # left by an earlier run with more seeds


def print_report(evaluation: Evaluation, console: Console) -> None:
    """Prints what was compared, the win rates and the mean rewards."""
    for name, value in describe_evaluation(evaluation):
        console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
    for table in make_tables(evaluation)[:2]:
        console.print(f"\n{table.title}", highlight=False, markup=False)
        shown = Table(*map(escape, table.heading))
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
    console.print(NOTE, highlight=False, markup=False)
