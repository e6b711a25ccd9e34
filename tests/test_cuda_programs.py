"""Training programs for NVIDIA GPUs that are not here: lowered by any JAX, compiled by its CUDA plugin."""

import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from jax.sharding import SingleDeviceSharding
from tables import each_row
from tiny_model import FAMILIES, write_model
from tiny_rewards import write_rewards
from tiny_run import make_config

from benchmarks import text_attention
from dspo_jax.kernels import device_kind, layouts
from dspo_jax.kernels.attention import attention
from dspo_jax.kernels.device_kind import DeviceKind, on_mesh
from dspo_jax.parallel.mesh import batch_sharding, make_mesh
from dspo_jax.pipelines import published
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.planning import absent_gpu, parts, program_text
from dspo_jax.planning.plan import explain, plan
from dspo_jax.planning.program_text import read_instructions
from dspo_jax.planning.works import read_works
from dspo_jax.rewards.differentiable import DIVISORS, load_differentiable
from dspo_jax.training.settings import parse
from dspo_jax.training.start import mesh_of

CAPABILITIES = {"H100": "9.0", "A100": "8.0"}
needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs dspo_jax[plan-gpu], the CUDA plugin"
)
CALL = re.compile(r"@__cudnn\$fmhaSoftmax(Backward)?\(")

# Positions of the image, heads, size of a head: each level of the UNets and their middle.
LEVELS = {
    "sd15": [(4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160)],
    "sd21": [(9216, 5, 64), (2304, 10, 64), (576, 20, 64), (144, 20, 64)],
    "sdxl": [(4096, 10, 64), (1024, 20, 64)],
}


@pytest.fixture(params=CAPABILITIES)
def card(request, monkeypatch):
    """The name of a card that is not here, for which all programs are traced."""
    capability = CAPABILITIES[request.param]
    major, minor = capability.split(".")
    kind = DeviceKind("gpu", f"NVIDIA {request.param}", (int(major), int(minor)))
    monkeypatch.setattr(device_kind, "device_kind_of", lambda device: kind)
    with absent_gpu.as_if_here(SimpleNamespace(compute_capability=capability)):
        yield request.param


def lower_attention(query: tuple[int, ...], keys: int, mesh: jax.sharding.Mesh | None = None) -> str:
    """The value and the gradients of one call, lowered for CUDA; of a mesh each device has the same part."""
    mesh = mesh or make_mesh({}, jax.devices()[:1])

    def loss(*arrays: jax.Array) -> jax.Array:
        return attention(*arrays).astype(jnp.float32).sum()

    shapes = [(query[0], length, *query[2:]) for length in (query[1], keys, keys)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch_sharding(mesh)) for shape in shapes]
    gradients = jax.value_and_grad(loss, (0, 1, 2))
    return absent_gpu.lower(jax.jit(on_mesh(gradients, mesh)), *arrays).as_text()


@each_row(
    ("positions", "heads", "head", "keys"),
    [
        *(((*level, keys)) for levels in LEVELS.values() for level in levels for keys in (77, level[0])),
        # Other sizes of images, and one sequence of image and text as other models have.
        (45 * 77, 10, 64, 77),
        (45 * 77, 10, 64, 45 * 77),
        (4096 + 77, 24, 64, 4096 + 77),
        (4429, 24, 64, 4429),
        (1, 8, 40, 1),
    ],
)
def test_attention_is_trained_by_cudnn(positions, heads, head, keys, card):
    text = lower_attention((4, positions, heads, head), keys)
    calls = ["", "Backward"] if head <= 128 or card == "H100" else []
    assert CALL.findall(text) == calls


