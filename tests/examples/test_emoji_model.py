"""The model that the repository ships: complete, small, and the same as its frozen copy to the last bit."""

from pathlib import Path

import jax
import pytest
from safetensors import safe_open
from tables import each_row
from tiny_model import write_pairs

from configs import emoji_dspo
from dspo_jax.data.datasets import read_datasets
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import ValidationSettings, parse
from dspo_jax.training.start import make_state
from dspo_jax.training.task import policy_params, predict
from dspo_jax.training.validation import Validator

MODEL = Path(__file__).parents[2] / "examples" / "emoji" / "model"


def test_the_folder_holds_16_bit_weights_a_card_and_at_most_10_mb():
    weights = sorted(MODEL.rglob("*.safetensors"))
    assert {path.parent.name for path in weights} == {"text_encoder", "unet", "vae"}
    for path in weights:
        with safe_open(path, "numpy") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 10_000_000
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert "CC-BY 4.0" in card
    assert "samples.png" in card
    assert (MODEL / "samples.png").is_file()


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
