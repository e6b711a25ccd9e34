"""Import and export of full-size models in little memory: the commands, each in a process of its own.

pytest -m slow -s tests/weights/test_convert_memory.py  (40 GB of disk, 18 GB of memory)
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import published
import pytest
from tiny_model import FAMILIES, write_model

from configs import common
from dspo_jax.models.model import build_model
from dspo_jax.weights import tensors
from dspo_jax.weights.component_files import open_stored
from dspo_jax.weights.layout import torch_shapes

ROOT = Path(__file__).parents[2]
# Family -> UNet, its parameters, its stored dtype, and what it needs of the (small) rest of the folder.
FULL_SIZE = {
    "sd15": (published.SD15_UNET, 859_520_964, "float32", {"text_encoder": {"hidden_size": 768}}),
    "sdxl": (
        published.SDXL_UNET,
        2_567_463_684,
        "bfloat16",
        {
            "text_encoder": {"hidden_size": 768},
            "text_encoder_2": {"hidden_size": 1280, "projection_dim": 1280},
        },
    ),
}

WRITE_CHECKPOINT = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from dspo_jax.weights.checkpoints import Checkpoints
from dspo_jax.weights.components import read_model, read_params

unet, run = Path(sys.argv[1]) / "unet", sys.argv[2]
params = jax.tree.map(jnp.asarray, read_params(unet, read_model(unet)))
with Checkpoints(run + "/checkpoints") as checkpoints:
    checkpoints.save(1, {"params": {"unet": params}}, {}, wait=True)
"""


def write_full_size(folder: Path, family: str) -> Path:
    """A tiny model whose UNet is replaced by one of full size with random weights."""
    unet, count, dtype, changes = FULL_SIZE[family]
    networks, *rest = FAMILIES[family]
    networks = {name: config | changes.get(name, {}) for name, config in networks.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, (networks, *rest))
        write_model(folder, family=family)
    model = build_model("UNet2DConditionModel", {"_class_name": "UNet2DConditionModel", **unet})
    shapes = torch_shapes(model)
    assert sum(np.prod(shape, dtype=np.int64) for shape in shapes.values()) == count
    stored = np.dtype(jax.numpy.dtype(dtype))
    draw = np.random.default_rng(0)

    def tensor(shape: tuple[int, ...]) -> tensors.Tensor:
        return tensors.Tensor(
            shape, stored, lambda: draw.standard_normal(shape, np.float32).astype(stored, copy=False)
        )

    (folder / "unet" / "config.json").write_text(json.dumps(dict(model.config)))
    tensors.write_tensors(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        {name: tensor(shape) for name, shape in shapes.items()},
    )
    return folder


def measure(*arguments: str) -> float:
    """Runs a command; its peak resident memory in bytes, as `/usr/bin/time -v` says it."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    peak = usage.ru_maxrss * 1024
    print(f"{' '.join(arguments[1:3])}: {peak / 1e9:.2f} GB, {time.perf_counter() - started:.0f} s")
    return peak


def same_unet(one: Path, other: Path) -> bool:
    """Whether two folders hold the same UNet, compared tensor by tensor."""
    first, second = (open_stored(path / "unet", "UNet2DConditionModel") for path in (one, other))
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].read().tobytes() == second[name].read().tobytes()
        for name in first
    )


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: pytest keeps those of its last runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FULL_SIZE)
def test_peak_memory_stays_near_the_size_of_the_unet(family: str, scratch: Path) -> None:
    source = write_full_size(scratch / "source", family)
    _, count, dtype, _ = FULL_SIZE[family]
    size = count * jax.numpy.dtype(dtype).itemsize
    print(f"\n{family} UNet in {dtype}: {size / 1e9:.2f} GB; the limit is {1.3 * size / 1e9:.2f} GB")
    imported, run = scratch / "imported", scratch / "run"
    commands = ["-m", "dspo_jax.convert"]
    peaks = [measure(*commands, "import", f"--model={source}", f"--out={imported}")]
    assert same_unet(imported, source)

    run.mkdir()
    config = common.get_config()
    config.model, config.data.path = str(imported), "pairs"
    (run / "config.json").write_text(config.to_json())
    subprocess.run([sys.executable, "-c", WRITE_CHECKPOINT, str(imported), str(run)], cwd=ROOT, check=True)
    exported, single, again = scratch / "exported", scratch / "single.safetensors", scratch / "again"
    peaks.append(measure(*commands, "export", f"--run={run}", f"--out={exported}"))
    assert same_unet(exported, source)
    peaks.append(measure(*commands, "export", f"--run={run}", f"--out={single}"))
    peaks.append(measure(*commands, "import", f"--model={single}", f"--base={imported}", f"--out={again}"))
    assert same_unet(again, source)
    assert max(peaks) <= 1.3 * size
