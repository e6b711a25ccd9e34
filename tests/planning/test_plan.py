"""What a run would take on devices that are not here."""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from processes import ROOT
from tables import each_row
from test_compiled import BUFFERS, TPU_TEXT
from tiny_run import make_config

from dspo_jax.monitoring.devices import count_flops
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.pipelines import published
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.planning import compilation, parts
from dspo_jax.planning import plan as plan_module
from dspo_jax.planning.plan import (
    KERNEL_EFFICIENCY,
    Plan,
    _judge,
    assume_stored_states,
    describe_plan,
    find_devices,
    image_size,
    largest_that_fits,
    plan,
)
from dspo_jax.planning.program_text import collectives, read_instructions
from dspo_jax.planning.works import read_works
from dspo_jax.training.costs import abstract_batch, flops_per_example
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_state
from dspo_jax.training.step import lower_step

V5P = SimpleNamespace(device_kind="TPU v5", platform="tpu")
FACTS = {
    "peak_bytes": 50 * 2**30,
    "hbm_bytes": None,
    "argument_bytes": 2**30,
    "temporary_bytes": 2**30,
    "bytes_accessed": 1e12,
    "compiler_seconds": 0.1,
    "loop_factor": 1.5,
    "collectives": {
        "all-reduce": {"count": 1, "bytes": 3_000_000_000, "asynchronous": 1_200_000_000},
        "all-gather": {"count": 2, "bytes": 6_000_000_000, "asynchronous": 6_000_000_000},
    },
    # The first is bound by its products, the second by memory.
    "kernel_calls": [
        ["splash_mha_fwd.1", [[1], [8, 8, 40, 4096], [8, 8, 40, 4096]], 100, 2],
        ["splash_mha_dkv.7", [[8, 8, 128, 128], [8, 8, 128, 128]], 2_765_000_000, 1],
        ["somebody_elses.2", [[4]], 0, 1],
    ],
    "compile_seconds": 60.0,
}


def test_what_is_added_to_the_compilers_estimate():
    found = _judge(FACTS, V5P, 4, 10e12)
    assert found["loop_seconds"] == pytest.approx(0.05)
    forward = 2 * 2 * 64 * 4096 * 4096 * 128
    assert found["kernels"] == {
        "splash_mha_fwd": {"count": 2, "flops": 2 * forward},
        "splash_mha_dkv": {"count": 1, "flops": 5 * 2 * 64 * 128**3},
        "somebody_elses": {"count": 1, "flops": 0},
    }
    kernels = 2 * forward / (459e12 * KERNEL_EFFICIENCY) + 2.765e9 / 2765e9
    assert found["kernel_seconds"] == pytest.approx(kernels)
    assert found["estimated_seconds"] == pytest.approx(0.15 + kernels)
    assert found["pairs_per_second_per_device"] == pytest.approx(4 / (0.15 + kernels))
    assert found["mfu"] == pytest.approx(10e12 / (0.15 + kernels) / 459e12)
    assert found["collective_seconds"] == pytest.approx((2 * 3e9 + 6e9) / 600e9)
    assert found["exposed_seconds"] == pytest.approx(2 * 1.8e9 / 600e9)
    assert found["fits"]


def test_where_nothing_is_estimated_nothing_is_said():
    too_large = _judge({"peak_bytes": 20 * 2**30, "hbm_bytes": 16 * 2**30}, V5P, 4, 1e12)
    assert (too_large["fits"], too_large.get("estimated_seconds")) == (False, None)
    here = _judge(FACTS, jax.devices()[0], 4, 1e12)
    assert (here["fits"], here.get("estimated_seconds")) == (None, None)


def test_the_compilers_estimate_without_what_it_does_not_know():
    text = 'x = custom-call(%a), custom_call_target="ConcatBitcast"\n' * 2
    assert compilation.expected_seconds({"optimal_seconds": -1.75}, text) == pytest.approx(0.25)
    assert compilation.expected_seconds({"optimal_seconds": -1.0}, "") is None
    assert compilation.expected_seconds({}, "") is None


def test_the_largest_batch_fills_what_the_state_leaves():
    assert largest_that_fits(100, 30, 10, 4, 1) == 18  # 5 a pair
    assert largest_that_fits(100, 30, 10, 4, 4) == 16
    assert largest_that_fits(24, 30, 10, 4, 1) == 2
    assert largest_that_fits(8, 30, 10, 4, 1) == 0
    assert largest_that_fits(None, 30, 10, 4, 1) is None
    assert largest_that_fits(100, 10, 10, 4, 1) is None


