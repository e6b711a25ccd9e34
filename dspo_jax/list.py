"""Lists what there is to choose from: recipes, objectives, samplers, rewards, prompt sets, published models.

    python -m dspo_jax.list --only=objectives

Names are given to other commands as the headings say.
"""

import ast
from collections.abc import Iterator, Sequence

from absl import flags

from dspo_jax import cli, recipes

KINDS = ("recipes", "encode_recipes", "objectives", "samplers", "rewards", "prompt_sets", "published")
_HEADINGS = {
    "recipes": "recipes, for train and plan --config",
    "encode_recipes": "recipes, for encode --config",
    "objectives": "objectives, for --config.objective.name (formulas: docs/objectives.md)",
    "samplers": "samplers, for --sampler, and the diffusers scheduler each is equal to",
    "rewards": "rewards, for --reward and --rewards; one of your own is FILE.py:FUNCTION",
    "prompt_sets": "prompt sets, for evaluate --prompts NAME=FILE, and where to get them",
    "published": "published architectures, for --published",
}


def entries(kind: str) -> Iterator[tuple[str, str]]:
    """Yields name and description of everything of one of `KINDS`."""
    if kind in ("recipes", "encode_recipes"):
        folder = recipes.ROOT / ("configs" if kind == "recipes" else "configs/encode")
        for path in sorted(folder.glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            if "get_config" in functions and path.name != "common.py":
                summary = (ast.get_docstring(tree) or "").splitlines()[0]
                yield path.relative_to(recipes.ROOT).as_posix(), summary
    elif kind == "objectives":
        from dspo_jax.objectives import OBJECTIVES

        for name, objective in OBJECTIVES.items():
            yield name, (objective.__doc__ or "").splitlines()[0]
    elif kind == "samplers":
        from dspo_jax.samplers import SAMPLERS

        for name, sampler in SAMPLERS.items():
            yield name, sampler.scheduler
    elif kind == "rewards":
        from dspo_jax.rewards import REWARDS, Reward

        for name, reward in REWARDS.items():
            ready = isinstance(reward, Reward)
            yield name, "needs no weights" if ready else "weights: see dspo_jax.rewards.convert"
    elif kind == "prompt_sets":
        from dspo_jax.evaluation.prompt_sets import SETS

        for name, found in SETS.items():
            yield name, f"{sum(file.count for file in found.files):,} prompts: {found.where}"
    else:
        from dspo_jax.pipelines.published import CLASSES

        yield from CLASSES.items()


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    only = flags.FLAGS.only
    for kind in [only] if only else KINDS:
        rows = list(entries(kind))
        width = max(len(name) for name, _ in rows)
        print(f"{_HEADINGS[kind]}:")
        for name, description in rows:
            print(f"  {name:{width}}  {description}")
        print()


def run() -> None:
    """Defines the flags and runs the command."""
    flags.DEFINE_enum("only", None, KINDS, "Only these.")
    cli.run(main)


if __name__ == "__main__":
    run()
