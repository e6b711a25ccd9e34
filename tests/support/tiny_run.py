"""A short training run: its model, its config, its batches, and what it leaves behind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny_model
from ml_collections import ConfigDict

from configs import common
from dspo_jax.data import loader
from dspo_jax.data.datasets import read_datasets
from dspo_jax.models.model import build_model
from dspo_jax.monitoring.metrics import read_metrics
from dspo_jax.training.settings import parse
from dspo_jax.training.workdir import claim_workdir
from dspo_jax.weights.components import write_params

# One level and one layer of what the tiny model has two of; text reaches the image in the middle block only.
UNET = {
    **tiny_model.UNET,
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}
TEXT_ENCODER = {**tiny_model.TEXT_ENCODER, "num_hidden_layers": 1}


def make_shallow(model: Path) -> Path:
    """Replaces the UNet and the text encoder of a tiny model; shards encoded for it still fit."""
    draw = np.random.default_rng(1)
    for name, class_name, config in (
        ("unet", "UNet2DConditionModel", UNET),
        ("text_encoder", "CLIPTextModel", TEXT_ENCODER),
    ):
        architecture = build_model(class_name, config)
        write_params(model / name, architecture, tiny_model.random_params(architecture, draw))
    return model


def make_config(model: Path, pairs: Path, changes: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config of a short run, 8 pairs a step; `changes` go by dotted key."""
    config = common.get_config()
    config.update_from_flattened_dict(
        {
            "model": str(model),
            "data.path": str(pairs),
            "steps": 5,
            "batch_size": 8,
            "log_every": 1,
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 0,
            "validation.every": 0,
            "samples.every": 0,
            **(changes or {}),
        }
    )
    return config


def read_batches(pairs: Path, *, batch_size: int, count: int) -> list[dict[str, np.ndarray]]:
    """The first `count` batches of a run with seed 0, as the step takes them."""
    stream = loader.train_batches(read_datasets(pairs), batch_size=batch_size, seed=0)
    batches = [next(stream) for _ in range(count)]
    stream.close()
    inputs = ("moments", "tokens", "micro_conditioning", "preference", "loser_won")
    return [
        {name: batch[name] for name in inputs} | {"index": batch["index"].astype(np.uint32)}
        for batch in batches
    ]


def read_reproducible(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock or the memory's size decides."""
    measured = {
        "wall_seconds",
        "pairs_per_second",
        "images_per_second",
        "data_wait",
        "tflops_per_device",
        "device_memory_peak_gib",
        "host_memory_peak_gib",
    }
    records = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in measured} for record in records]


def begin(workdir: Path, config: ConfigDict) -> None:
    """Leaves a workdir as a run does whose first step is finished."""
    claim_workdir(workdir, parse(config).given)
    (workdir / "metrics.jsonl").write_text('{"step": 1, "wall_seconds": 1.0, "loss": 0.5}\n')


def saved_steps(workdir: Path) -> list[int]:
    """The complete checkpoints of a run."""
    folder = workdir / "checkpoints"
    return (
        sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
        if folder.exists()
        else []
    )
