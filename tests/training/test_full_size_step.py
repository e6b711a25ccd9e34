"""Full size on this machine: steps of DSPO and of a reward's gradient on SD1.5, of flow-DPO on SD3.5 medium.

pytest -m slow -s tests/training/test_full_size_step.py     (20 GB of disk, 24 GiB of memory)
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import published
import pytest
from tiny_model import VAE as TINY_VAE
from tiny_model import random_params, write_model, write_pairs
from tiny_sd3 import write_sd3

from dspo_jax.models.model import build_model
from dspo_jax.monitoring.metrics import read_metrics
from dspo_jax.pipelines.published import NETWORKS as PUBLISHED
from dspo_jax.pipelines.published import VAE
from dspo_jax.weights.components import write_params

ROOT = Path(__file__).parents[2]
NETWORKS = {
    "unet": ("UNet2DConditionModel", {"_class_name": "UNet2DConditionModel", **published.SD15_UNET}),
    "text_encoder": ("CLIPTextModel", {"architectures": ["CLIPTextModel"], **published.SD15_TEXT_ENCODER}),
}
CHANGES = {
    "steps": 2,
    "batch_size": 1,
    "log_every": 1,
    "compute_dtype": "bfloat16",
    "remat": "blocks",
    "optimizer.warmup_steps": 0,
    "validation.every": 0,
    "samples.every": 0,
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that is emptied at once: pytest keeps those of its last runs."""
    folder = tmp_path_factory.mktemp("full")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def model(scratch: Path) -> Path:
    """UNet and text encoder of full size with random weights, beside a small VAE."""
    folder = write_model(scratch / "sd15")
    draw = np.random.default_rng(0)
    for name, (class_name, config) in NETWORKS.items():
        architecture = build_model(class_name, config)
        write_params(folder / name, architecture, random_params(architecture, draw))
    return folder


@pytest.fixture(scope="module")
def pairs(scratch: Path, model: Path) -> Path:
    """Random latents of images of 512 pixels; the small VAE halves a side twice, not three times."""
    return write_pairs(scratch / "pairs", model, train=4, validation=1, resolution=256)


# AdamW does not fit: its state is 6.4 GiB, and on a CPU XLA copies what a program updates (23.7 GiB in all,
# and what the process needs besides). What remains for all parameters are the optimizers that keep little.
KINDS = {
    "every parameter, Adafactor": {"optimizer.name": "adafactor"},
    "LoRA of rank 8": {"lora.rank": 8},
}


def run(recipe: str, workdir: Path, changes: Mapping[str, object]) -> tuple[list[dict[str, float]], float]:
    """Trains in a process of its own; returns its metrics and the most memory that it took, in GiB."""
    shutil.rmtree(workdir, ignore_errors=True)
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    command = [
        sys.executable,
        "-m",
        "dspo_jax.train",
        f"--config=configs/{recipe}.py",
        f"--workdir={workdir}",
    ]
    process = subprocess.Popen(
        [*command, *flags], cwd=ROOT, env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return read_metrics(workdir / "metrics.jsonl"), usage.ru_maxrss / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_fits_into_24_gib(kind: str, model: Path, pairs: Path, scratch: Path) -> None:
    records, most = run(
        "sd15_dspo", scratch / "run", {**CHANGES, **KINDS[kind], "model": model, "data.path": pairs}
    )
    last = records[-1]
    print(
        f"\n{kind}: {1 / last['pairs_per_second']:.0f} s a step, "
        f"{1000 * last['tflops_per_device']:.0f} GFLOP/s, peak memory {last['host_memory_peak_gib']:.1f} GiB "
        f"in the steps, {most:.1f} GiB with the checkpoint"
    )
    assert [record["skipped"] for record in records] == [0, 0]
    assert last["host_memory_peak_gib"] < 23


@pytest.fixture(scope="module")
def model_of_256_pixels(scratch: Path, model: Path) -> Path:
    """The same networks beside a VAE of full size, made for images of 256 pixels."""
    folder = scratch / "sd15_256"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("vae", "*.safetensors"))
    for weights in model.glob("*/*.safetensors"):
        if weights.parent.name != "vae":
            (folder / weights.parent.name / weights.name).hardlink_to(weights)
    unet = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**unet, "sample_size": 32}))
    vae = build_model("AutoencoderKL", {"_class_name": "AutoencoderKL", **VAE})
    write_params(folder / "vae", vae, random_params(vae, np.random.default_rng(1)))
    return folder


@pytest.mark.slow
def test_memory_of_a_reward_gradient_does_not_grow_with_its_steps(
    model_of_256_pixels: Path, scratch: Path
) -> None:
    """DRaFT-1 and DRaFT-10 of ten steps: back-propagation through all would keep each UNet's activations."""
    changes = {
        **CHANGES,
        "model": model_of_256_pixels,
        "compute_dtype": "float32",
        "stream.prompts": '("a cat",)',
        "stream.num_inference_steps": 10,
        "rewards.train": "colourfulness",
        "rewards.validation": "()",
    }
    peaks = {}
    for k in (1, 10):
        records, most = run("sd15_draft", scratch / "run", {**changes, "reward_gradient.k": k})
        last = records[-1]
        assert last["attached_steps"] == k
        assert last["grad_norm"] > 0
        peaks[k] = last["host_memory_peak_gib"]
        print(f"\nK = {k}: peak memory {peaks[k]:.2f} GiB in the steps, {most:.2f} GiB with the checkpoint")
    assert abs(peaks[10] / peaks[1] - 1) < 0.1


@pytest.fixture(scope="module")
def sd35_medium(scratch: Path) -> Path:
    """Transformer and CLIPs of full size with random weights, beside a small VAE, without T5."""
    networks = {
        name: {"_class_name": class_name, "architectures": [class_name], **config}
        for name, (class_name, config) in PUBLISHED["sd35-medium"].items()
        if name != "text_encoder_3"
    }
    vae = {**TINY_VAE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    folder = scratch / "sd35"
    folder.mkdir()
    return write_sd3(folder, has_t5=False, networks={**networks, "vae": vae}, dtype="bfloat16")


@pytest.mark.slow
def test_a_step_of_stable_diffusion_35_medium_fits_into_24_gib(sd35_medium: Path, scratch: Path) -> None:
    """Latents of 64 x 64 are those of 512 pixels; 256 rows of zeros are as long as T5's text."""
    pairs = write_pairs(scratch / "flow_pairs", sd35_medium, train=4, validation=1, resolution=256)
    changes = {**CHANGES, "accumulation": 1, "model": sd35_medium, "data.path": pairs}
    records, most = run("sd35_medium_flow_dpo", scratch / "run", changes)
    last = records[-1]
    print(
        f"\n{1 / last['pairs_per_second']:.0f} s a step, {1000 * last['tflops_per_device']:.0f} GFLOP/s, "
        f"peak memory {last['host_memory_peak_gib']:.1f} GiB in the steps, {most:.1f} GiB with the checkpoint"
    )
    assert [record["skipped"] for record in records] == [0, 0]
    assert records[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert last["host_memory_peak_gib"] < 23
