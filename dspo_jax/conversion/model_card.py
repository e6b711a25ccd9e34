"""The model card of an exported run: how to draw with it, what it draws, and how it was trained."""

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from flax.traverse_util import flatten_dict

from dspo_jax.hub_cache import find_repository, hide_folders, is_hub_id, split_hub_id
from dspo_jax.json_files import JsonObject, member
from dspo_jax.monitoring.metrics import VALIDATION_PREFIX, read_metrics
from dspo_jax.objectives import OBJECTIVES
from dspo_jax.objectives.policy_gradient import POLICY_GRADIENTS
from dspo_jax.objectives.reward_gradient import REWARD_GRADIENTS
from dspo_jax.weights.model_dir import read_json
from dspo_jax.weights.saved_params import read_run_config

GRID = "samples.png"
"""The picture beside the card, which it shows."""

# Keys of a config that say the most about a result, beside the objective's; of the last those that are set.
_SETTINGS = ("batch_size", "optimizer.name", "optimizer.learning_rate", "optimizer.schedule", "seed")
_OPTIONS = (
    *("reference.model", "optimizer.scale_lr", "optimizer.text_encoder_learning_rate"),
    *("lora.rank", "lora.alpha", "lora.rank_stabilised", "lora.dora", "lora.dropout"),
    *("lora.init", "train_text_encoder", "ema_decay"),
    *("text.max_chunks", "text.clip_skip"),
)
_LENGTH = "text.max_sequence_length"
# Stable Diffusion 3's T5: diffusers does not load a folder without it unless told that it is missing.
_MAY_BE_ABSENT = ("text_encoder_3", "tokenizer_3")
_PROMPT = "a red fox in the snow"
# The group of keys that names what trains, by `stream.kind`, and what it offers.
_GROUPS = {"prompts": "reward_gradient", "trajectories": "policy_gradient"}
_METHODS: Mapping[str, Mapping[str, type]] = {
    "objective": OBJECTIVES,
    "policy_gradient": POLICY_GRADIENTS,
    "reward_gradient": REWARD_GRADIENTS,
}
_DRAWING = ("stream.sampler", "stream.num_inference_steps", "stream.guidance_scale", "stream.eta")
_OWN_IMAGES = (
    *("stream.kind", "stream.prompts", "rewards.train", "rewards.validation", "rewards.prompts"),
    *_DRAWING,
)
_OF_DATA = ("dataset", "self_play")


def make_card(
    run: Path, base: str, folder: Path, step: int, *, file: str = "", adapters: str | None = None
) -> str:
    """Returns the card of a run as a Markdown text that the model hub understands.

    Args:
      run: the workdir, whose config.json, metrics.jsonl and samples are read, and the manifest of its data
        where it is still there.
      base: the model that the run started from, as the user named it.
      folder: where that model is; without a model there the card names no licence.
      step: of the exported checkpoint.
      file: name of what is exported, where it is one file; by default it is a folder, with the picture in it.
      adapters: whose names the file has, "diffusers" or "kohya", where it holds adapters alone.
    """
    config = read_run_config(run, "objective.name")
    values = flatten_dict(config, sep=".")
    kind = values.get("stream.kind", "dataset")
    if kind in _OF_DATA:
        read_run_config(run, "data.path")
    group = _GROUPS.get(kind, "objective")
    method = config[group]["name"]
    name, licence = hide_folders(base), _read_licence(folder)
    grid = None if file else find_grid(run, step)
    tags = ["dspo_jax", method, *(["lora"] if values.get("lora.rank") or values.get("lora.init") else [])]
    published = is_hub_id(base) or find_repository(Path(base)) is not None
    header = [
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        *licence,
        *([f"base_model: {split_hub_id(name)[0]}"] if published else []),
        f"tags: [{', '.join(tags)}]",
        *(_widget(values, grid) if grid is not None else []),
    ]
    sections = [
        "\n".join(["---", *header, "---"]),
        f"# {run.resolve().name}",
        f"`{name}` after {step} steps of `{method}`, trained with dspo_jax "
        "(`python -m dspo_jax.train`) and exported with `python -m dspo_jax.convert export`.",
    ]
    if grid is not None:
        sections.append(f"![From the same noise: the base, and step {_step(grid)}]({GRID})")
    sections += [
        "## Use\n\n" + _usage(values, _loading(name, folder, file, adapters)),
        "## Training\n\n" + _table(_describe_training(values, group, step) | _read_results(run, step)),
        "## Data\n\n" + _describe_examples(values, kind),
        "## Licence\n\n"
        "The licence of the base model and the terms of the preference data, or of the rewards, apply to "
        "this model too.",
    ]
    missing = [] if licence else ["`license`, as the card of the base names none"]
    missing += [] if published else ["`base_model`, as the base was a local folder"]
    if missing:
        sections.append(f"Missing in the first lines of this file: {'; '.join(missing)}.")
    return "\n\n".join(sections) + "\n"