@each_row(
    "said",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(33.94G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.94G of 15.75G hbm. Exceeded hbm "
        "capacity by 18.19G.",
    ],
)
def test_a_program_that_is_too_large_does_not_fit(said):
    def compile():
        raise jax.errors.JaxRuntimeError(said)

    facts = compilation.compile_facts(SimpleNamespace(compile=compile))
    assert facts == {"peak_bytes": int(33.94 * 2**30), "hbm_bytes": int(15.75 * 2**30)}


def test_another_error_of_the_compiler_is_not_taken_for_it():
    def compile():
        raise jax.errors.JaxRuntimeError("INTERNAL: Used 3 of 4 registers")

    with pytest.raises(jax.errors.JaxRuntimeError, match="registers"):
        compilation.compile_facts(SimpleNamespace(compile=compile))


# Notes the memory as XLA does, with files that grow side by side, and then goes on for ever.
COMPILER = """
import os, pathlib, re, sys, time
folder = pathlib.Path(re.search("--xla_dump_to=([^ ]+)", os.environ["XLA_FLAGS"])[1])
begin = str(folder / "module_0003.jit_train_step.cl_1.after_optimizations")
buffers = pathlib.Path(begin + "-buffer-assignment.txt")
buffers.touch()
time.sleep(1)
pathlib.Path(begin + ".txt").write_text(sys.argv[1])
buffers.write_text(sys.argv[2][:100])
time.sleep(1)
buffers.write_text(sys.argv[2])
time.sleep(1000)
"""


def test_a_compiler_is_ended_as_soon_as_it_has_noted_the_memory():
    facts = compilation.memory_facts([sys.executable, "-c", COMPILER, TPU_TEXT, BUFFERS], "jit_train_step")
    assert facts == {
        "peak_bytes": 13_888,
        "hbm_bytes": None,
        "argument_bytes": 5120,
        "temporary_bytes": 8768,
        "collectives": collectives(read_instructions(TPU_TEXT)),
    }
    found = _judge(facts, V5P, 4, 10e12)
    assert (found["fits"], found["peak_bytes"], found["compiler_seconds"]) == (True, 13_888, None)


def test_a_compiler_that_ends_before_has_the_last_word():
    assert compilation.memory_facts([sys.executable, "-c", "raise SystemExit(3)"], "jit_train_step") == 3


