"""Prompts and rewards of a run: what is tried before it, what its workdir pins, which weights it holds."""

import dataclasses
import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row
from tiny_run import make_config

from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import make_mesh, on_own_devices, replicated
from dspo_jax.rewards import load_reward, registry
from dspo_jax.rewards.device_pixels import CLIP
from dspo_jax.rewards.network import RewardNetwork, ignore_prompts
from dspo_jax.training.run import Run
from dspo_jax.training.start import make_state, prepare
from dspo_jax.training.workdir import claim_workdir

CHANGES = {
    "stream.kind": "trajectories",
    "stream.images": 2,
    "stream.num_inference_steps": 3,
    "stream.batch_size": 8,
    "advantages.of": "group",
    "rewards.train": "compressibility",
    "batch_size": 8,
    "steps": 4,
    "checkpoint.every": 2,
}
OWN = """
import numpy as np

def good(images, prompts):
    assert [image.shape for image in images] == [(16, 16, 3)] * 2
    assert all(image.dtype == np.uint8 and image.std() > 0 for image in images)
    assert list(prompts) == ["a cat", "a dog"]
    return [0.5, float("nan")]

def one_number(images, prompts):
    return 0.5

def words(images, prompts):
    return ["good", "bad"]

def fails(images, prompts):
    return {"a bird": 1.0}[prompts[0]]

def of_images(images):
    return [0.0 for _ in images]
"""


def config_of(model, **changes):
    return make_config(model, "", {**CHANGES, "stream.prompts": ["a cat", "a dog"], **changes})


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


@each_row("key", ["rewards.train", "rewards.validation"])
@each_row(
    ("function", "message"),
    [
        ("one_number", r"gave scores of shape \[\] for 2 images; it must give \[2\]"),
        ("words", r"gave \['good', 'bad'\]; it must give a number for each image"),
        ("fails", r"failed for two images of noise, uint8\[16, 16, 3\], .*: KeyError: 'a cat'; it must be"),
        ("of_images", r"failed for two images of noise.*: TypeError: of_images\(\) takes 1 positional"),
    ],
)
def test_a_function_that_fails_is_refused_before_weights_are_read(key, function, message, shallow_model, own):
    name = f"{own}:{function}"
    config = config_of(shallow_model, **{key: [name] if key == "rewards.validation" else name})
    with pytest.raises(ValueError, match=rf"^reward {re.escape(name)}: {message}") as error:
        prepare(config)
    assert "\n" not in str(error.value)


def test_a_function_that_gives_numbers_is_tried_with_the_runs_prompts_and_size(shallow_model, own):
    assert prepare(config_of(shallow_model, **{"rewards.train": f"{own}:good"})).own_images is not None


def test_a_workdir_pins_the_prompts_and_the_version_of_the_reward(shallow_model, own, tmp_path):
    prompts, workdir = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a cat\na dog\n")
    changes = {"stream.prompts": [str(prompts)], "rewards.train": f"{own}:good"}

    def claim(**more):
        experiment = prepare(config_of(shallow_model, **changes, **more))
        claim_workdir(workdir, experiment.settings.given, experiment.own_images.pins())

    claim()
    (workdir / "metrics.jsonl").write_text('{"step": 1, "wall_seconds": 1.0, "loss": 0.5}\n')
    claim(**{"rewards.validation": ["colourfulness"]})
    # printf '["a cat", "a dog"]' | sha256sum
    digest = "d7b25492757075e9451ecfab1d2c627062f62c9fd8e42a9a2c96bad1f6f5a8cb"
    assert json.loads((workdir / "pins.json").read_text())["stream.prompts"].endswith(digest)
    own.write_text(OWN.replace("0.5", "0.25"))
    message = (
        rf"^{workdir}/pins\.json: .*with good own\.py \w{{8}}, now config\.rewards\.train = '{own}:good' "
    )
    with pytest.raises(ValueError, match=message + r"gives good own\.py \w{8}; resume"):
        claim()
    own.write_text(OWN)
    prompts.write_text("a cat\na dog\na bird\n")
    message = (
        rf"with 2 prompts with the SHA-256 {digest}, now config\.stream\.prompts = \['{prompts}'\] gives"
    )
    with pytest.raises(ValueError, match=message + r" 3 prompts with the SHA-256 \w{64}; resume"):
        claim()
    (workdir / "pins.json").unlink()  # a run from before there were pins
    claim()
    assert json.loads((workdir / "pins.json").read_text())["stream.prompts"].startswith("3 prompts")


