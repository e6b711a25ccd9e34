"""The reward `b_vqa`: from the published file to scores, against transformers' BLIP with random weights."""

import json
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row
from tiny_clip import pictures

from dspo_jax.errors import UserError
from dspo_jax.rewards import load_reward
from dspo_jax.rewards.b_vqa import make_question
from dspo_jax.rewards.differentiable import load_differentiable
from dspo_jax.rewards.publish import RECIPES, prepare

torch = pytest.importorskip("torch")
from PIL import Image  # noqa: E402
from torch_modules import assert_close, randomize  # noqa: E402
from transformers import BlipConfig, BlipForQuestionAnswering  # noqa: E402

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "cat",
    "blue",
    "bowl",
    "?",
    "yes",
    "no",
]
START, QUESTION = len(VOCABULARY), len(VOCABULARY) + 1
SIZES = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 1}
TEXT = {
    **{"encoder_hidden_size": 64, "num_hidden_layers": 2, "vocab_size": QUESTION + 1},
    **{"max_position_embeddings": 40, "bos_token_id": START, "sep_token_id": 3, "pad_token_id": 0},
}
VISION = {"num_hidden_layers": 2, "image_size": 32, "patch_size": 16, "layer_norm_eps": 1e-6}
PHRASES = {"a red cat and a blue bowl": ["a red cat", "a blue bowl"], "cat": ["cat"], "red": []}
# transformers' name of a tensor -> the released code's.
NAMES = (
    (r"^vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (r"^vision_model\.post_layernorm", "visual_encoder.norm"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual_encoder.blocks.\1.norm"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection", r"visual_encoder.blocks.\1.attn.proj"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn", r"visual_encoder.blocks.\1.attn"),
    (r"^vision_model\.encoder\.layers\.(\d+)", r"visual_encoder.blocks.\1"),
)


@pytest.fixture(scope="module")
def module():
    config = BlipConfig(text_config=SIZES | TEXT, vision_config=SIZES | VISION)
    return randomize(BlipForQuestionAnswering(config).eval())


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory):
    """The folder of rewards, with phrases.json."""
    made = tmp_path_factory.mktemp("b_vqa")
    state = {}
    for name, tensor in module.state_dict().items():
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        state[name] = tensor
    torch.save({"model": state}, made / "vqa.pth")
    (made / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))
    job = prepare(
        "b_vqa",
        made / "rewards" / "b_vqa",
        weights=str(made / "vqa.pth"),
        tokenizer=str(made),
        head=None,
    )
    RECIPES["b_vqa"].write(job)
    (made / "rewards" / "b_vqa" / "phrases.json").write_text(json.dumps(PHRASES))
    return made / "rewards"


def answer(module, image, words):
    """P(yes) / (P(yes) + P(no)) of one question, by transformers' encoder and decoder."""
    ids = torch.tensor([[QUESTION, *(VOCABULARY.index(word) for word in words.split()), 10, 3]])
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), np.float64) / 255
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = torch.tensor((pixels - mean) / deviation, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        states = module.vision_model(pixel_values=pixels).last_hidden_state
        question = module.text_encoder(
            input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=states
        ).last_hidden_state
        logits = module.text_decoder(
            input_ids=torch.tensor([[START]]),
            encoder_hidden_states=question,
            encoder_attention_mask=torch.ones_like(ids),
        ).logits[0, 0]
    probabilities = torch.softmax(logits.double(), 0)
    yes, no = (float(probabilities[VOCABULARY.index(word)]) for word in ("yes", "no"))
    return yes / (yes + no)


def test_scores_are_products_of_transformers_answers(module, folder):
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (*size, 3), np.uint8) for size in ((32, 32), (48, 64), (50, 21))]
    reward = load_reward("b_vqa", folder, batch_size=2)
    assert re.fullmatch(r"vqa\.pth [0-9a-f]{8}, phrases by phrases\.json [0-9a-f]{8}", reward.version)
    scores = reward.score(images, list(PHRASES))
    expected = [
        np.prod([answer(module, Image.fromarray(image), phrase) for phrase in phrases])
        for image, phrases in zip(images, PHRASES.values(), strict=True)
    ]
    assert expected[2] == 1  # nothing is asked
    assert 0.01 < expected[0] < 0.99
    assert_close(scores, np.float32(expected), 1e-5, "scores")


@each_row(
    ("phrase", "question"),
    [
        ("A Red cat", "a red cat?"),
        ('the "big" (cat).', "the big cat?"),
        ("word " * 60, "word " * 49 + "word"),
    ],
)
def test_a_phrase_becomes_a_question_as_in_the_released_code(phrase, question):
    assert make_question(phrase) == question


def test_spacy_finds_the_phrases_where_there_is_no_file(folder, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(folder, tmp_path / "rewards")
    (tmp_path / "rewards" / "b_vqa" / "phrases.json").unlink()
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match=r"with spaCy, which is absent; pip install spacy .*phrases\.json"):
        load_reward("b_vqa", tmp_path / "rewards")

    def without_model(name):
        raise OSError(f"no {name}")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=without_model))
    with pytest.raises(UserError, match=r"spaCy has no model en_core_web_sm; .*spacy download"):
        load_reward("b_vqa", tmp_path / "rewards")

    def parse(prompt):
        chunks = ["a red cat", "the left", *(f"cat {i}" for i in range(8))]
        return SimpleNamespace(noun_chunks=[SimpleNamespace(text=text) for text in chunks])

    parse.meta = {"version": "3.8.0"}
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: parse))
    from dspo_jax.rewards.b_vqa import load

    network = load(tmp_path / "rewards" / "b_vqa")
    assert network.version.endswith("phrases by spaCy en_core_web_sm 3.8.0")
    ids, mask, asked = network.tokenize(["a prompt"])
    assert asked.all()  # eight of nine
    assert ids[0, 0, :6].tolist() == [QUESTION, 5, 6, 7, 10, 3]
    assert mask[0, 0].sum() == 6
    assert ids[0, 1, :2].tolist() == [QUESTION, 7]  # "the left" is no thing


def test_prompts_without_phrases_and_damaged_files_are_refused(folder, tmp_path):
    import shutil

    reward = load_reward("b_vqa", folder)
    with pytest.raises(UserError, match=r"phrases\.json: has no phrases of the prompt 'dog'; add them"):
        reward.score([np.zeros((32, 32, 3), np.uint8)], ["dog"])
    shutil.copytree(folder, tmp_path / "rewards")
    (tmp_path / "rewards" / "b_vqa" / "phrases.json").write_text('{"a": "b"}')
    with pytest.raises(UserError, match=r"phrases\.json: 'a': must be a list of phrases"):
        load_reward("b_vqa", tmp_path / "rewards")


def test_the_gradient_is_that_of_finite_differences(folder):
    reward = load_differentiable("b_vqa", folder)
    prompts = list(PHRASES)[:1]
    (picture,) = pictures((40, 40))
    pixels = 0.25 + 0.5 * jnp.asarray(picture, jnp.float32)[None] / 255  # nothing is clipped
    tokens = reward.tokenize(prompts)

    @jax.jit
    def score(pixels):
        return reward.function(reward.params, pixels, tokens).sum()

    gradient = jax.grad(score)(pixels)
    along = gradient / jnp.linalg.norm(gradient)
    slope = (score(pixels + 0.05 * along) - score(pixels - 0.05 * along)) / 0.1
    np.testing.assert_allclose(slope, (gradient * along).sum(), rtol=0.01)
    assert slope > 0