@pytest.mark.ci
def test_the_step_of_a_run_on_the_devices_that_are_here(shallow_model, monkeypatch, tmp_path):
    monkeypatch.setattr(Pipeline, "read_params", lambda *given: pytest.fail("weights were read"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = parse(make_config(shallow_model, "", {"accumulation": 2, "batch_size": 16}))
    pipe = load_pipeline(shallow_model)

    def ask() -> Plan:
        return plan(settings, pipe, jax.devices(), size=(16, 16))

    found = ask()
    assert (found.topology, found.devices, found.mesh["data"]) == ("present", 8, 8)
    task = make_task(settings, pipe)
    assert found.flops == pytest.approx(2 * flops_per_example(task, 2, (16, 16)))
    # 12,364 parameters and their two moments; their gradients are summed over the devices.
    assert found.argument_bytes > 3 * 4 * 12_364
    assert found.peak_bytes >= found.argument_bytes + found.temporary_bytes
    assert found.collectives["all-reduce"]["bytes"] > 4 * 12_364
    assert (found.fits, found.estimated_seconds) == (None, None)
    said = "\n".join(describe_plan(found))
    assert "2 pairs on each, 16 a step" in said
    assert "all-reduce: " in said

    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *given: pytest.fail("compiled again"))
    assert ask() == found


@pytest.mark.ci
def test_devices_that_split_the_parameters_send_one_another_no_image(shallow_model):
    """What is gathered are parameters; XLA by itself would rather gather images and split channels."""
    config = make_config(shallow_model, "", {"batch_size": 8})
    task, mesh = make_task(parse(config), load_pipeline(shallow_model)), make_mesh({"data": 2, "fsdp": 4})
    state, reference = make_state(task, mesh, {}, abstract=True)
    text = lower_step(state, reference, abstract_batch(task, 2, (16, 16), 8, mesh), mesh).compile().as_text()
    of_parameters = {leaf.shape for leaf in jax.tree.leaves(reference)}
    gathered = set()
    for instruction in read_instructions(text):
        assert not instruction.op.startswith("all-to-all")
        if instruction.op.startswith("all-gather"):
            shapes = re.findall(r"\[([\d,]*)\]", instruction.type)
            gathered |= {tuple(int(size) for size in shape.split(",")) for shape in shapes}
    assert len(gathered) > 5
    assert gathered <= of_parameters


def test_the_size_of_the_images(shallow_model, tiny_pairs):
    pipe = load_pipeline(shallow_model)
    data = parse(make_config(shallow_model, tiny_pairs)).data
    assert image_size(data, pipe, None) == (16, 16)
    assert image_size(data, pipe, 32) == (32, 32)
    data = dataclasses.replace(data, path="not/here")
    assert image_size(data, pipe, None) == (16, 16)
    data = dataclasses.replace(data, path=None)
    assert image_size(data, published.architecture("sdxl"), None) == (1024, 1024)


@each_row(
    ("name", "changes", "shape"),
    [
        ("sd35-medium", {}, (256, 4096)),
        ("sd35-medium", {"train_text_encoder": True}, None),
        ("sd35-medium", {"stream.kind": "self_play"}, None),
        ("sd15", {}, None),
    ],
)
def test_t5s_states_are_planned_as_stored_where_a_run_has_them_so(name, changes, shape, tmp_path):
    settings = parse(make_config(tmp_path, tmp_path, changes))
    pipe = assume_stored_states(settings, published.architecture(name))
    assert (pipe.stored_states and pipe.stored_states[""].shape) == shape
    assert ("text_encoder_3" in pipe.components) == (name != "sd15" and shape is None)


def test_the_size_of_a_model_for_images_that_are_not_square(shallow_model, tmp_path):
    model = shutil.copytree(shallow_model, tmp_path / "model")
    path = model / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": [6, 4]}))
    data = parse(make_config(model, "not/here")).data
    assert image_size(data, load_pipeline(model), None) == (24, 16)


def test_a_batch_that_cannot_be_split_is_refused(shallow_model):
    settings = parse(make_config(shallow_model, "", {"accumulation": 2, "batch_size": 8}))
    with pytest.raises(ValueError, match=r"--pairs_per_device \* devices / config\.accumulation = 4: not a"):
        plan(settings, load_pipeline(shallow_model), jax.devices(), size=(16, 16))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU's compiler is here")
def test_without_the_compiler_a_topology_is_refused():
    with pytest.raises(ValueError, match=r"--topology=v5e:2x2: .* pip install 'dspo_jax\[plan\]'"):
        find_devices("v5e:2x2")


def test_a_topology_of_unknown_chips_is_refused_before_anything_is_compiled(monkeypatch):
    described = SimpleNamespace(devices=[SimpleNamespace(device_kind="TPU v4")])
    monkeypatch.setattr(plan_module.topologies, "get_topology_desc", lambda *given: described)
    with pytest.raises(ValueError, match=r"^--topology=v4:2x2x1: nothing is known here of a TPU v4's memory"):
        find_devices("v4:2x2x1")


@pytest.mark.ci
@each_row(
    ("changes", "trips", "each"),
    [
        # Of a step that is trained: forward, and backward by states and parameters; ReFL's way goes forward.
        ({"reward_gradient.name": "draft_k", "reward_gradient.k": 3.0}, 3, 3),
        ({"reward_gradient.name": "alignprop"}, 4, 3),
        (
            {
                "reward_gradient.name": "refl",
                "reward_gradient.first": 0.5,
                "reward_gradient.threshold": 2.0,
            },
            6,
            1,
        ),
    ],
)
def test_the_loop_of_a_reward_gradient_counts_as_often_as_it_runs(changes, trips, each, shallow_model):
    """By XLA's own count of the network's FLOPs; 8 steps, two predictions each."""
    online = {"stream.kind": "prompts", "stream.prompts": ["a cat"] * 4, "rewards.train": "colourfulness"}
    online |= {"stream.num_inference_steps": 8, "stream.guidance_scale": 3.0, "batch_size": 4}
    settings = parse(make_config(shallow_model, "", {**online, **changes}))
    pipe = load_pipeline(shallow_model)
    program = parts.step(settings, pipe, pipe.image_size, 4, make_mesh({"data": 1}, jax.devices()[:1]))
    assert program.open_trips == trips
    text = program.lower().compile().as_text()
    once, twice = (sum(work.times * work.flops for work in read_works(text, n)) for n in (1, 2))
    assert (twice - once) / _network_flops(pipe, 8) == pytest.approx(each, rel=0.2)


def _network_flops(pipe, images):
    params = {name: pipe.networks[name].abstract_params() for name in pipe.components}
    text = jax.eval_shape(
        pipe.encode_conditioning, params, {"tokens": jax.ShapeDtypeStruct((images, 1, 77), jnp.int32)}
    )
    latents = jax.ShapeDtypeStruct((images, *pipe.latent_size, pipe.latent_channels), jnp.float32)
    timesteps = jax.ShapeDtypeStruct((images,), jnp.int32)
    return count_flops(pipe.predict, params, latents, timesteps, text)


def test_what_was_compiled_with_other_flags_or_for_another_topology_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    count = itertools.count()
    monkeypatch.setattr(compilation, "compile_facts", lambda lowered, trips: {"number": next(count)})
    program = SimpleNamespace(as_text=lambda: "module @f")

    def number(topology: str = "v5p:2x2x1", trips: int = 1) -> int:
        return compilation.kept_facts(program, V5P, topology, trips)["number"]

    assert [number(), number(), number("v5p:1x2x2"), number()] == [0, 0, 1, 0]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_jf_hlo_deduplication=true")
    assert number() == 2
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_dump_to=folder")
    assert number() == 2
    assert [number(trips=10), number(trips=10), number()] == [3, 3, 2]


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler, libtpu"
)


