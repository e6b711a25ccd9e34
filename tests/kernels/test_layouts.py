"""The order in which kernels lie in memory: chosen for NVIDIA's GPUs alone."""

from types import SimpleNamespace

import jax
import numpy as np
from jax.experimental.layout import Format
from tables import each_row

from dspo_jax.kernels import layouts
from dspo_jax.parallel.mesh import make_mesh, replicated


@each_row(
    ("platform", "capability", "chosen"), [("gpu", "9.0", True), ("gpu", "gfx90a", False), ("cpu", "", False)]
)
def test_kernels_lie_as_cudnn_reads_them_on_nvidia_gpus_alone(platform, capability, chosen):
    there = make_mesh({}, jax.devices()[:1])
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    shapes = {"kernel": np.zeros((3, 3, 4, 8)), "scale": np.zeros(8), "linear": np.zeros((4, 8))}
    shardings = dict.fromkeys(shapes, replicated(there))
    found = layouts.choose_formats(shapes, shardings, SimpleNamespace(devices=np.array([device])))
    assert [name for name, where in found.items() if isinstance(where, Format)] == ["kernel"] * chosen
    assert {name: getattr(where, "sharding", where) for name, where in found.items()} == shardings
