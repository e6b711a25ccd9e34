"""Tables, figures and the page of an evaluation whose scores are made up."""

import base64
import csv
import dataclasses
import io
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from image_files import image_bytes
from PIL import Image
from rich.console import Console
from tables import each_row

from dspo_jax.evaluation.figures import COLOURS, draw_figures
from dspo_jax.evaluation.image_folders import Images
from dspo_jax.evaluation.page import make_page
from dspo_jax.evaluation.prompt_sets import PromptSet
from dspo_jax.evaluation.report import print_report, write_report
from dspo_jax.evaluation.result import assess
from dspo_jax.evaluation.tables import to_csv, to_json, to_markdown, to_tex
from dspo_jax.evaluation.win_rates import Estimate
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


def write_pictures(out, prompts):
    for label in ("base", "a & <b>"):
        for i in range(prompts):
            file = out / "images" / label / f"{i:05d}_0.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image_bytes())


def decide(out, *, count=20, counts=((18, 0, 2), (2, 0, 18), (11, 0, 9))):
    """One seed a prompt; each reward with as many prompts won, tied and lost."""
    rewards = [f"r{i}" for i in range(len(counts))]
    evaluation = make(out, prompts=count, seeds=1, base_seeds=1, labels=("m",), rewards=rewards)
    scores = {
        "base": {name: np.zeros((count, 1)) for name in rewards},
        "m": {
            name: np.repeat([1.0, 0.0, -1.0], each)[:, None]
            for name, each in zip(rewards, counts, strict=True)
        },
    }
    return assess(evaluation.prompts, evaluation.images, evaluation.rewards, scores, 1)


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
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_random_pairs_then_the_clearest_then_all_and_escapes_what_it_is_told(tmp_path):
    evaluation = make(tmp_path, prompts=60, labels=("a & <b> 50%20",))
    page = Page(make_page(evaluation, tmp_path, ["win_rates.png"]))
    links = [unquote(link) for link in page.links]
    assert not [link for link in links if link.startswith(("/", "http", "data:"))]
    assert "script" not in page.names
    pairs = links[1:]
    # 12 random ones; of two rewards 12 won and 12 lost; all 120. Each is two pictures.
    assert len(pairs) == 2 * (12 + 2 * 2 * 12 + 120)
    drawn, won, lost, every = pairs[:24], pairs[24:48], pairs[48:72], pairs[-240:]
    assert len(set(drawn)) == 24
    assert drawn != won
    # The last even prompts have won by most, the last odd lost.
    assert won[:4] == [
        *("images/base/00058_0.png", "images/a & <b> 50%20/00058_0.png"),
        *("images/base/00058_1.png", "images/a & <b> 50%20/00058_1.png"),
    ]
    assert lost[0] == "images/base/00059_0.png"
    assert every[::2] == [f"images/base/{i:05d}_{seed}.png" for i in range(60) for seed in range(2)]
    assert "r_1: won most clearly, 12 of 60" in page.texts
    assert "<i>58</i> | 50 % " in page.texts
    assert "(prompt 58, seed 0)" in page.texts
    assert " q|2 0 → 30" in page.texts
    assert "a & <b> 50%20 beside the base" in page.texts
    assert page.texts.index("How this was measured") > page.texts.index("all pairs, 120")


def test_what_is_lost_looks_like_a_loss_everywhere(tmp_path):
    found = decide(tmp_path)
    assert [found.win_rates["m"][f"r{i}"].verdict for i in range(3)] == ["better", "worse", "undecided"]
    page = make_page(found, tmp_path, [])
    for mark in ('"better">↑ better by r0<', '"worse">↓ worse by r1<', '"undecided">undecided by r2<'):
        assert page.count(mark) == 1
    for mark in ('"better">↑ better<', '"worse">↓ worse<', '"undecided">undecided<'):
        assert page.count(mark) == 1
    assert re.search(
        r"\| m \| 90.0 ↑ better .* \| 10.0 ↓ worse .* \| 55.0 undecided .* \|", to_markdown(found)
    )
    assert r"10.0 $\downarrow$ worse" in to_tex(found)
    (bars,) = draw_figures(found)["win_rates"].axes
    colours = [bar.get_facecolor() for bar in bars.patches[:3]]
    assert len(set(colours)) == 3
    assert [text.get_color() for text in bars.texts] == [COLOURS[v] for v in ("better", "worse", "undecided")]
    text = io.StringIO()
    print_report(found, Console(file=text, width=120, force_terminal=True, color_system="256"))
    (cell,) = re.findall(r"(\x1b\[\S*m)↓ worse\x1b", text.getvalue())
    assert cell not in ("\x1b[0m", re.findall(r"(\x1b\[\S*m)↑ better\x1b", text.getvalue())[0])


