"""The model card of an exported run: base, objective, settings, data and metrics."""

import json
import re
from pathlib import Path

from flax.traverse_util import flatten_dict

from dspo_jax.json_files import JsonObject, member
from dspo_jax.monitoring.metrics import read_metrics
from dspo_jax.weights.model_dir import is_hub_id, read_json
from dspo_jax.weights.saved_params import read_run_config

# Keys that say where a run was, how it was watched or spread over devices, and nothing about its result.
_UNINTERESTING = ("model", "log_every", "mesh", "checkpoint", "validation", "data", "steps")


def make_card(run: Path, base: str, folder: Path, step: int) -> str:
    """Returns the card of a run as a Markdown text that the model hub understands.

    Args:
      run: the workdir, whose config.json and metrics.jsonl are read, and the manifest of its data where it is
        still there.
      base: the model that the run started from, as the user named it.
      folder: where that model is.
      step: of the exported checkpoint.
    """
    config = read_run_config(run, "objective.name", "data.path")
    objective, data = config["objective"]["name"], config["data"]["path"]
    header = [
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"tags: [dspo_jax, {objective}]",
    ]
    if is_hub_id(base):
        header.append(f"base_model: {base}")
    name = base if is_hub_id(base) else Path(base).name
    settings = {
        key: value
        for key, value in sorted(flatten_dict(config, sep=".").items())
        if key.partition(".")[0] not in _UNINTERESTING and value is not None
    }
    folders = [Path(name.strip()) for name in data.split(",")]
    sections = [
        "---\n" + "\n".join(header) + "\n---",
        f"# {run.name}",
        f"`{name}` after {step} steps of `{objective}`, trained with dspo_jax "
        "(`python -m dspo_jax.train`) and exported with `python -m dspo_jax.convert export`.",
        "## Training\n\n" + _table(settings),
        "## Data\n\n" + "\n\n".join(_table(_describe_data(folder)) for folder in folders),
    ]
    metrics = _last_metrics(run / "metrics.jsonl", step)
    if metrics:
        sections.append("## Metrics\n\n" + _table(metrics))
    sections.append(
        "## Licence\n\n"
        f"The licence of the base model ({_base_licence(folder)}) and the terms of the preference data apply "
        "to this model too. Add the licence to the first lines of this file before you publish it."
    )
    return "\n\n".join(sections) + "\n"


def _table(rows: JsonObject) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _describe_data(directory: Path) -> JsonObject:
    path = directory / "manifest.json"
    if not path.is_file():
        return {"name": directory.name, "manifest": "no longer where the run read it"}
    fix = "move it away to write the card without it"
    manifest = read_json(path, fix)
    rows: JsonObject = {
        "name": directory.name,
        "source": json.dumps(member(manifest, "source", dict, path, fix), ensure_ascii=False),
        "resolution": member(manifest, "resolution", int, path, fix),
    }
    for split, content in member(manifest, "splits", dict, path, fix).items():
        reasons = member(content, "skipped", dict, path, fix)
        skipped = "".join(f", {count} skipped: {reason}" for reason, count in reasons.items())
        rows[f"split {split}"] = f"{member(content, 'num_examples', int, path, fix)} examples{skipped}"
    return rows


def _last_metrics(path: Path, step: int) -> dict[str, str]:
    """Returns the newest value of every metric that had been written when `step` was saved."""
    records = [record for record in read_metrics(path) if record["step"] <= step] if path.is_file() else []
    newest: dict[str, str] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "wall_seconds", "pairs_per_second"):
                newest[name] = f"{value:.6g} (step {record['step']})"
    return dict(sorted(newest.items()))


def _base_licence(folder: Path) -> str:
    """Reads the licence that the base model's own card declares in its first lines."""
    card = folder / "README.md"
    header = (
        re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if card.is_file()
        else None
    )
    declared = re.search(r"^license: *(\S+)", header[1], re.MULTILINE) if header else None
    return f"its card says {declared[1]}" if declared else "see where you got it"
