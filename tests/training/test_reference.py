"""A run that is compared with another model than its start: values, memory, resuming and refusals."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import UNET_FILE, edit
from tables import each_row, slow
from tiny_model import random_params, write_tokenizer
from tiny_run import make_config, read_batches, read_reproducible

from dspo_jax.conversion.export_model import export
from dspo_jax.parallel.mesh import replicated, shard_batch
from dspo_jax.pipelines.conditioning_inputs import drop_captions
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.describe import describe_run, held
from dspo_jax.training.dry_run import estimate
from dspo_jax.training.losses.preference import draw_noise
from dspo_jax.training.make_task import make_task
from dspo_jax.training.moving_reference import MoveReference
from dspo_jax.training.reference import open_reference
from dspo_jax.training.run import train
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_adapters, make_state, mesh_of, prepare
from dspo_jax.training.step import compile_step
from dspo_jax.training.task import of_components, policy_params
from dspo_jax.training.validation import judge
from dspo_jax.training.workdir import claim_workdir
from dspo_jax.weights.checkpoints import Checkpoints
from dspo_jax.weights.components import write_params
from dspo_jax.weights.layout import flatten

DPO = {"objective.name": "diffusion_dpo", "objective.beta": 20.0}
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def other_model(shallow_model, tmp_path_factory):
    """The shallow model with another UNet and text encoder."""
    folder = shutil.copytree(shallow_model, tmp_path_factory.mktemp("model") / "other")
    pipe, draw = load_pipeline(folder), np.random.default_rng(5)
    for name in pipe.components:
        write_params(folder / name, pipe.networks[name], random_params(pipe.networks[name], draw))
    return folder


def make_lora_run(workdir, model, pairs):
    """A workdir with the checkpoint 4 of adapters that add something; returns them too."""
    config = make_config(model, pairs, {"lora.rank": 2})
    adapters = make_adapters(parse(config), load_pipeline(model))
    draw = np.random.default_rng(3)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * draw.standard_normal(leaf.shape), jnp.float32), adapters
    )
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json())
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(4, {"params": adapters, "opt_state": jnp.zeros(3)}, {}, None, wait=True)
    return adapters


def read(model):
    pipe = load_pipeline(model)
    return {name: pipe.read_params(name, "float32") for name in pipe.components}


def direct_loss(task, policy, reference, batch, key):
    """-log sigmoid(-(beta/2) D) in float64 NumPy, of predictions from two plain trees."""
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    latents, noise, timesteps, drop = draw_noise(task.loss.draws, batch, key)
    batch = drop_captions(task.pipe, batch, drop)
    noisy = task.pipe.schedule.add_noise(latents, noise, timesteps)
    run = jax.jit(task.pipe.predict_pairs)
    errors = [
        np.square(np.float64(run(params, noisy, timesteps, batch)) - np.float64(noise)).mean((2, 3, 4))
        for params in (policy, reference)
    ]
    gain = errors[0] - errors[1]
    return np.mean(np.log1p(np.exp(20.0 / 2 * (gain[:, 0] - gain[:, 1]))))


def make_run(model, pairs, changes, devices=1):
    """Task, state at step 0 and frozen parameters of a run with a reference, on so many devices."""
    settings, pipe = parse(make_config(model, pairs, DPO | changes)), load_pipeline(model)
    mesh = mesh_of(settings, jax.devices()[:devices])
    task = make_task(settings, pipe, reference=open_reference(settings.reference.model, pipe))
    return task, mesh, *make_state(task, mesh, make_adapters(settings, pipe))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("changes", "own", "devices"),
    [
        ({}, {"text_encoder"}, 1),
        slow({"train_text_encoder": True}, set(), 1),
        ({"lora.rank": 2}, {"unet", "text_encoder"}, 1),
        slow({"mesh.data": 1, "mesh.fsdp": 2}, {"text_encoder"}, 2),
    ],
    ids=["unet", "both", "lora", "fsdp"],
)
def test_the_first_loss_is_that_of_the_two_models(
    changes, own, devices, shallow_model, other_model, tiny_pairs
):
    changes = {"reference.model": str(other_model), **changes}
    task, mesh, state, reference = make_run(shallow_model, tiny_pairs, changes, devices)
    assert reference.get("policy", {}).keys() == own
    (batch,) = read_batches(tiny_pairs, batch_size=8, count=1)
    expected = direct_loss(task, read(shallow_model), read(other_model), batch, jax.random.key(0))
    assert abs(expected - np.log(2)) > 0.05  # the models do differ
    before = jax.tree.map(np.asarray, reference)
    key = jax.device_put(jax.random.key(0), replicated(mesh))
    state, metrics = compile_step(state)(state, reference, shard_batch(batch, mesh), key)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=2e-5)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, reference))


def test_the_own_start_as_a_reference_is_held_once(shallow_model, tiny_pairs, tmp_path):
    copy = shutil.copytree(shallow_model, tmp_path / "copy")
    task, _, _, reference = make_run(
        shallow_model, tiny_pairs, {"lora.rank": 2, "reference.model": str(copy)}
    )
    assert task.reference.differing == ()
    assert reference.keys() == {"unet", "text_encoder"}


def test_a_run_with_lora_is_a_reference_with_its_products_added(shallow_model, tiny_pairs, tmp_path):
    adapters = flatten(make_lora_run(tmp_path / "run", shallow_model, tiny_pairs))
    changes = {"reference.model": str(tmp_path / "run")}
    task, _, state, reference = make_run(shallow_model, tiny_pairs, changes)
    assert task.reference.differing == ("unet",)  # the text encoder is held once
    assert reference.keys() == {"unet", "text_encoder"}
    start = flatten(read(shallow_model))
    jax.tree.map(
        np.testing.assert_array_equal,
        flatten(state.params),
        {path: leaf for path, leaf in start.items() if path.startswith("unet")},
    )
    moved = {path.removesuffix(".lora_A.kernel") for path in adapters if path.endswith(".lora_A.kernel")}
    for path, leaf in flatten(reference).items():
        expected = np.float64(start[path])
        if (layer := path.removesuffix(".kernel")) in moved:
            factors = (np.float64(adapters[f"{layer}.lora_{each}.kernel"]) for each in "AB")
            expected = expected + np.matmul(*(each.reshape(-1, each.shape[-1]) for each in factors)).reshape(
                expected.shape
            )
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)


@each_row("rank", [0, 2])
def test_a_reference_that_moves_becomes_the_policy(rank, shallow_model, other_model, tiny_pairs):
    changes = {"lora.rank": rank, "reference.model": str(other_model)}
    task, _, state, reference = make_run(shallow_model, tiny_pairs, changes)
    params = jax.tree.map(lambda leaf: leaf + 0.5, state.params)
    theirs = jax.tree.map(np.asarray, of_components(task, reference))
    policy = policy_params(task, params, reference)
    MoveReference(reference, params, every=1, decay=0.75)(None, dataclasses.replace(state, params=params), {})
    jax.tree.map(
        lambda now, then, ours: np.testing.assert_allclose(
            now, 0.75 * np.float64(then) + 0.25 * np.float64(ours), rtol=1e-5, atol=1e-6
        ),
        of_components(task, reference),
        theirs,
        policy,
    )
    jax.tree.map(np.testing.assert_array_equal, policy, policy_params(task, params, reference))
    MoveReference(reference, params, every=1, decay=0)(None, dataclasses.replace(state, params=params), {})
    jax.tree.map(np.testing.assert_array_equal, of_components(task, reference), policy)


@pytest.mark.ci
@pytest.mark.parametrize(
    "changes", [slow({}), {"lora.rank": 2, "reference.every": 2}], ids=["fixed", "moves"]
)
def test_a_run_with_a_reference_goes_on_as_if_it_had_not_stopped(
    changes, shallow_model, other_model, tiny_pairs, tmp_path
):
    changes = DPO | {"reference.model": str(other_model), "checkpoint.every": 1, "steps": 4} | changes
    changes |= {"validation.every": 2, "validation.draws": 2, "validation.batch_size": 8}
    assert train(make_config(shallow_model, tiny_pairs, changes), tmp_path / "whole").finished
    for steps in (1, 3, 4):
        config = make_config(shallow_model, tiny_pairs, changes | {"steps": steps})
        assert train(config, tmp_path / "parts").finished
    records = [
        [record for record in read_reproducible(tmp_path / name) if "loss" in record]
        for name in ("whole", "parts")
    ]
    assert records[0] == records[1]
    losses = [record["loss"] for record in records[0]]
    assert abs(losses[0] - np.log(2)) > 0.02
    if "reference.every" in changes:  # which puts the policy in the place of the other model
        assert losses[2] == pytest.approx(np.log(2), rel=1e-5)
    export(tmp_path / "whole", tmp_path / "out")
    assert "| reference.model | other |" in (tmp_path / "out" / "README.md").read_text()
    kept = load_pipeline(tmp_path / "out").read_params("text_encoder")
    jax.tree.map(np.testing.assert_array_equal, kept, read(shallow_model)["text_encoder"])


def test_held_out_pairs_are_judged_against_the_reference_of_the_run(
    shallow_model, other_model, tiny_pairs, tmp_path
):
    make_lora_run(tmp_path / "run", shallow_model, tiny_pairs)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    options = {"split": "validation", "draws": 2, "batch_size": 8, "compute_dtype": "float32"}
    base = judge(tmp_path / "run", None, tiny_pairs, **options)
    config["reference"]["model"] = str(other_model)
    path.write_text(json.dumps(config))
    found = judge(tmp_path / "run", None, tiny_pairs, **options)
    assert found == judge(tmp_path / "run", other_model, tiny_pairs, **options)
    assert found["margin"] != base["margin"]


def test_a_workdir_pins_the_step_and_the_weights_of_a_reference(shallow_model, tiny_pairs, tmp_path):
    run = tmp_path / "run"
    make_lora_run(run, shallow_model, tiny_pairs)
    workdir = tmp_path / "later"

    def claim(name):
        experiment = prepare(make_config(shallow_model, tiny_pairs, DPO | {"reference.model": name}))
        claim_workdir(workdir, experiment.settings.given, experiment.pins())

    claim(str(run))
    (workdir / "metrics.jsonl").write_text('{"step": 1, "wall_seconds": 1.0, "loss": 0.5}\n')
    assert json.loads((workdir / "config.json").read_text())["reference"]["model"] == f"{run}@4"
    claim(f"{run}@4")
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "5")
    with pytest.raises(ValueError, match=rf"config.reference.model = '{run}@4', now it is '{run}@5'; resume"):
        claim(str(run))
    edit(
        shallow_copy(run, shallow_model, tmp_path) / UNET_FILE,
        lambda values: values.update({name: value + 1 for name, value in values.items()}),
    )
    with pytest.raises(ValueError, match=r"started with weights of the digest \w{64}, now config.reference"):
        claim(f"{run}@4")


def shallow_copy(run, model, folder):
    """Lets a run have started from a copy of its base, which can be spoilt."""
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["model"] = str(shutil.copytree(model, folder / "copy"))
    path.write_text(json.dumps(config))
    return folder / "copy"


def of_v(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))


def of_other_noise(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.013}))


def with_another_vae(folder):
    edit(folder / VAE_FILE, lambda values: values.update({name: -value for name, value in values.items()}))


@each_row(
    ("spoil", "message"),
    [
        (of_v, "predicts v_prediction, and config.model epsilon; name a model of the same kind"),
        (of_other_noise, "its noise schedule is not config.model's; name"),
        (with_another_vae, r"its VAE is not config.model's \(vae_sha256 = '\w{64}', not '\w{64}'\); name"),
        (lambda folder: write_tokenizer(folder / "tokenizer", "!"), "its tokenizers are not config.model's"),
        (shutil.rmtree, ".*: neither a diffusers folder"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(spoil, message, shallow_model, tiny_pairs, tmp_path):
    spoil(shutil.copytree(shallow_model, tmp_path / "copy"))
    config = make_config(shallow_model, tiny_pairs, DPO | {"reference.model": str(tmp_path / "copy")})
    with pytest.raises(
        (ValueError, OSError), match=rf"^config.reference.model = '\S+copy': {message}[^\n]*$"
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@each_row(
    ("changes", "message"),
    [
        ({}, "its unet is of another architecture than config.model's; name"),
        ({"objective.name": "sft", "objective.beta": None}, "'sft' reads no reference; leave it unset"),
    ],
)
def test_a_reference_of_no_use_is_refused(changes, message, shallow_model, tiny_model, tiny_pairs):
    model = tiny_model if not changes else shallow_model
    config = make_config(shallow_model, tiny_pairs, DPO | {"reference.model": str(model)} | changes)
    with pytest.raises(ValueError, match=rf"^config.reference.model = '{model}': {message}"):
        prepare(config)


def test_a_dry_run_counts_two_models(shallow_model, other_model, tiny_pairs):
    changes = DPO | {"lora.rank": 2, "reference.model": str(other_model), "mesh.data": 1, "mesh.fsdp": -1}
    experiment = prepare(make_config(shallow_model, tiny_pairs, changes))
    state, reference = make_state(experiment.task, experiment.mesh, experiment.adapters, abstract=True)
    said = list(describe_run(experiment, state, reference))
    assert (
        f"the reference is {other_model}, with another unet and text_encoder than the start of the policy"
        in (said)
    )
    parts = held(state, reference)
    whole, adapters = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (read(shallow_model), experiment.adapters)
    )
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in parts.items()}
    assert count["reference"] == whole + adapters
    assert count["frozen weights of the policy"] == whole
    assert any("frozen weights of the policy" in line for line in said)
    lines = list(estimate(parse(make_config(shallow_model, "", changes)), load_pipeline(shallow_model), 24))
    assert lines[0] == "config.reference.model is not read here: all of its weights are taken to be others"
    assert any("frozen weights of the policy" in line for line in lines)
    settings = parse(make_config(shallow_model, tiny_pairs, changes))
    with pytest.raises(ValueError, match="not opened"):
        make_state(make_task(settings, experiment.task.pipe), experiment.mesh, experiment.adapters)


def test_a_reference_may_be_kept_in_another_dtype(shallow_model, other_model, tiny_pairs):
    changes = {"reference_dtype": "bfloat16", "reference.model": str(other_model)}
    assert parse(make_config(shallow_model, tiny_pairs, changes)).reference_dtype == "bfloat16"