def test_a_significant_p_with_an_interval_across_one_half_is_undecided(tmp_path):
    evaluation = make(tmp_path, prompts=20, seeds=1, base_seeds=1, rewards=("r",))
    found = evaluation.win_rates["a & <b>"]["r"]
    across, above = dataclasses.replace(found.share, low=0.4, high=0.9), Estimate(0.8, 0.6, 0.9)
    assert dataclasses.replace(found, share=across, p_value=0.01).verdict == "undecided"
    assert dataclasses.replace(found, share=above, p_value=0.06).verdict == "undecided"
    assert dataclasses.replace(found, share=above, p_value=0.01).verdict == "better"


def test_a_single_file_holds_its_pictures_and_figures(tmp_path):
    evaluation = make(tmp_path, prompts=4, seeds=1, base_seeds=1)
    write_pictures(tmp_path, 4)
    write_report(evaluation, tmp_path, single_file=True)
    page = Page((tmp_path / "index.html").read_text())
    assert len(page.links) == 2 + 2 * (
        4 + 2 * (2 + 2) + 4
    )  # figures; random, won and lost by two rewards, all
    for link in page.links:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", link).groups()
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert image.format == kind.upper()
            image.load()


def test_no_report_tells_where_things_lie_on_this_machine(tmp_path):
    evaluation = make(tmp_path / "out")
    at = {"path": "/home/me/models/fine", "models": [{"path": "/home/me/models/fine"}], **HOW}
    cached = "/home/me/.cache/hub/models--org--name/snapshots/1a2b"
    images = {
        "base": dataclasses.replace(evaluation.images["base"], source=cached),
        "m": dataclasses.replace(evaluation.images["a & <b>"], source="/home/me/models/fine", how=at),
    }
    scores = {"base": evaluation.scores["base"], "m": evaluation.scores["a & <b>"]}
    found = assess(evaluation.prompts, images, evaluation.rewards, scores, 2)
    reports = [make_page(found, tmp_path / "out", []), to_markdown(found), to_csv(found), to_json(found)]
    for report in (*reports, to_tex(found).replace(r"\_", "_")):
        assert "/home/me" not in report
        assert "fine" in report
    assert "| base | org/name, ddim" in to_markdown(found)


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
    assert "| a & <b> | 50.0 undecided [33.3, 66.7] 30 won, 0 tied, 30 lost p = 1.000 |" in markdown
    assert r"| model | r_1 | q\|2 |" in markdown
    # Half of the prompts are won by any draw, in the others the first draw loses: 1 or all 4 of them.
    assert r"| a & <b> | r_1 | 2.5 | 1 | 50.0 % |" in markdown
    assert "by category" not in markdown
    assert r"a \& $<$b$>$ & 50.0 undecided [33.3, 66.7] 30 won, 0 tied, 30 lost p = 1.000" in tex
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
    assert "| m | 100.0 ↑ better [100.0, 100.0] 60 won, 0 tied, 0 lost p < 0.001 |" in to_markdown(found)


@each_row("seeds", [1, 2])
def test_figures(tmp_path, seeds):
    evaluation = make(tmp_path, seeds=seeds, base_seeds=5, labels=("m", "a label that is much too long " * 4))
    figures = draw_figures(evaluation)
    boxes = {"wins_by_prompt"} if seeds > 1 else set()
    assert figures.keys() == {"win_rates", "rewards", "rejection"} | boxes
    for figure in figures.values():
        figure.savefig(io.BytesIO())  # warnings of a layout that does not fit are errors
    (bars,) = figures["win_rates"].axes
    # Two rewards of two models: what they won, then the half of their ties.
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([50] * 4 + [0] * 4)
    assert [text.get_text() for text in bars.get_yticklabels()][:1] == ["r_1: m"]
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
    assert re.search(
        r"\| 55\.0 undecided \[[\d., ]+\] 6 won, 10 tied, 4 lost p = 0\.754 \|", to_markdown(found)
    )
    assert "6 won, 10 tied, 4 lost" in make_page(found, tmp_path, [])
    (bars,) = draw_figures(found)["win_rates"].axes
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([30, 25])
    assert [text.get_text() for text in bars.texts] == ["55.0  undecided  (6 won, 10 tied, 4 lost)"]
    (row,) = csv.DictReader(io.StringIO(to_csv(found)))
    assert [row[f"images_{what}"] for what in ("won", "tied", "lost")] == ["6", "10", "4"]


def test_what_an_earlier_report_had_beside_is_removed(tmp_path):
    for name in ("rejection.csv", "rejection.png", "wins_by_prompt.png"):
        (tmp_path / name).touch()
    write_pictures(tmp_path, 4)
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
