"""`CLIPModel` against transformers' with random weights, and the settings it reads of published configs."""

import jax.numpy as jnp
import numpy as np
import published
import pytest

from dspo_jax.models.model import build_model

torch = pytest.importorskip("torch")
from torch_modules import assert_close, compile_fast, randomize, save, to_nchw  # noqa: E402
from transformers import CLIPConfig, CLIPModel  # noqa: E402

START, END = 22, 23
TEXT = {
    "vocab_size": 24,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "bos_token_id": START,
    "pad_token_id": 0,
}
# 20 is no multiple of 6: the last pixels are in no patch.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 6,
}
TOKENS = np.int32([[START, 5, 7, 1, END, 0, 0, 0, 0], [START, 9, 8, 7, 6, 5, 4, 3, END]])
PIXELS = np.random.default_rng(0).standard_normal((2, 20, 20, 3), np.float32)


@pytest.mark.parametrize(("hidden_act", "eos_token_id"), [("quick_gelu", 2), ("gelu", END)])
def test_both_towers_and_their_logits(hidden_act, eos_token_id, tmp_path):
    act = {"hidden_act": hidden_act}
    config = CLIPConfig(
        text_config=TEXT | act | {"eos_token_id": eos_token_id}, vision_config=VISION | act, projection_dim=8
    )
    module = randomize(CLIPModel(config))
    model, params = save(module, tmp_path)
    with torch.no_grad():
        theirs = module(pixel_values=to_nchw(PIXELS), input_ids=torch.from_numpy(TOKENS).long())

    @compile_fast
    def ours(params):
        images, texts = model.apply(params, PIXELS, method="encode_image"), model.apply(params, TOKENS).pooled
        unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts)]
        return images, texts, jnp.exp(params["logit_scale"]) * unit[0] @ unit[1].T

    images, texts, logits = ours(params)
    assert_close(images, theirs.vision_model_output.pooler_output.numpy(), 1e-5, "image")
    assert_close(texts, theirs.text_model_output.pooler_output.numpy(), 1e-5, "text")
    assert_close(logits, theirs.logits_per_image.numpy(), 1e-5, "logits")


@pytest.mark.parametrize("name", ["CLIP_H", "CLIP_L", "PICKSCORE"])
def test_published_configs_mean_what_transformers_reads_in_them(name):
    published_config = getattr(published, name)
    settings = build_model("CLIPModel", published_config).settings
    theirs = CLIPConfig(**published_config)
    assert settings["text"].pop("projection_dim") == theirs.projection_dim
    for tower, config in (("text", theirs.text_config), ("vision", theirs.vision_config)):
        assert settings[tower] == {key: getattr(config, key) for key in settings[tower]}
    # The end of a text is found by its own token, not as the highest id, which is the same.
    assert settings["text"]["eos_token_id"] == (2 if name == "PICKSCORE" else 49407)


def test_a_duplicate_takes_precedence_with_its_defaults():
    """As in transformers: keys that `text_config_dict` leaves out are the class's defaults."""
    config = {
        "projection_dim": 8,
        "text_config": {**TEXT, "hidden_act": "gelu", "eos_token_id": 2},
        "text_config_dict": {"num_hidden_layers": 5},
        "vision_config": VISION,
        "vision_config_dict": None,
    }
    theirs = CLIPConfig(**config)
    text = build_model("CLIPModel", config).settings["text"]
    keys = ("hidden_act", "eos_token_id", "num_hidden_layers", "hidden_size", "vocab_size")
    assert {key: text[key] for key in keys} == {key: getattr(theirs.text_config, key) for key in keys}
    assert (text["num_hidden_layers"], text["eos_token_id"], text["hidden_size"]) == (5, 49407, 512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {**TEXT, "hidden_act": "relu"}}, "CLIPModel's text config: hidden_act = 'relu'"),
        (
            {"vision_config": {**VISION, "hidden_act": "relu"}},
            "CLIPModel's vision config: hidden_act = 'relu'",
        ),
        ({"vision_config": {**VISION, "num_channels": 4}}, "CLIPModel's vision config: num_channels = 4"),
        ({"vision_config": {**VISION, "patch_size": [6, 6]}}, r"patch_size = \[6, 6\] must be an integer"),
        ({"vision_config": {**VISION, "rope_theta": 3.0}}, "vision config: unknown key rope_theta = 3.0"),
        ({"text_config": {**TEXT, "is_decoder": True}}, "text config: unknown key is_decoder = True"),
        ({"text_config": {**TEXT, "pruned_heads": {"0": [1]}}}, "text config: pruned_heads = "),
        ({"text_config": "small"}, "CLIPModel config: text_config = 'small' must be an object"),
        ({"logit_bias": 1.0}, "CLIPModel config: unknown key logit_bias = 1.0"),
        ({"projection_dim": None}, "CLIPModel config: projection_dim = None must be an integer"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(change, message):
    config = {"projection_dim": 8, "text_config": TEXT, "vision_config": VISION, **change}
    with pytest.raises(ValueError, match=message):
        build_model("CLIPModel", config)


def test_an_absent_width_of_the_projection_is_that_of_transformers():
    config = {"text_config": TEXT, "vision_config": VISION}
    settings = build_model("CLIPModel", config).settings
    assert settings["text"]["projection_dim"] == CLIPConfig(**config).projection_dim == 512
