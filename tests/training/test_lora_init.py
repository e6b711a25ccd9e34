"""A run that starts from a LoRA file: what it continues, what it is compared with, what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tables import each_row
from tiny_run import make_config, read_batches

from dspo_jax.conversion.export_model import ADAPTER_FORMATS, export
from dspo_jax.errors import UserError
from dspo_jax.models.lora import find_ranks
from dspo_jax.parallel.mesh import replicated, shard_batch
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.describe import describe_run
from dspo_jax.training.make_task import make_task
from dspo_jax.training.reference import open_reference
from dspo_jax.training.run import train
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_adapters, make_state, mesh_of, prepare
from dspo_jax.training.step import compile_step
from dspo_jax.training.workdir import claim_workdir
from dspo_jax.weights.layout import flatten
from dspo_jax.weights.saved_params import restore_params

DPO = {
    "objective.name": "diffusion_dpo",
    "objective.beta": 2000.0,
    "optimizer.learning_rate": 3e-3,
    "optimizer.weight_decay": 0.0,
    "train_text_encoder": True,
}
LORA = {"lora.rank": 2, "lora.alpha": 3.0, "lora.rank_stabilised": True}
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def run(shallow_model, tiny_pairs, tmp_path_factory):
    """A run of two steps over adapters, which are no longer what they began as."""
    workdir = tmp_path_factory.mktemp("init") / "run"
    train(make_config(shallow_model, tiny_pairs, {**DPO, **LORA, "steps": 2}), workdir)
    return workdir


def begin(model, pairs, changes):
    """Task, mesh, state at step 0 and frozen parameters of a run."""
    settings, pipe = parse(make_config(model, pairs, DPO | changes)), load_pipeline(model)
    mesh = mesh_of(settings, jax.devices()[:1])
    name = settings.reference.model
    task = make_task(settings, pipe, reference=open_reference(name, pipe) if name else None)
    return mesh, *make_state(task, mesh, make_adapters(settings, pipe))


def take_step(mesh, state, reference, batch):
    key = jax.device_put(jax.random.key(7), replicated(mesh))
    _, metrics = compile_step(state)(state, reference, shard_batch(batch, mesh), key)
    return float(metrics["loss"])


@pytest.mark.ci
def test_the_next_loss_is_that_of_the_uninterrupted_run(run, shallow_model, tiny_pairs, tmp_path):
    (batch,) = read_batches(tiny_pairs, batch_size=8, count=1)
    mesh, state, reference = begin(shallow_model, tiny_pairs, LORA)
    saved, _ = restore_params(run / "checkpoints")
    put = jax.tree.map(lambda old, new: jax.device_put(np.asarray(new), old.sharding), state.params, saved)
    expected = take_step(mesh, dataclasses.replace(state, params=put), reference, batch)
    assert abs(expected - np.log(2)) > 0.01  # the run has left its start
    for style in ADAPTER_FORMATS:
        file = tmp_path / f"{style}.safetensors"
        export(run, file, adapters=style)
        held_to_base = {"lora.init": str(file), "reference.model": str(shallow_model)}
        # Of kohya's file the run takes the factor into B, where its own is 1.
        same = {"lora.alpha": 3.0, "lora.rank_stabilised": True} if style == "diffusers" else {}
        mesh, state, reference = begin(shallow_model, tiny_pairs, held_to_base | same)
        for path, leaf in flatten(state.params).items():
            factor = 3 / np.sqrt(2) if path.endswith("lora_B.kernel") and not same else 1
            np.testing.assert_allclose(leaf, factor * flatten(saved)[path], rtol=1e-6)
        assert take_step(mesh, state, reference, batch) == pytest.approx(expected, abs=1e-5)
    mesh, state, reference = begin(shallow_model, tiny_pairs, {"lora.init": str(file)})
    assert take_step(mesh, state, reference, batch) == pytest.approx(np.log(2), abs=1e-5)  # held to its start


def write_kohya(file, layers, alpha):
    random, values = np.random.default_rng(0), {}
    for layer, (rank, inputs, outputs) in layers.items():
        name = f"lora_{layer.replace('.', '_')}"
        values[f"{name}.lora_down.weight"] = random.standard_normal((rank, inputs), np.float32)
        values[f"{name}.lora_up.weight"] = random.standard_normal((outputs, rank), np.float32)
        values[f"{name}.alpha"] = np.float32([alpha])
    save_file(values, file, metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    return file


def adapters_of(model, pairs, **changes):
    settings = parse(make_config(model, pairs, {name.replace("__", "."): v for name, v in changes.items()}))
    return make_adapters(settings, load_pipeline(model))


def test_ranks_are_the_files_and_alpha_is_in_b(shallow_model, tiny_pairs, tmp_path):
    layers = {LAYER: (3, 8, 8), LAYER.replace("to_q", "to_out.0"): (2, 8, 8)}
    file = write_kohya(tmp_path / "lora.safetensors", layers, alpha=6)
    adapters = adapters_of(shallow_model, tiny_pairs, lora__init=f"{file}:0.5")
    assert {f"unet.{layer}": rank for layer, rank in find_ranks(adapters["unet"]).items()} == {
        layer: shape[0] for layer, shape in layers.items()
    }
    stored, leaves = load_file(file), flatten(adapters)
    for layer, (rank, *_) in layers.items():
        down, up = (stored[f"lora_{layer.replace('.', '_')}.lora_{half}.weight"] for half in ("down", "up"))
        product = leaves[f"{layer}.lora_A.kernel"] @ leaves[f"{layer}.lora_B.kernel"]
        expected = 0.5 * 6 / rank * (np.float64(up) @ np.float64(down)).T
        np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)


@each_row(
    ("changes", "message"),
    [
        (
            {"lora__rank": 2, "lora__targets": (LAYER.removeprefix("unet."),)},
            f"has rank 3 for {LAYER}, but config.lora.rank and .* ask for rank 2; set .*rank=0",
        ),
        (
            {"lora__rank": 3, "lora__targets": (r"to_[qk]",)},
            r"has no adapter for unet\..*, but .* ask for rank 3;",
        ),
        ({"train_text_encoder": True}, "holds nothing for text_encoder, which is trained; .*=False"),
    ],
)
def test_a_file_that_is_not_what_the_config_asks_for_is_refused(
    changes, message, shallow_model, tiny_pairs, tmp_path
):
    file = write_kohya(tmp_path / "lora.safetensors", {LAYER: (3, 8, 8)}, alpha=3)
    with pytest.raises(ValueError, match=rf"^{file}: {message}[^\n]*$"):
        adapters_of(shallow_model, tiny_pairs, lora__init=str(file), **changes)


def test_a_file_with_adapters_of_a_network_that_is_not_trained_is_refused(
    shallow_model, tiny_pairs, tmp_path
):
    """As most files of the community have them, of the text encoder too."""
    text = "te.text_model.encoder.layers.0.self_attn.q_proj"  # kohya's name of the text encoder
    file = write_kohya(tmp_path / "lora.safetensors", {LAYER: (3, 8, 8), text: (3, 12, 12)}, alpha=3)
    message = "has adapters of text_encoder, which is not trained; set config.train_text_encoder=True, or"
    with pytest.raises(UserError, match=rf"^{file}: {message}[^\n]*$"):
        adapters_of(shallow_model, tiny_pairs, lora__init=str(file))
    both = adapters_of(shallow_model, tiny_pairs, lora__init=str(file), train_text_encoder=True)
    assert both.keys() == {"unet", "text_encoder"}


def test_what_is_no_file_of_this_model_is_refused(shallow_model, tiny_pairs, tmp_path):
    with pytest.raises(ValueError, match=r"^config\.lora\.init = x\.bin: a pickle"):
        adapters_of(shallow_model, tiny_pairs, lora__init="x.bin")
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors: no such file"):
        adapters_of(shallow_model, tiny_pairs, lora__init="x.safetensors")
    file = write_kohya(tmp_path / "lora.safetensors", {"unet.elsewhere": (3, 8, 8)}, alpha=3)
    with pytest.raises(ValueError, match=r"no such layer; .*Its header says 'sdxl_base_v1-0'$"):
        adapters_of(shallow_model, tiny_pairs, lora__init=str(file))
    text = {"text_encoder_x": (3, 8, 8)}
    with pytest.raises(ValueError, match="no such layer"):
        adapters_of(shallow_model, tiny_pairs, lora__init=str(write_kohya(file, text, alpha=3)))


def test_a_run_is_gone_on_with_from_the_same_file_alone(shallow_model, tiny_pairs, tmp_path):
    file = write_kohya(tmp_path / "lora.safetensors", {LAYER: (3, 8, 8)}, alpha=3)
    config = make_config(shallow_model, tiny_pairs, {"lora.init": str(file)})
    experiment = prepare(config)
    state, reference = make_state(experiment.task, experiment.mesh, experiment.adapters, abstract=True)
    said = "\n".join(describe_run(experiment, state, reference))
    assert f"LoRA of rank 3 from {file}" in said
    claim_workdir(tmp_path / "run", experiment.settings.given, experiment.pins())
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    write_kohya(file, {LAYER: (3, 8, 8)}, alpha=4)
    changed = prepare(config)
    with pytest.raises(ValueError, match=r"started with a file of the digest .*config\.lora\.init"):
        claim_workdir(tmp_path / "run", changed.settings.given, changed.pins())


@pytest.mark.ci
def test_an_export_says_to_diffusers_what_its_adapters_are(run, tmp_path):
    export(run, tmp_path / "lora.safetensors", adapters="diffusers")
    with safe_open(tmp_path / "lora.safetensors", "np") as file:
        metadata = file.metadata()
    configs = json.loads(metadata["lora_adapter_metadata"])
    assert (configs["unet.r"], configs["unet.lora_alpha"], configs["text_encoder.r"]) == (2, 3, 2)
    assert configs["unet.use_rslora"] is True
    assert LAYER.removeprefix("unet.") in configs["unet.target_modules"]
    assert "encoder.layers.0.self_attn.q_proj" in configs["text_encoder.target_modules"]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "4.24264")