@each_row(("heads", "part"), [(4, "2x78x2x40"), (5, "2x78x5x40")])
def test_each_device_of_a_mesh_calls_it_for_its_examples_and_heads(heads, part, card):
    text = lower_attention((8, 256, heads, 40), 77, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    assert CALL.findall(text) == ["", "Backward"]
    assert f"tensor<{part}xbf16>" in text


def test_the_keys_that_are_added_are_masked(card):
    text = lower_attention((4, 256, 8, 40), 77)
    assert text.count(r"\22mask_type\22: \22PADDING\22") == 2
    assert "dense<77>" in text  # the number of keys that are not masked
    assert "tensor<4x78x8x40xbf16>" in text
    unmasked = lower_attention((4, 256, 8, 40), 256)
    assert unmasked.count(r"\22mask_type\22: \22NO_MASK\22") == 2


def of_two_pairs(model: str) -> Any:
    """The config of a bfloat16 recipe over a model."""
    changes = {"batch_size": 2, "compute_dtype": "bfloat16", "objective.name": "dspo"}
    return make_config(model, "", changes)


def count_in_step(pipe: Pipeline, model: Any, size: int) -> tuple[int, int]:
    """Attention kernels of a step's program: (forward, backward)."""
    settings, mesh = parse(of_two_pairs(model)), make_mesh({}, jax.devices()[:1])
    program = parts.step(settings, pipe, (size, size), 2, mesh)
    lowered = absent_gpu.lower(program.function, *program.arguments)
    calls = CALL.findall(lowered.as_text())
    return calls.count(""), calls.count("Backward")


@pytest.mark.ci
def test_a_whole_step_is_lowered(shallow_model, card):
    # The policy's and the reference's middle block: of itself, and of 77 tokens.
    assert count_in_step(load_pipeline(shallow_model), shallow_model, 16) == (4, 2)


@pytest.mark.ci
def test_image_and_text_of_an_odd_length_are_trained_by_cudnn(card, tmp_path):
    """4 patches and 85 tokens: three layers of Stable Diffusion 3, in the policy and in the reference."""
    pytest.importorskip("transformers")
    from tiny_sd3 import write_sd3

    model = write_sd3(tmp_path / "model")
    pipe = load_pipeline(model, max_sequence_length=8)
    assert count_in_step(pipe, model, 16) == (6, 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_of_each_family_is_lowered(family, card, tmp_path):
    pipe = load_pipeline(write_model(tmp_path, family=family))
    forward, backward = count_in_step(pipe, tmp_path, 16)
    assert forward == 2 * backward >= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "backward"), [("sd15", {"H100": 32, "A100": 20}), ("sdxl", {"H100": 140, "A100": 140})]
)
def test_the_step_of_a_published_model_is_lowered(model, backward, card):
    pipe = published.architecture(model)
    # Of SD1.5's 16 pairs of layers an A100's kernel takes the 10 whose heads have 128 numbers or fewer.
    assert count_in_step(pipe, model, pipe.image_side) == (2 * backward[card], backward[card])


@needs_plugin
@pytest.mark.gpu_program
def test_a_step_is_compiled_for_a_gpu_that_is_not_here(tmp_path):
    device = absent_gpu.find_devices("h100")[0]
    pipe = load_pipeline(write_model(tmp_path))
    step = parts.step(parse(of_two_pairs(tmp_path)), pipe, (16, 16), 2, make_mesh({}, [device]))
    program = absent_gpu.compile_lowered(step.lower(device))
    found = collections.Counter()
    for work in read_works(program.as_text()):
        found[work.what] += work.times
    assert found["__cudnn$fmhaSoftmax"] > found["__cudnn$fmhaSoftmaxBackward"] >= 4
    assert program.memory_analysis().argument_size_in_bytes > 0


def compile_step_for(topology: str, pipe: Pipeline, changes: dict[str, Any], side: int = 16) -> str:
    """The text of a step on two pairs a GPU; `changes` are to the config."""
    devices = absent_gpu.find_devices(topology)
    config = of_two_pairs(pipe.path)
    config.batch_size = 2 * len(devices)
    config.update_from_flattened_dict(changes)
    settings = parse(config)
    step = parts.step(settings, pipe, (side, side), config.batch_size, mesh_of(settings, devices))
    text: str = absent_gpu.compile_lowered(step.lower(devices[0])).as_text()
    return text


SUMS, GATHERS = "all-reduce", "all-gather"


@needs_plugin
@pytest.mark.gpu_program
@pytest.mark.parametrize(
    ("family", "topology", "changes", "sent"),
    [
        ("sd15", "h100", {}, set()),
        ("sd15", "rtx4090", {"lora.rank": 2}, set()),
        ("sd15", "h100:8", {}, {SUMS}),
        ("sd15", "h100:2x4", {"mesh.data": 2, "mesh.fsdp": 4}, {SUMS, GATHERS}),
        ("sd21", "a100-40", {"accumulation": 2}, set()),
        ("sd21", "rtx4090", {"remat": "blocks"}, set()),
        ("sdxl", "h100", {"optimizer.name": "adafactor"}, set()),
        ("sdxl", "a100-80:2x4", {"lora.rank": 2, "mesh.data": 2, "mesh.fsdp": 4}, {SUMS, GATHERS}),
    ],
)
def test_a_step_is_compiled_to_what_it_should_be(family, topology, changes, sent, tmp_path):
    text = compile_step_for(topology, load_pipeline(write_model(tmp_path, family=family)), changes)
    instructions = list(read_instructions(text))
    types = {instruction.name: instruction.type for instruction in instructions}
    targets = collections.Counter()
    for instruction in instructions:
        if target := re.search(r'custom_call_target="__(cu\w+)\$(\w+)', instruction.rest):
            targets[target[2]] += 1
            if not target[2].startswith("fmha"):  # whose statistics are float32
                factors = re.findall(r"%([\w.-]+)", instruction.rest.split(")")[0])[:2]
                assert not [name for name in factors if types[name].startswith("f32[")], (target[0], factors)
    # Attention of the image to itself and to the text; the reference's and the policy's, and backward.
    assert targets["fmhaSoftmax"] >= 2 * targets["fmhaSoftmaxBackward"] >= 8
    assert {"convBackwardFilter", "convBackwardInput"} & targets.keys()
    kinds = set(program_text.collectives(instructions))
    assert sent <= kinds <= sent | ({"reduce-scatter"} if GATHERS in sent else set())


