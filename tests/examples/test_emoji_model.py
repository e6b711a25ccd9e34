"""The models that the repository ships: complete, small, drawn alike by diffusers, even with their copies."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from tables import each_row
from tiny_model import write_pairs

from configs import emoji_dspo
from dspo_jax.data.datasets import read_datasets
from dspo_jax.models.mmdit import POSITIONS
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.sampling.drawing import sample
from dspo_jax.sampling.image_sampler import ImageRequest, initial_noise
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Drawing, Rendering
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_state
from dspo_jax.training.task import policy_params, predict
from dspo_jax.training.validation import Validator
from dspo_jax.training.watch_settings import ValidationSettings

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"
MODEL, FLOW_MODEL = EMOJI / "model", EMOJI / "flow_model"


@each_row(
    ("model", "networks"),
    [
        (MODEL, {"text_encoder", "unet", "vae"}),
        (FLOW_MODEL, {"text_encoder", "text_encoder_2", "transformer", "vae"}),
    ],
)
def test_the_folder_holds_16_bit_weights_a_card_and_at_most_10_mb(model, networks):
    weights = sorted(model.rglob("*.safetensors"))
    assert {path.parent.name for path in weights} == networks
    for path in weights:
        with safe_open(path, "numpy") as file:
            dtypes = {file.get_slice(name).get_dtype() for name in set(file.keys()) - {POSITIONS}}
        assert dtypes == {"F16"}
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) <= 10_000_000
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "CC-BY 4.0" in card
    assert "samples.png" in card
    assert (model / "samples.png").is_file()


def test_diffusers_draws_the_flow_models_picture(tmp_path):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    prompt = "heavy black heart"
    rendering = Rendering(Drawing(steps=4, guidance_scale=4.0, max_sequence_length=0))
    sample({"flow": FLOW_MODEL}, [Prompt(prompt)], tmp_path, rendering, seeds=[3])
    (drawn,) = sorted((tmp_path / "0-flow").glob("*.png"))
    ours = np.asarray(Image.open(drawn).convert("RGB"), np.float32) / 255

    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        FLOW_MODEL, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    noise = np.asarray(initial_noise([ImageRequest(prompt, 0, 3)], (16, 16, 4)))
    (theirs,) = pipe(
        prompt,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=4,
        guidance_scale=4.0,
        max_sequence_length=0,
        output_type="np",
    ).images
    assert np.abs(ours - theirs).max() < 2 / 255
    red, green, blue = theirs[32, 32]  # of a heart
    assert red > 0.6 > green + blue


@pytest.mark.ci
@each_row("compute_dtype", ["float32", "bfloat16"])
def test_before_the_first_update_no_held_out_pair_is_decided(compute_dtype, tmp_path):
    # At this size the compiler fuses the last convolution with what reads it, which the tiny model's escapes.
    config = emoji_dspo.get_config()
    config.compute_dtype = compute_dtype
    pipe = load_pipeline(MODEL)
    task, mesh = make_task(parse(config), pipe), make_mesh({"data": 1}, jax.devices()[:1])
    state, reference = make_state(task, mesh)
    validator = Validator(
        lambda *inputs: predict(task, *inputs),
        pipe.schedule,
        mesh,
        read_datasets(write_pairs(tmp_path / "pairs", MODEL, validation=5, resolution=64)),
        ValidationSettings(every=1, split="validation", batch_size=4, draws=2, patience=0),
        inputs=pipe.conditioning_inputs,
    )
    scores = validator(policy_params(task, state.params, reference), reference)
    assert scores["winner_error"] > 0
    assert (scores["winner_drift"], scores["loser_drift"], scores["implicit_accuracy"]) == (0, 0, 0.5)
