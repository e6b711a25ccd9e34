"""docs/troubleshooting.md explains messages that the program really prints, and points to what is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GAP = "…"  # stands for a value


def texts():
    """Every string of the package, with the gap in place of what is put into it."""
    for path in (ROOT / "dspo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[dsr]", GAP, node.value)


MESSAGES = re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)
SOURCE = "\n".join(texts())


def shortened(message):
    """Without the gaps at its ends, which in the source may be part of another string."""
    return message.strip(GAP + " ;:")


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_programs(message):
    assert len(shortened(message)) > 12
    assert shortened(message) in SOURCE


def test_a_message_that_nobody_prints_is_found():
    assert len(MESSAGES) > 40
    assert shortened("…: this run was started by somebody else; resume") not in SOURCE


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_within_the_documentation_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}#{anchor}"