ONLINE = {"stream.num_inference_steps": 4, "rewards.train": "colourfulness"}


@needs_plugin
@pytest.mark.gpu_program
@pytest.mark.parametrize(
    ("family", "topology", "changes", "sent"),
    [
        ("sd15", "h100", {"stream.kind": "prompts", "reward_gradient.name": "alignprop"}, set()),
        ("sdxl", "rtx4090", {"stream.kind": "prompts", "lora.rank": 2}, set()),
        ("sd21", "a100-40:2x4", {"stream.kind": "prompts", "mesh.data": 2, "mesh.fsdp": 4}, {SUMS, GATHERS}),
        ("sd15", "a100-40", {"stream.kind": "trajectories", "accumulation": 4}, set()),
        ("sdxl", "h100:8", {"stream.kind": "trajectories", "policy_gradient.name": "d3po"}, {SUMS}),
    ],
)
def test_a_step_on_own_images_is_compiled(family, topology, changes, sent, tmp_path):
    """The adjoint's loops, the decoder and the reward; the denoising steps of a policy gradient."""
    text = compile_step_for(
        topology, load_pipeline(write_model(tmp_path, family=family)), {**ONLINE, **changes}
    )
    instructions = list(read_instructions(text))
    targets = collections.Counter(
        found[1] for each in instructions if (found := re.search(r'target="__cudnn\$(\w+)', each.rest))
    )
    # One denoiser forward for the walk and one with gradients, whatever the number of steps.
    assert targets["fmhaSoftmaxBackward"] >= 2
    assert targets["fmhaSoftmax"] >= targets["fmhaSoftmaxBackward"]
    kinds = set(program_text.collectives(instructions))
    assert sent <= kinds


