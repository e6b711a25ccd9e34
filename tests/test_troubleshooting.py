"""docs/troubleshooting.md explains messages that the program really prints, and points to what is there."""

import ast
import re
from pathlib import Path

import pytest
from tables import each_row

from dspo_jax.pipelines.families import NETWORKS
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.weights.components import read_models

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GAP = "…"  # stands for a value


def texts(folder):
    """Every string of a folder's code, with the gap in place of what is put into it."""
    for path in {*(ROOT / folder).rglob("*.py")} - {Path(__file__)}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[dsr]", GAP, node.value)


MESSAGES = re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)
SOURCE = "\n".join(texts("dspo_jax"))
# Of other tests; patterns without their backslashes.
ASSERTED = "\n".join(re.sub(r"\\(.)", r"\1", text) for text in texts("tests"))
# Letters of a message in a row that tell it from others.
FEWEST = 10


def shortened(message):
    """Without the gaps at its ends, which in the source may be part of another string."""
    return message.strip(GAP + " ;:")


@each_row("message", MESSAGES)
def test_a_message_is_one_of_the_programs(message):
    assert len(shortened(message)) > 12
    assert shortened(message) in SOURCE


def is_asserted(message):
    """Whether a test asks for a piece of a message."""
    pieces = [piece.strip(" ;:,()") for piece in message.split(GAP)]
    return any(
        piece[start : start + FEWEST] in ASSERTED
        for piece in pieces
        for start in range(len(piece) - FEWEST + 1)
    )


@each_row("message", MESSAGES)
def test_a_message_is_provoked_by_a_test(message):
    assert is_asserted(message)


def test_a_message_that_nobody_prints_is_found():
    assert len(MESSAGES) > 40
    assert shortened("…: this run was started by somebody else; resume") not in SOURCE
    assert not is_asserted("…: this sentence stands nowhere …")


def advice(message):
    """The cause and the remedy that the page gives for a message."""
    (row,) = (row for row in PAGE.splitlines() if row.startswith(f"| `{message}` |"))
    return row.split(" | ", 1)[1]


@each_row(("what", "cause"), [("..", "above"), ("unet", "a single UNet"), ("absent", "no such")])
def test_a_folder_that_is_no_model_is_refused_as_the_page_says(what, cause, tiny_model):
    message = "…: neither a diffusers folder (no model_index.json) nor a training workdir (no checkpoints)"
    with pytest.raises(FileNotFoundError) as caught:
        load_pipeline(tiny_model / what)
    assert str(caught.value).startswith(message.replace(GAP, str(tiny_model / what)))
    assert cause in advice(message)


def test_a_base_that_is_no_model_is_refused_as_the_page_says(tiny_model):
    message = "…: no such file; a model directory is a diffusers folder with model_index.json"
    with pytest.raises(FileNotFoundError) as caught:
        read_models(tiny_model / "unet", NETWORKS)
    assert str(caught.value) == message.replace(GAP, str(tiny_model / "unet" / "model_index.json"))
    assert "--base" in advice(message)


@each_row("page", sorted((ROOT / "docs").glob("*.md")))
def test_links_within_the_documentation_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}#{anchor}"