def test_a_workdir_pins_what_the_score_of_a_validation_is_of(shallow_model, tmp_path):
    workdir, prompts = tmp_path / "run", tmp_path / "held_out.txt"
    prompts.write_text("a horse\na cow\n")

    def claim(**more):
        changes = {"rewards.prompts": [str(prompts)], "validation.every": 2, **more}
        experiment = prepare(config_of(shallow_model, **changes))
        claim_workdir(workdir, experiment.settings.given, experiment.own_images.pins())

    claim()
    (workdir / "metrics.jsonl").write_text('{"step": 1, "wall_seconds": 1.0, "loss": 0.5}\n')
    claim(**{"rewards.images": 4})
    with pytest.raises(ValueError, match=r"with scores by compressibility .*gives scores by colourfulness "):
        claim(**{"rewards.validation": ["colourfulness"]})
    claim(**{"validation.every": 0, "rewards.prompts": []})
    prompts.write_text("a horse\na hen\n")
    with pytest.raises(ValueError, match=r"with 2 prompts .*, now config\.rewards\.prompts = .* 2 prompts"):
        claim()


def test_prompts_that_differ_between_processes_are_refused(shallow_model, tmp_path, monkeypatch):
    experiment = prepare(config_of(shallow_model))
    mine = experiment.own_images.pins()
    theirs = dataclasses.replace(experiment.own_images, prompts=["a cat", "a cow"]).pins()

    def claim(other):
        sums = [
            np.stack(
                [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in pins.values()]
            )
            for pins in (mine, other)
        ]

        def gather(of_mine):
            np.testing.assert_array_equal(of_mine, sums[0])
            return np.stack(sums)

        monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
        claim_workdir(tmp_path / "run", experiment.settings.given, mine)

    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "wait_for_all", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^config\.stream\.prompts: is not the same in every process.* here 2 "
    ):
        claim(theirs)
    assert not (tmp_path / "run").exists()
    claim(mine)
    assert (tmp_path / "run" / "pins.json").exists()


SHAPE = (3, 7, 5)  # of the weights of a network that nothing else has


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A reward with weights by the name of a published one: its folder, and the prompts that it scored."""

    def apply(params, pixels, tokens):
        return jnp.einsum("bhwc,cij->b", pixels, params["kernel"]) / pixels.size

    def load(folder):
        numbers = np.random.default_rng(0).standard_normal(np.prod(SHAPE) + 1, np.float32)
        kernel = numbers[1:].reshape(SHAPE)  # a CPU uses arrays of the host that are aligned as they are
        return RewardNetwork("pickscore", "1", {"kernel": kernel}, apply, CLIP, 8, tokenize)

    def tokenize(prompts):
        scored.update(prompts)
        return ignore_prompts(prompts)

    scored = set()
    monkeypatch.setitem(registry.REWARDS, "pickscore", load)
    (tmp_path / "rewards" / "pickscore").mkdir(parents=True)
    return tmp_path / "rewards", scored


def buffers():
    """Where the weights of the network lie on devices."""
    return {
        shard.data.unsafe_buffer_pointer()
        for array in jax.live_arrays()
        if array.shape == SHAPE
        for shard in array.addressable_shards
    }


@pytest.mark.ci
def test_a_trained_reward_is_on_the_devices_once(shallow_model, network, tmp_path):
    folder, scored = network
    changes = {
        "stream.kind": "prompts",
        "rewards.train": "pickscore",
        "rewards.folder": str(folder),
        "samples.every": 2,
        "samples.prompts": ["a goat"],
        "samples.num_inference_steps": 3,
        "rewards.prompts": ["a horse", "a cow", "a hen", "a pig"],
        "validation.every": 2,
    }
    experiment = prepare(config_of(shallow_model, **changes))
    scored.clear()
    assert buffers() == set()
    state, reference = make_state(experiment.task, experiment.mesh)
    placed = buffers()
    assert placed
    run = Run(experiment, tmp_path, state, reference)  # draws and scores held-out images and samples
    assert scored == {"a horse", "a cow", "a hen", "a pig", "a goat"}
    assert buffers() == placed
    images = [np.full((16, 16, 3), shade, np.uint8) for shade in (0, 120, 250)]
    own = experiment.own_images.with_weights(reference["reward"])
    expected = load_reward("pickscore", folder).score(images, [""] * 3)
    np.testing.assert_allclose(own.watched[0].score(images, [""] * 3), expected, rtol=1e-6)
    assert np.ptp(expected) > 0
    del run


@each_row("sizes", [{"data": 1}, {"data": 4}, {"data": 2, "fsdp": 4}])
def test_arrays_of_a_mesh_are_whole_on_the_devices_of_a_process(sizes):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))])
    numbers = np.arange(64, dtype=np.float32).reshape(8, 8)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    arrays = {
        "whole": jax.device_put(numbers, replicated(mesh)),
        "split": jax.device_put(-numbers, split),
        "also split": jax.device_put(2 * numbers, split),
    }
    own, found = on_own_devices(arrays)
    assert own.size == mesh.size
    for name, sign in (("whole", 1), ("split", -1), ("also split", 2)):
        assert found[name].sharding.is_fully_replicated
        np.testing.assert_array_equal(found[name], sign * numbers)
    pointers = [
        {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
        for array in (arrays["whole"], found["whole"])
    ]
    assert pointers[0] == pointers[1]