def find_grid(run: Path, step: int) -> Path | None:
    """Finds the newest grid of samples that a run drew up to `step`."""
    grids = {_step(path): path for path in (run / "samples").glob("step_*.png") if path.stem[5:].isdecimal()}
    return grids[max(drawn)] if (drawn := [each for each in grids if each <= step]) else None


def _step(grid: Path) -> int:
    return int(grid.stem.removeprefix("step_"))


def _loading(base: str, folder: Path, file: str, adapters: str | None) -> str:
    """Returns the lines that load in diffusers what is exported."""
    absent = "".join(f", {name}=None" for name in _find_absent(folder))
    name, revision = split_hub_id(base)
    pinned = json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")
    if not file:
        return f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("."{absent})  # this folder, or its id on the model hub"""
    if adapters == "kohya" and (folder / "transformer").is_dir():
        command = f"python -m dspo_jax.convert import --model={shlex.quote(base)} --lora={shlex.quote(file)}"
        return f"""from diffusers import DiffusionPipeline

# diffusers does not read kohya's names of this family, as ComfyUI does. This adds the file to the base:
# {command} --out=model
pipe = DiffusionPipeline.from_pretrained("model"{absent})"""
    if adapters:
        return f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({pinned}{absent})  # the base, where it is with you
pipe.load_lora_weights(".", weight_name={json.dumps(file)})"""
    kind = read_json(folder / "model_index.json")["_class_name"]
    return f"""from diffusers import {kind}

pipe = {kind}.from_single_file(
    {json.dumps(file)},
    config={json.dumps(name)},  # a folder or hub id with the base's configs and tokenizers
)"""


def _find_absent(folder: Path) -> list[str]:
    """Returns the components that a model is without, and that diffusers wants to be told of."""
    index = folder / "model_index.json"
    if not index.is_file():
        return []
    parts = read_json(index)
    return [name for name in _MAY_BE_ABSENT if name in parts and parts[name][0] is None]


def _widget(values: JsonObject, grid: Path) -> list[str]:
    """Returns the lines by which the hub's page shows the picture with its prompts."""
    prompts = [text for text in values.get("samples.prompts") or () if _is_prompt(text)]
    shown = "; ".join(prompts) or "Samples of the run"
    text = f"{shown} (the base, and step {_step(grid)}, from the same noise)"
    return ["widget:", f"- text: {json.dumps(text, ensure_ascii=False)}", f"  output: {{url: {GRID}}}"]


def _is_prompt(text: str) -> bool:
    """Tells a prompt from the name of a file of prompts."""
    return " " in text or not Path(text).suffix


def _usage(values: JsonObject, loading: str) -> str:
    """Returns a program that draws an image as the run drew its samples."""
    prompt = next((text for text in values.get("samples.prompts") or () if _is_prompt(text)), _PROMPT)
    steps, scale = values.get("samples.num_inference_steps", 25), values.get("samples.guidance_scale", 7.5)
    skip = values.get("text.clip_skip", 1)  # diffusers counts from 0
    more = f", clip_skip={skip - 1}" if skip > 1 else ""
    length = values.get(_LENGTH)
    more += f", max_sequence_length={length}" if length is not None else ""
    return f"""```python
{loading}
prompt = {json.dumps(prompt, ensure_ascii=False)}
image = pipe(prompt, num_inference_steps={steps}, guidance_scale={scale}{more}).images[0]
image.save("image.png")
```"""