@pytest.mark.slow
@needs_libtpu
def test_a_launched_step_sums_its_gradients_beside_the_backward_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = (ROOT / "launch" / "train.sh").read_text().replace("exec python", "echo $LIBTPU_INIT_ARGS # ")
    needed = {"CONFIG": "any", "WORKDIR": str(tmp_path / "run"), "PATH": os.environ["PATH"]}
    launched = subprocess.run(["bash", "-c", script], env=needed, capture_output=True, text=True).stdout
    command = ["--config=configs/emoji_dspo.py", "--config.data.path=", "--topology=v5p:2x2x1"]
    command = [sys.executable, "-m", "dspo_jax.plan", *command, "--memory_only"]
    shares = []
    for flags in ("", launched.strip()):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
        subprocess.run([*command, f"--json={tmp_path / 'plan.json'}"], check=True)
        sums = json.loads((tmp_path / "plan.json").read_text())["collectives"]["all-reduce"]
        shares.append(sums["asynchronous"] / sums["bytes"])
    assert shares[0] == 0
    assert shares[1] > 0.8  # small sums stay where they were


@pytest.mark.slow
@needs_libtpu
def test_the_emoji_model_on_four_tpus(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ["--config=configs/emoji_dspo.py", "--config.data.path=", "--topology=v5e:2x2"]
    subprocess.run(
        [sys.executable, "-m", "dspo_jax.plan", *flags, f"--json={tmp_path / 'plan.json'}"], check=True
    )
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"]
    assert (found["topology"], found["devices"], found["device_kind"]) == ("v5e:2x2", 4, "TPU v5 lite")
    assert 0 < found["mfu"] < 1
    assert found["pairs_per_second_per_device"] == pytest.approx(8 / found["estimated_seconds"])
    assert found["collectives"]["all-reduce"]["bytes"] > 4 * 3e6
    assert found["peak_bytes"] < found["hbm_bytes"]
    assert found["largest_pairs_per_device"] > 8

    flags = [*flags, "--memory_only", "--config.batch_size=64"]
    subprocess.run(
        [sys.executable, "-m", "dspo_jax.plan", *flags, f"--json={tmp_path / 'memory.json'}"], check=True
    )
    memory = json.loads((tmp_path / "memory.json").read_text())
    assert (memory["fits"], memory["compile_seconds"], memory["collectives"]) == (
        True,
        None,
        found["collectives"],
    )
    assert memory["argument_bytes"] == pytest.approx(found["argument_bytes"], rel=0.01)
    assert found["argument_bytes"] < memory["peak_bytes"] < 2 * found["peak_bytes"]