@needs_plugin
@pytest.mark.gpu_program
@pytest.mark.parametrize("topology", ["h100", "rtx4090"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion"])
def test_no_kernel_of_a_convolution_is_moved_or_copied(topology, optimizer, tmp_path, monkeypatch):
    wide = {
        **tiny_model.UNET,
        "block_out_channels": [128, 128],
        "norm_num_groups": 32,
        "attention_head_dim": 4,
    }
    networks, *others = FAMILIES["sd15"]
    monkeypatch.setitem(FAMILIES, "wide", ({**networks, "unet": wide}, *others))
    pipe = load_pipeline(write_model(tmp_path, family="wide"))

    def moved(text: str) -> list[str]:
        """Copies and transposes that give whole parameters or moments of 3 x 3 kernels."""
        return [
            instruction.name
            for instruction in program_text.entry_instructions(text)
            if re.search(r"copy|transpose", f"{instruction.op} {instruction.name}")
            and re.search(r"f32\[(3,3,128,(128|256)|128,3,3,(128|256))\]", instruction.type)
        ]

    assert moved(compile_step_for(topology, pipe, {"optimizer.name": optimizer}, side=256)) == []
    monkeypatch.setattr(layouts, "is_for_cudnn", lambda device: False)
    assert len(moved(compile_step_for(topology, pipe, {"optimizer.name": optimizer}, side=256))) > 20


@needs_plugin
@pytest.mark.gpu_program
@pytest.mark.parametrize("topology", ["h100", "rtx4090:2", "a100-40:2x2"])
def test_a_step_is_planned_for_gpus_that_are_not_here(topology, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    pipe, devices = load_pipeline(write_model(tmp_path)), absent_gpu.find_devices(topology)
    config = of_two_pairs(tmp_path)
    config.batch_size = 2 * len(devices)
    found = plan(parse(config), pipe, devices, size=(16, 16), topology=topology)
    gpu = absent_gpu.parse_topology(topology)[0]
    assert (found.fits, found.pairs_per_device, found.device_bytes) == (True, 2, int(gpu.memory))
    assert found.hbm_bytes == int(gpu.memory * 0.75)
    kinds = found.roofline
    assert found.estimated_seconds == pytest.approx(
        sum(entry["seconds"] for kind, entry in kinds.items() if kind != "collectives")
    )
    assert ("collectives" in kinds) == (len(devices) > 1)
    assert {"products", "convolutions", "attention", "optimizer"} <= kinds.keys()
    # The reference's pass is computed as well as the policy's; a library's products are padded, not fewer.
    in_kernels = sum(entry["flops"] for entry in kinds.values())
    assert in_kernels > 0.8 * found.flops
    assert all(line.strip() for line in explain(found))
    assert any("models/blocks.py:" in line for line in explain(found))


@needs_plugin
@pytest.mark.gpu_program
@pytest.mark.parametrize("topology", ["a100-40", "rtx4090", "h100"])
@pytest.mark.parametrize("part", [part for part in parts.PARTS if part != "step"])
def test_what_is_done_around_a_run_is_planned(part, topology, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pipe, devices = load_pipeline(write_model(tmp_path)), absent_gpu.find_devices(topology)
    found = plan(parse(of_two_pairs(tmp_path)), pipe, devices, size=(16, 16), topology=topology, part=part)
    assert found.fits
    assert found.flops == sum(entry["flops"] for entry in found.roofline.values())
    assert found.roofline["convolutions"]["flops"] > 0
    assert "optimizer" not in found.roofline
    if part == "sample":  # every convolution of the UNet runs as often as there are steps
        assert found.roofline["convolutions"]["count"] >= 50


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """A folder of small weights of every reward."""
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("rewards")
    write_rewards(tmp_path_factory.mktemp("published"), out)
    return out


@needs_plugin
@pytest.mark.gpu_program
@pytest.mark.parametrize("topology", ["a100-40", "rtx4090", "h100"])
@pytest.mark.parametrize("name", DIVISORS)
def test_rewards_and_their_gradients_are_computed_in_float32(name, topology, rewards):
    """With all bits, as on a CPU: in TF32 or bfloat16 a score would depend on the device."""
    reward = load_differentiable(name, rewards)
    device = absent_gpu.find_devices(topology)[0]
    arguments = reward.params, np.zeros((2, 64, 64, 3), np.float32), reward.tokenize(["a red cat", ""])

    def total(pixels, params, tokens):
        return reward.function(params, pixels, tokens).sum()

    params, pixels, tokens = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device)),
        arguments,
    )
    with absent_gpu.as_if_here(device):
        lowered = absent_gpu.lower(jax.jit(jax.value_and_grad(total)), pixels, params, tokens)
        text = absent_gpu.compile_lowered(lowered).as_text()
    found = {work.dtype for work in read_works(text) if work.flops}
    assert found == (set() if name == "colourfulness" else {"float32"})


@needs_plugin
@pytest.mark.gpu_program
def test_the_padded_kernel_moves_less_than_attention_written_out(monkeypatch):
    device = absent_gpu.find_devices("h100")[0]
    moved = {}
    for backend in ("plain", "cudnn"):
        monkeypatch.setenv("DSPO_ATTENTION", backend)
        lowered = text_attention.lower_layer(device, text_attention.CASES["SD1.5 64x64"], 4)
        works = read_works(absent_gpu.compile_lowered(lowered).as_text())
        moved[backend] = sum(work.times * work.bytes for work in works)
    assert moved["cudnn"] < moved["plain"] / 2


@needs_plugin
@pytest.mark.gpu_program
def test_the_command_plans_the_emoji_model_for_a_gpu(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
    flags = ["--config=configs/emoji_dspo.py", "--config.data.path=", "--topology=rtx3060", "--memory_only"]
    command = [sys.executable, "-m", "dspo_jax.plan", *flags, "--explain", f"--json={tmp_path / 'plan.json'}"]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["topology"], found["devices"], found["fits"]) == ("rtx3060", 1, True)
    assert found["hbm_bytes"] == 9e9  # three quarters of 12 GB
    assert 0 < found["mfu"] < 1
    assert f"{found['pairs_per_second_per_device']:.4g} pairs/s on each device" in said
    assert len(found["longest"]) == 20 == len(re.findall(r"^ +[\d.]+ ms ", said, re.MULTILINE))
    # The same program is not compiled again.
    again = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert again == said
