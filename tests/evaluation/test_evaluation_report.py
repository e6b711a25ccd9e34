"""Tables, figures and the page of an evaluation whose scores are made up."""

import csv
import io
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from image_files import image_bytes
from rich.console import Console
from tables import each_row

from dspo_jax.evaluation.figures import draw_figures
from dspo_jax.evaluation.image_folders import Images
from dspo_jax.evaluation.page import make_page
from dspo_jax.evaluation.prompt_sets import PromptSet
from dspo_jax.evaluation.report import print_report, write_report
from dspo_jax.evaluation.result import assess
from dspo_jax.evaluation.tables import to_csv, to_markdown, to_tex
from dspo_jax.sampling.prompts import Prompt

HOW = {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5, "negative_prompt": None, "strength": 1.0}
HOW |= {"eta": 0.5, "guidance_interval": (0, 1000), "size": None, "step": None}


def make(out, *, prompts=30, seeds=2, base_seeds=2, image=None, labels=("a & <b>",), rewards=("r_1", "q|2")):
    """Scores of the base are 0, of the models 1, -1, 2, -2, ... over prompts, the same for every seed."""
    texts = tuple(Prompt(f"<i>{i}</i> | 50 %", image) for i in range(prompts))
    images, scores = {}, {}
    for label in ("base", *labels):
        count = base_seeds if label == "base" else seeds
        files = [[out / "images" / label / f"{i:05d}_{s}.png" for s in range(count)] for i in range(prompts)]
        images[label] = Images(f"models/{label}", HOW, files)
        signs = np.where(np.arange(prompts) % 2, -1.0, 1.0) * (1 + np.arange(prompts) // 2)
        values = np.zeros((prompts, count)) if label == "base" else np.tile(signs[:, None], count)
        scores[label] = dict.fromkeys(rewards, values.astype(np.float32))
    return assess(PromptSet("made up", texts), images, dict.fromkeys(rewards, "v1"), scores, seeds)


class Page(HTMLParser):
    """Links to pictures, texts, and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.links, self.texts, self.open, self.names = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_the_clearest_pairs_first_and_escapes_what_it_is_told(tmp_path):
    evaluation = make(tmp_path, prompts=60, labels=("a & <b> 50%20",))
    page = Page(make_page(evaluation, tmp_path, ["win_rates.png"]))
    links = [unquote(link) for link in page.links]
    assert not [link for link in links if link.startswith(("/", "http"))]
    assert "script" not in page.names
    pairs = links[1:]
    # Two rewards, won and lost, 24 pairs of two; the last even prompts have won by most, the last odd lost.
    assert len(pairs) == 2 * 2 * 24 * 2
    assert pairs[:4] == [
        *("images/base/00058_0.png", "images/a & <b> 50%20/00058_0.png"),
        *("images/base/00058_1.png", "images/a & <b> 50%20/00058_1.png"),
    ]
    assert pairs[48] == "images/base/00059_0.png"
    assert "r_1: won most clearly, 24 of 60" in page.texts
    assert "<i>58</i> | 50 % (prompt 58, seed 0)" in page.texts
    assert "a & <b> 50%20 30" in page.texts
    assert "a & <b> 50%20 beside the base" in page.texts


def test_the_page_of_edits_shows_what_they_start_from(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "from here.png").write_bytes(b"1")
    page = Page(make_page(make(out, prompts=1, image=tmp_path / "from here.png"), out, []))
    assert [unquote(link) for link in page.links[:3]] == [
        "../from here.png",
        "images/base/00000_0.png",
        "images/a & <b>/00000_0.png",
    ]
    assert "r_1: none lost" in page.texts


def test_the_tables_say_what_they_are_of(tmp_path):
    evaluation = make(tmp_path, base_seeds=4)
    about = [evaluation.prompts.sha256, "made up", "30", "ddim", "50 steps", "guidance 7.5", "v1", "4 seeds"]
    markdown, tex = to_markdown(evaluation), to_tex(evaluation)
    assert [text for text in about if text not in markdown] == []
    assert [text for text in about if text not in tex] == []
    assert "| a & <b> | 50.0 [33.3, 66.7] 30 won, 0 tied, 30 lost p = 1.000 |" in markdown
    assert r"| model | r_1 | q\|2 |" in markdown
    # Half of the prompts are won by any draw, in the others the first draw loses: 1 or all 4 of them.
    assert r"| a & <b> | r_1 | 2.5 | 1 | 50.0 % |" in markdown
    assert "by category" not in markdown
    assert r"a \& $<$b$>$ & 50.0 [33.3, 66.7] 30 won, 0 tied, 30 lost p = 1.000" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\bottomrule") == 2
    rows = list(csv.DictReader(io.StringIO(to_csv(evaluation))))
    assert [row["reward"] for row in rows] == ["r_1", "q|2"]
    assert rows[0]["model"] == "a & <b>"
    assert (rows[0]["win_rate_seed_1"], rows[0]["prompts_won"], rows[0]["sampler"]) == ("0.5", "15", "ddim")
    drawn = ("steps", "guidance_scale", "eta", "strength")
    assert [rows[0][name] for name in drawn] == ["50", "7.5", "0.5", "1.0"]


def test_a_wide_margin_is_below_a_thousandth(tmp_path):
    evaluation = make(tmp_path)
    scores = {
        "base": evaluation.scores["base"],
        "m": {name: scores + 1 for name, scores in evaluation.scores["base"].items()},
    }
    images = {"base": evaluation.images["base"], "m": evaluation.images["a & <b>"]}
    found = assess(evaluation.prompts, images, evaluation.rewards, scores, 2)
    assert "| m | 100.0 [100.0, 100.0] 60 won, 0 tied, 0 lost p < 0.001 |" in to_markdown(found)


@each_row("seeds", [1, 2])
def test_figures(tmp_path, seeds):
    evaluation = make(tmp_path, seeds=seeds, base_seeds=5, labels=("m", "a label that is much too long " * 4))
    figures = draw_figures(evaluation)
    boxes = {"wins_by_prompt"} if seeds > 1 else set()
    assert figures.keys() == {"win_rates", "rewards", "rejection"} | boxes
    for figure in figures.values():
        figure.savefig(io.BytesIO())  # warnings of a layout that does not fit are errors
    (bars,) = figures["win_rates"].axes
    # A model's two rewards: what it won, then the half of its ties.
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([50, 50, 0, 0] * 2)
    assert [text.get_text() for text in figures["rewards"].axes[0].get_yticklabels()][:2] == ["base", "m"]
    curve = figures["rejection"].axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(curve, [50] * 5)
    assert draw_figures(make(tmp_path, seeds=2)).keys() == {"win_rates", "wins_by_prompt", "rewards"}


def test_a_bound_that_rounding_puts_past_the_mean_is_drawn(tmp_path):
    evaluation = make(tmp_path, prompts=20, seeds=3, base_seeds=3)
    scores = {"base": np.zeros((20, 3)), "a & <b>": np.tile([1.0, -1.0, -1.0], (20, 1))}
    both = {label: dict.fromkeys(evaluation.rewards, values) for label, values in scores.items()}
    found = assess(evaluation.prompts, evaluation.images, evaluation.rewards, both, 3)
    (bars,) = draw_figures(found)["win_rates"].axes
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([100 / 3, 100 / 3, 0, 0])


def test_ties_stand_in_the_table_the_figure_and_the_csv(tmp_path):
    evaluation = make(tmp_path, prompts=20, seeds=1, base_seeds=1, rewards=("r",))
    scores = {
        "base": {"r": np.zeros((20, 1))},
        "a & <b>": {"r": np.repeat([1.0, 0.0, -1.0], [6, 10, 4])[:, None]},
    }
    found = assess(evaluation.prompts, evaluation.images, evaluation.rewards, scores, 1)
    assert re.search(r"\| 55\.0 \[[\d., ]+\] 6 won, 10 tied, 4 lost p = 0\.754 \|", to_markdown(found))
    assert "6 won, 10 tied, 4 lost" in make_page(found, tmp_path, [])
    (bars,) = draw_figures(found)["win_rates"].axes
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([30, 25])
    assert [text.get_text() for text in bars.texts] == ["55.0  (6 won, 10 tied, 4 lost)"]
    (row,) = csv.DictReader(io.StringIO(to_csv(found)))
    assert [row[f"images_{what}"] for what in ("won", "tied", "lost")] == ["6", "10", "4"]


def test_what_an_earlier_report_had_beside_is_removed(tmp_path):
    for name in ("rejection.csv", "rejection.png", "wins_by_prompt.png"):
        (tmp_path / name).touch()
    for label in ("base", "a & <b>"):
        for i in range(4):
            file = tmp_path / "images" / label / f"{i:05d}_0.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image_bytes())
    write_report(make(tmp_path, prompts=4, seeds=1, base_seeds=1), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "win_rates.png" in names
    assert not names & {"rejection.csv", "rejection.png", "wins_by_prompt.png"}


def test_the_terminal_shows_names_as_they_are(tmp_path):
    text = io.StringIO()
    print_report(make(tmp_path, labels=("[bold]",), rewards=("[red]x",)), Console(file=text, width=120))
    assert "win rate over the base, %, 30 prompts, 2 seeds" in text.getvalue()
    assert "[bold]" in text.getvalue()
    assert "[red]x" in text.getvalue()
    assert "[33.3, 66.7]" in text.getvalue()