def _describe_training(values: JsonObject, group: str, step: int) -> JsonObject:
    """Lists the method, its hyperparameters with their defaults, and the main settings, by config key.

    Args:
      values: the config, by dotted key.
      group: of keys that the method is named in.
      step: of the exported checkpoint.
    """
    name, methods = values[f"{group}.name"], _METHODS[group]
    fields = dataclasses.fields(methods[name]) if name in methods else ()
    rows = {f"{group}.name": name, **{f"{group}.{field.name}": field.default for field in fields}}
    rows |= {key: value for key, value in values.items() if key.startswith(f"{group}.") and value is not None}
    rows |= {"steps": step} | {key: values.get(key) for key in _SETTINGS}
    rows |= {
        key: hide_folders(values[key])
        for key in _OPTIONS
        if values.get(key) and not (key.startswith("text.") and values[key] == 1)
    }
    rows[_LENGTH] = values.get(_LENGTH)  # which may be 0
    return {key: value for key, value in rows.items() if value is not None}


def _describe_examples(values: JsonObject, kind: str) -> str:
    """Describes the datasets of a run, or the prompts and rewards of one on the model's own images."""
    if kind in _OF_DATA:
        parts = values["data.path"].split(",")
        tables = [_table(_describe_data(Path(part.strip()))) for part in parts]
        if kind == "self_play":
            rows = {key: values.get(key) for key in ("stream.kind", "reference.every", *_DRAWING)}
            tables.append("The losers are images that the reference drew.\n\n" + _table(rows))
        return "\n\n".join(tables)
    rows = {key: values.get(key) for key in _OWN_IMAGES}
    for key in ("stream.prompts", "rewards.prompts", "rewards.validation"):
        rows[key] = ", ".join(hide_folders(list(rows[key] or ())))
    return "The model's own images.\n\n" + _table({key: value for key, value in rows.items() if value != ""})


def _read_results(run: Path, step: int) -> dict[str, str]:
    """Reads the newest held-out implicit accuracy, or rewards, of a run up to `step`, if it has them."""
    path, key = run / "metrics.jsonl", f"{VALIDATION_PREFIX}implicit_accuracy"
    records = read_metrics(path) if path.is_file() else []
    prefix = f"{VALIDATION_PREFIX}reward_"
    for record in reversed(records):
        rewards = [name for name in record if name.startswith(prefix)] if record["step"] <= step else []
        if rewards:
            return {
                f"held-out {name.removeprefix(prefix)}": f"{record[name]:.4g} at step {record['step']}"
                for name in rewards
            }
    for record in reversed(records):
        if record["step"] <= step and key in record:
            value = f"{record[key]:.3f}"
            if f"{key}_low" in record:
                value += f" [{record[f'{key}_low']:.3f}, {record[f'{key}_high']:.3f}]"
            if f"{VALIDATION_PREFIX}num_pairs" in record:
                value += f" of {record[f'{VALIDATION_PREFIX}num_pairs']:.0f} pairs"
            return {"held-out implicit accuracy": f"{value} at step {record['step']}"}
    return {}


def _table(rows: JsonObject) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _describe_data(directory: Path) -> JsonObject:
    path = directory / "manifest.json"
    if not path.is_file():
        return {"name": directory.name, "manifest": "no longer where the run read it"}
    fix = "move it away to write the card without it"
    manifest = read_json(path, fix)
    source = hide_folders(member(manifest, "source", dict, path, fix))
    rows: JsonObject = {
        "name": directory.name,
        "source": ", ".join(
            [str(source.get("name", "unknown")), *(f"{key} {value}" for key, value in _given(source).items())]
        ),
        "resolution": member(manifest, "resolution", int, path, fix),
    }
    for split, content in member(manifest, "splits", dict, path, fix).items():
        reasons = member(content, "skipped", dict, path, fix)
        skipped = "".join(f", {count} skipped: {reason}" for reason, count in reasons.items())
        rows[f"split {split}"] = f"{member(content, 'num_examples', int, path, fix)} examples{skipped}"
    return rows


def _given(source: JsonObject) -> JsonObject:
    """Returns the arguments of a source that say something: not None, and no list or text that is empty."""
    arguments = source.get("arguments") or {}
    return {
        key: value
        for key, value in arguments.items()
        if value is not None and value is not False and value != "" and value != []
    }


def _read_licence(folder: Path) -> list[str]:
    """Reads the lines on the licence at the head of a model's card, such as `license: mit`."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return re.findall(r"^license(?:_name|_link)?: *\S.*$", header[1], re.MULTILINE) if header else []
