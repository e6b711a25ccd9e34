"""What docs/security.md promises of the code: nothing that is read as data is run."""

import ast
from pathlib import Path

from tables import each_row

ROOT = Path(__file__).parents[1]
RUNS_CODE = {"eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "os.system", "yaml.load"}
# A call of one of these is safe with this argument only.
NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def unsafe_calls(source):
    """Calls in a source text that could run what they read, as text."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if name in NEEDED:
            argument, value = NEEDED[name]
            if given.get(argument) is not value:
                yield ast.unparse(node)
        elif name in RUNS_CODE or "trust_remote_code" in given or given.get("shell"):
            yield ast.unparse(node)


@each_row("folder", ["dspo_jax", "configs", "examples", "benchmarks"])
def test_nothing_that_is_read_is_run(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    found = [
        f"{file.name}: {call}" for file in files for call in unsafe_calls(file.read_text(encoding="utf-8"))
    ]
    assert found == []


@each_row(
    "line",
    [
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "pickle.load(file)",
        "exec(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_an_unsafe_call_is_found(line):
    assert list(unsafe_calls(line)) == [line]


def test_the_safe_forms_pass():
    safe = "np.load(path, allow_pickle=False); torch.load(path, weights_only=True); model.eval()"
    assert not list(unsafe_calls(safe))
