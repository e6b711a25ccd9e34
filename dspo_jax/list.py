"""Lists what there is to choose from: recipes, keys, objectives, samplers, rewards, prompt sets, models.

    python -m dspo_jax.list --only=objectives

Names are given to other commands as the headings say.
"""

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from absl import flags

from dspo_jax import cli, recipes, spelling

KINDS = (
    *("recipes", "encode_recipes", "keys", "objectives", "policy_gradients", "reward_gradients", "samplers"),
    *("rewards", "prompt_sets", "published", "gpus"),
)
_HEADINGS = {
    "recipes": "recipes, for train and plan --config",
    "encode_recipes": "recipes, for encode --config",
    "keys": "keys of a run, set with --config.KEY=VALUE, with their defaults",
    "objectives": "objectives, for --config.objective.name (formulas: docs/objectives.md)",
    "policy_gradients": "policy gradients, for --config.policy_gradient.name (docs/online.md)",
    "reward_gradients": "reward gradients, for --config.reward_gradient.name (docs/online.md)",
    "samplers": "samplers, for --sampler, and the diffusers scheduler each is equal to",
    "rewards": "rewards, for --reward and --rewards; one of your own is FILE.py:FUNCTION",
    "prompt_sets": "prompt sets, for evaluate --prompts NAME=FILE, and where to get them",
    "published": "published architectures, for --published",
    "gpus": "NVIDIA GPUs, for plan --topology and train --dry_run --gpu",
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
    elif kind == "keys":
        yield from _keys((recipes.ROOT / "configs" / "common.py").read_text(encoding="utf-8"))
    elif kind == "objectives":
        from dspo_jax.objectives import OBJECTIVES

        for name, objective in OBJECTIVES.items():
            also = [alias for alias, meant in spelling.OBJECTIVE_ALIASES.items() if meant == name]
            summary = (objective.__doc__ or "").splitlines()[0]
            yield name, f"{summary} Also: {', '.join(also)}." if also else summary
    elif kind in ("policy_gradients", "reward_gradients"):
        from dspo_jax.objectives.policy_gradient import POLICY_GRADIENTS
        from dspo_jax.objectives.reward_gradient import REWARD_GRADIENTS

        methods: Mapping[str, type] = POLICY_GRADIENTS if kind == "policy_gradients" else REWARD_GRADIENTS
        for name, method in methods.items():
            yield name, (method.__doc__ or "").splitlines()[0]
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
    elif kind == "gpus":
        from dspo_jax.monitoring.gpus import GPUS

        for name, gpu in GPUS.items():
            yield (
                name,
                f"{gpu.kind}: {gpu.memory / 2**30:.1f} GiB, {gpu.bandwidth / 1e9:,.0f} GB/s, "
                f"{gpu.bfloat16 / 1e12:,.0f} TFLOP/s in bfloat16",
            )
    else:
        from dspo_jax.pipelines.published import CLASSES

        yield from CLASSES.items()


def _keys(source: str) -> Iterator[tuple[str, str]]:
    """Yields each key of the schema's source with its default and the comment above or behind it."""
    comment: list[str] = []
    group = ""  # of hyperparameters
    for line in source.splitlines():
        text = line.strip()
        if text.startswith("# "):
            comment.append(text[2:])
        elif found := re.fullmatch(r"_(\w+)_ARGUMENTS = {", text):
            group, comment = found[1].lower(), []
        elif found := re.fullmatch(r'"(\w+)": \w+,(?:  # (.*))?', text):
            yield f"{group}.{found[1]}", f"None. {found[2] or ' '.join(comment)}"
            comment = []
        elif found := re.fullmatch(r"config\.([\w.]+) = (.*)", text):
            if found[2] == "ConfigDict()":
                continue  # what is said of a group stands with its first key
            default = "None" if found[2].startswith("config_dict.placeholder") else found[2]
            yield found[1], f"{default}. {' '.join(comment)}".strip()
            comment = []
        else:
            comment = []


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    only = flags.FLAGS.only
    for kind in [only] if only else [kind for kind in KINDS if kind != "keys"]:  # there are many
        rows = list(entries(kind))
        width = max(len(name) for name, _ in rows)
        print(f"{_HEADINGS[kind]}:")
        room = max(shutil.get_terminal_size((120, 24)).columns - width - 4, 40)
        for name, description in rows:
            for number, part in enumerate(textwrap.wrap(description, room)):
                print(f"  {'' if number else name:{width}}  {part}")
        print()


def run() -> None:
    """Defines the flags and runs the command."""
    flags.DEFINE_enum("only", None, KINDS, "Only these.")
    cli.run(main)


if __name__ == "__main__":
    run()
