"""The reference and the optimizer's state in the host's memory: same numbers, where they lie, refusals."""

import dataclasses
import re
from types import SimpleNamespace

import dense_task
import jax
import numpy as np
import optax
import pytest
from tables import each_row
from tiny_run import make_config, read_reproducible

from dspo_jax.errors import UserError
from dspo_jax.parallel.host_memory import check_host_memory, on_host
from dspo_jax.parallel.mesh import make_mesh, shard_batch
from dspo_jax.parallel.rules import bytes_per_device, host_bytes_per_device, make_shardings
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.describe import describe_host_bytes, held
from dspo_jax.training.make_task import make_task
from dspo_jax.training.run import train
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_state
from dspo_jax.training.step import compile_step
from dspo_jax.weights.checkpoints import Checkpoints

BOTH = ("moments", "reference")


def place(mesh, offload, changes):
    """Step, state and reference of the dense task on a mesh."""
    changes = {"optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01)), **changes}
    task = dense_task.make_task("diffusion_dpo", changes, beta=10.0)
    state, reference = dense_task.make_state(task), dense_task.make_reference(task, seed=1)
    formats, frozen = make_shardings(state, mesh), make_shardings(reference, mesh)
    if "moments" in offload:
        formats = dataclasses.replace(formats, opt_state=on_host(state.opt_state, formats.opt_state))
    if "reference" in offload:
        frozen["unet"] = on_host(reference["unet"], frozen["unet"])
    state, reference = jax.device_put(state, formats), jax.device_put(reference, frozen)
    return compile_step(state), state, reference


def memory_kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.shape}


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [({"data": 1}, {}), ({"fsdp": 2, "tensor": 2}, {"accumulation": 2})],
    ids=["one device", "in parts on a mesh"],
)
def test_steps_are_the_same_bit_for_bit_also_after_a_checkpoint(sizes, changes, tmp_path):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    batch, key, states = shard_batch(dense_task.make_batch(), mesh), jax.random.key(0), []
    for offload in ((), BOTH):
        step, state, reference = place(mesh, offload, changes)
        state, metrics = step(state, reference, batch, key)
        if offload:
            with Checkpoints(tmp_path / "checkpoints") as checkpoints:
                checkpoints.save(1, state.arrays(), {}, wait=True)
                shapes = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
                    state.arrays(),
                )
                restored, _, _ = checkpoints.restore(shapes)
            state = dataclasses.replace(state, **restored)
            assert memory_kinds(reference["unet"]) == memory_kinds(state.opt_state) == {"pinned_host"}
        state, metrics = step(state, reference, batch, key)
        states.append((state.arrays(), metrics))
        kinds = memory_kinds(state.opt_state)
        assert kinds == ({"pinned_host"} if offload else memory_kinds(state.params))
        assert memory_kinds(state.params) != {"pinned_host"}
    assert_same(*states)


def start(model, pairs, changes):
    config = make_config(model, pairs, {"objective.name": "diffusion_dpo", **changes})
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    return make_state(make_task(parse(config), load_pipeline(model)), mesh, abstract=True)


def test_a_run_holds_only_its_own_copies_on_the_host(shallow_model, tiny_pairs):
    usual = held(*start(shallow_model, tiny_pairs, {}))
    parts = held(*start(shallow_model, tiny_pairs, {"offload": BOTH}))
    unet = parts["reference"]["unet"]
    assert memory_kinds(unet) == memory_kinds(parts["optimizer"]) == {"pinned_host"}
    for name in usual:
        on_device, on_host = bytes_per_device(parts[name]), host_bytes_per_device(parts[name])
        assert on_device + on_host == bytes_per_device(usual[name])
        assert (on_host > 0) == (name in ("reference", "optimizer"))
    # The policy reads the text encoder, too.
    assert host_bytes_per_device(parts["reference"]) == bytes_per_device(usual["reference"]["unet"])
    assert not list(describe_host_bytes(usual))
    (line,) = describe_host_bytes(parts)
    assert re.findall("optimizer|reference", line) == ["optimizer", "reference"]


@each_row(
    "changes, words",
    [
        ({"offload": ("moment",)}, ["config.offload = ('moment',)", "'moments'", "'reference'"]),
        (
            {"offload": BOTH, "lora.rank": 2},
            ["config.offload = ['moments', 'reference']", "config.lora", "int8"],
        ),
        ({"offload": ("reference",), "objective.name": "sft"}, ["config.offload = ['reference']", "'sft'"]),
    ],
    ids=["another name", "adapters", "no reference"],
)
def test_what_would_save_nothing_is_refused(changes, words, shallow_model, tiny_pairs):
    with pytest.raises(UserError) as raised:
        start(shallow_model, tiny_pairs, changes)
    assert all(word in str(raised.value) for word in words)


def test_devices_without_host_memory_are_refused():
    gpu = SimpleNamespace(device_kind="NVIDIA L4", addressable_memories=lambda: [])
    with pytest.raises(UserError, match=r"config\.offload: .*NVIDIA L4.*leave it empty"):
        check_host_memory(gpu)
    check_host_memory(jax.devices()[0])


@pytest.mark.slow
def test_a_run_goes_on_with_another_place_for_its_arrays(shallow_model, tiny_pairs, tmp_path):
    changes = {"steps": 4, "validation.every": 2, "reference.every": 2}
    train(make_config(shallow_model, tiny_pairs, changes), tmp_path / "whole")
    for steps, offload in ((2, BOTH), (4, ())):
        here = changes | {"steps": steps, "offload": offload}
        assert train(make_config(shallow_model, tiny_pairs, here), tmp_path / "resumed").step == steps
    whole, resumed = (read_reproducible(tmp_path / name) for name in ("whole", "resumed"))
    assert whole == resumed
