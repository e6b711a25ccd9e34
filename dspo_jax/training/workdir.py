"""The folder of a run: its config and what it trains by are written once, and compared on resuming."""

from collections.abc import Mapping
from pathlib import Path

from flax.traverse_util import flatten_dict

from dspo_jax import json_files
from dspo_jax.errors import UserError
from dspo_jax.files import write_json
from dspo_jax.json_files import JsonObject
from dspo_jax.monitoring.metrics import read_metrics
from dspo_jax.parallel import processes
from dspo_jax.training.optim import ENDLESS_SCHEDULES

# Keys that may differ when a run is resumed, beside `steps` and `epochs` where the learning rate does not end
# with the run: they decide how the run is computed and watched, not its result.
MAY_DIFFER = (
    "checkpoint",
    "log_every",
    "mesh",
    "offload",
    "profile",
    "remat",
    "rewards.folder",
    "rewards.images",
    "rewards.prompts",
    "rewards.validation",
    "samples",
    "stream.batch_size",
    "validation",
    "wandb_project",
)
# The default of `lora.targets` before Stable Diffusion 3, of whose layers the models of then have none.
_EARLIER_TARGETS = [r"to_[qkv]", r"to_out\.0", r"(q|k|v|out)_proj"]
_EARLIER_LENGTH = 256  # of captions in models with a `max_sequence_length`, before it could be chosen
_ONLINE = ("stream.", "rewards.", "policy_gradient.", "advantages.", "reward_gradient.")


def claim_workdir(workdir: Path, config: JsonObject, pins: Mapping[str, str] | None = None) -> None:
    """Writes config.json and pins.json into a fresh workdir, or checks that they are those of this run.

    Where a run failed before its first step, as one that does not fit into memory does, it left nothing to go
    on with, and the workdir is fresh.

    Args:
      workdir: folder of the run.
      config: `Settings.given`.
      pins: what stands behind keys that name files, by key: `Experiment.pins`. A run from before there
        were any takes these.

    Raises:
      UserError: the workdir belongs to a run with another config, beyond what `MAY_DIFFER`, or of other pins;
        or another process has other pins.
    """
    pins = pins or {}
    for key in processes.differing(pins):
        raise UserError(
            f"config.{key}: is not the same in every process of this run, here {pins[key]}; put the same "
            "files under this path on every host"
        )
    optimizer = config["optimizer"]
    lengths = ("steps", "epochs") if optimizer["schedule"] in ENDLESS_SCHEDULES else ()
    may_differ = {*MAY_DIFFER, *lengths}
    path = workdir / "config.json"
    begun = _has_begun(workdir)
    if begun and not path.is_file():
        raise UserError(
            f"{path}: no such file, beside what a run has left: nothing says how that was trained; put the "
            "file back, or choose another --workdir"
        )
    if begun:
        written = json_files.read_object(path, "it says how the run was started; choose another --workdir")
        mine, theirs = (flatten_dict(each, sep=".") for each in (config, written))
        # Keys that older runs did not have, by what those runs did.
        theirs.setdefault("data.weights", [])
        theirs.setdefault("share_timesteps", theirs.get("share_noise"))
        fixed = {"stream.kind": "dataset", "stream.guidance_rescale": 0.0, "noise_offset": 0.0}
        fixed |= {"encoder_dropout": 0.0, "dropped_captions": None}
        fixed |= {"text.max_chunks": 1, "text.clip_skip": 1}
        length = mine.get("text.max_sequence_length")
        fixed["text.max_sequence_length"] = None if length is None else _EARLIER_LENGTH
        fixed |= {"data.curriculum_groups": 1, "data.curriculum_every": 500}
        fixed |= {"lora.alpha": None, "lora.rank_stabilised": False, "lora.dropout": 0.0, "lora.dora": False}
        fixed |= {"optimizer.text_encoder_learning_rate": None}
        fixed |= {f"levels.{key}": None for key in ("draw", "mean", "std", "scale", "shift")}
        fixed |= {"lora.init": None, "reference.model": None, "reference.every": 0, "reference.decay": 0.0}
        fixed |= {"reference.draws": 0}
        theirs = fixed | theirs
        # Keys that were not read then, and are refused where they would not be read now.
        if not theirs["reference.every"]:
            theirs["reference.decay"] = 0.0
        if theirs["stream.kind"] in ("prompts", "trajectories"):
            theirs |= {"timesteps.first": 0, "timesteps.last": None}
        if (
            theirs.get("lora.targets") == _EARLIER_TARGETS
            and mine.get("lora.targets", [])[:3] == _EARLIER_TARGETS
        ):
            theirs["lora.targets"] = mine["lora.targets"]
        if theirs["stream.kind"] == "dataset":  # which reads none of the keys of the other kinds
            theirs |= {key: value for key, value in mine.items() if key.startswith(_ONLINE)} | {
                "stream.kind": "dataset"
            }
        of_adafactor = optimizer["name"] == "adafactor"  # others do not read it
        theirs.setdefault(
            "optimizer.factored_axes", "largest" if of_adafactor else optimizer["factored_axes"]
        )
        for key in ("b3", "alpha", "momentum"):  # nor did any optimizer then read these
            theirs.setdefault(f"optimizer.{key}", optimizer[key])
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key) and not {key, key.split(".")[0]} & may_differ:
                raise UserError(
                    f"{path}: this run was started with config.{key} = {theirs.get(key)!r}, now it is "
                    f"{mine.get(key)!r}; resume with the same config or choose another --workdir "
                    f"(what may differ: {', '.join(sorted(may_differ))})"
                )
    pinned = workdir / "pins.json"
    written_pins = _check_pins(pinned, pins, config) if pins and begun and pinned.is_file() else {}
    processes.wait_for_all("config checked")
    if processes.is_first():
        write_json(path, config, sort_keys=True)
        if pins:
            write_json(pinned, {**written_pins, **pins}, sort_keys=True)
    processes.wait_for_all("config written")


def _check_pins(path: Path, pins: Mapping[str, str], config: JsonObject) -> JsonObject:
    """Returns what a run was pinned to, keys among it that are not read now, as validation may be off."""
    written = json_files.read_object(path, "it says what the run was trained by; choose another --workdir")
    given = flatten_dict(config, sep=".")
    for key, now in pins.items():
        if written.get(key, now) != now:
            raise UserError(
                f"{path}: this run was started with {written[key]}, now config.{key} = {given[key]!r:.200} "
                f"gives {now}; resume with the same or choose another --workdir"
            )
    return written


def _has_begun(workdir: Path) -> bool:
    """Tells whether a run has saved a checkpoint, or finished a step that was logged."""
    if any(entry.name.isdecimal() for entry in workdir.glob("checkpoints/*")):
        return True
    metrics = workdir / "metrics.jsonl"
    return metrics.is_file() and any(record["step"] > 0 for record in read_metrics(metrics))
