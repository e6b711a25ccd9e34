"""The demo's notebook: every cell runs, from its own folder, as a kernel would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "emoji" / "demo.ipynb"

# Runs the code cells of a notebook in one namespace, each as IPython does: its last expression is shown.
RUN_CELLS = """
import ast, json, sys

namespace = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1]))["cells"]):
    if cell["cell_type"] != "code":
        continue
    *body, last = ast.parse("".join(cell["source"])).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), f"cell {number}", "exec"), namespace)
    if last is not None:
        shown = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace)
        print(f"cell {number}:", getattr(shown, "size", shown))
"""


def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_what_is_committed_is_small_and_ran_without_an_error():
    assert NOTEBOOK.stat().st_size < 500_000
    outputs = [output for cell in cells() if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    assert sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in outputs) == 3
    text = "".join("".join(output.get("text", [])) for output in outputs)
    assert "held-out accuracy 0.500" in text
    assert str(NOTEBOOK.parents[2]) not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    environment = {"DSPO_NOTEBOOK_QUICK": "1", "DSPO_NOTEBOOK_OUT": str(tmp_path / "out"), "XLA_FLAGS": ""}
    result = subprocess.run(
        [sys.executable, "-c", RUN_CELLS, NOTEBOOK.name],
        cwd=NOTEBOOK.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "step 0: held-out accuracy 0.500" in result.stdout
    assert ": step 2 of 2\n" in result.stdout
    assert "model_index.json" in result.stdout
    for name in ("samples/contact_sheet.png", "evaluation/index.html", "exported/unet/config.json"):
        assert (tmp_path / "out" / name).is_file()
