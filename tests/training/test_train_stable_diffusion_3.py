"""Stable Diffusion 3 from pictures to an exported folder: encoded, trained by flow-DPO, read by diffusers."""

import re

import jax
import numpy as np
import pytest
from image_files import write_pairs_folder
from tables import slow
from tiny_run import make_config

from configs.encode import common as encode_common
from dspo_jax.conversion.export_model import export
from dspo_jax.data.encoding import encode
from dspo_jax.errors import UserError
from dspo_jax.monitoring.metrics import read_metrics
from dspo_jax.pipelines.conditioning_inputs import prompt_batch
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.run import train
from dspo_jax.training.settings import parse
from dspo_jax.training.start import prepare

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
from tiny_sd3 import write_sd3  # noqa: E402
from torch_modules import assert_close, to_nchw, to_nhwc  # noqa: E402

LENGTH = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("sd3") / "model")


@pytest.fixture(scope="module")
def pairs(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs_folder(folder, [f"a fox {i}" for i in range(8)])
    config = encode_common.get_config()
    encode_common.set_source(config, "folder")
    config.model, config.num_workers, config.text.max_sequence_length = str(model), 0, LENGTH
    config.source.path, config.source.validation_share = str(folder), 0.0
    out = folder / "encoded"
    assert encode(config, out)
    return out


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_flow_dpo_moves_the_transformer_and_diffusers_loads_it(rank, model, pairs, tmp_path):
    """The exported transformer, in diffusers, predicts what the trained one does here; its table is kept."""
    run, out = tmp_path / "run", tmp_path / "exported"
    changes = {"steps": 2, "objective.name": "diffusion_dpo", "lora.rank": rank, "checkpoint.every": 2}
    changes |= {"text.max_sequence_length": LENGTH, "samples.num_inference_steps": 1}
    # Prompts whose states T5 says before the training: one is a caption of the data.
    changes |= {"samples.every": 2 * (rank > 0), "samples.prompts": ("a fox 1", "a fox on snow")}
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        train(parse(make_config(model, pairs, changes)), run)
    assert export(run, out) == 2
    card = (out / "README.md").read_text()
    assert f"| text.max_sequence_length | {LENGTH} |" in card
    assert f", max_sequence_length={LENGTH}).images[0]" in card
    pipe = load_pipeline(run)
    assert pipe.max_sequence_length == LENGTH
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(out, local_files_only=True).transformer
    before = diffusers.SD3Transformer2DModel.from_pretrained(model / "transformer")
    assert torch.equal(theirs.pos_embed.pos_embed, before.pos_embed.pos_embed)
    moved = theirs.transformer_blocks[0].attn.to_q.weight - before.transformer_blocks[0].attn.to_q.weight
    assert moved.abs().max() > 0

    draw = np.random.default_rng(0)
    latents = draw.standard_normal((1, 4, 4, 4), np.float32)
    batch = prompt_batch(pipe, pipe.tokenize(["a red fox"]), (16, 16))
    params = {name: pipe.read_params(name) for name in pipe.components}
    conditioning = pipe.encode_conditioning(params, batch)
    ours = pipe.predict(params, latents, np.float32([700.0]), conditioning)
    with torch.no_grad():
        expected = theirs(
            to_nchw(latents),
            timestep=torch.tensor([700.0]),
            encoder_hidden_states=torch.from_numpy(np.array(conditioning.states)),
            pooled_projections=torch.from_numpy(np.array(conditioning.pooled)),
        ).sample
    assert_close(ours, to_nhwc(expected), 1e-4)


def test_a_run_says_how_many_tokens_t5_reads_and_data_of_another_number_are_refused(model, pairs):
    said = prepare(make_config(model, pairs, {"text.max_sequence_length": LENGTH})).settings
    assert said.given["text"]["max_sequence_length"] == said.text.max_sequence_length == LENGTH
    message = f"{pairs}: T5 has {LENGTH} tokens of a caption, but 256 are asked for; set --config.text.max_"
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$"):
        prepare(make_config(model, pairs))


STREAMS = {
    "own_pairs": {"objective.name": "diffusion_dpo"},
    "trajectories": {
        "stream.eta": 1.0,
        "advantages.of": "group",
        "policy_gradient.name": "ddpo",
    },
    "prompts": {"reward_gradient.name": "draft_k"},
}


@pytest.mark.ci
@pytest.mark.parametrize("kind", [slow("own_pairs"), "trajectories", slow("prompts")])
def test_it_trains_on_its_own_images(kind, model, tmp_path):
    """The first update is of the policy that drew: pairs are even, and ratios of probabilities are 1."""
    changes = {
        "stream.kind": kind,
        "stream.prompts": ["a red fox", "a fox on snow"],
        "stream.images": 1 if kind == "prompts" else 2,
        "stream.num_inference_steps": 3,
        "stream.batch_size": 8,
        "rewards.train": "colourfulness",
        "text.max_sequence_length": LENGTH,
        "batch_size": 8,
        "steps": 1,
        "lora.rank": 2,
    }
    train(make_config(model, "", {**changes, **STREAMS[kind]}), tmp_path / "run")
    (first,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first["grad_norm"] > 1e-4
    assert first["unusable_images"] == first["skipped"] == 0
    if kind == "own_pairs":
        assert first["loss"] == pytest.approx(np.log(2), rel=1e-6)
        assert first["reward_gap"] > 0
    elif kind == "trajectories":
        assert first["ratio"] == pytest.approx(1, abs=1e-6)
        assert first["ratio_noise"] < 1e-3
    else:
        assert first["attached_steps"] == 1
