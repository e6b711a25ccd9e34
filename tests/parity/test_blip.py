"""ImageReward's network with random weights against torch, and against transformers' BLIP."""

import json
import re
import resource
import time

import image_reward_torch as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dspo_jax.rewards import load_reward
from dspo_jax.rewards.image_reward import write_weights
from dspo_jax.weights.components import read_model, read_params

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402
from torch_modules import assert_close, assert_gradients_close, compile_fast, randomize, to_nchw  # noqa: E402
from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

pytestmark = pytest.mark.ci


# Epsilons that differ, and are large enough to show.
CONFIG = oracle.reduced(
    vision_config={"hidden_size": 24, "num_attention_heads": 3, "patch_size": 8, "layer_norm_eps": 0.03},
    text_config={
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 9,
        "layer_norm_eps": 0.2,
    },
)
PIXELS = np.random.default_rng(0).standard_normal((3, 32, 32, 3), np.float32)
TOKENS = np.random.default_rng(1).integers(5, 16, (3, 8)).astype(np.int32)
MASK = np.arange(8)[None] < np.array([[8], [5], [2]])


def write_folder(folder, state, config=CONFIG):
    """Returns a folder that `components.read_model` and `read_params` read."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    model = read_model(folder)
    return model, read_params(folder, model)


def test_forward_and_gradients_match_torch(tmp_path):
    module = randomize(oracle.ImageReward(CONFIG))
    model, params = write_folder(tmp_path, module.state_dict())

    @compile_fast
    def gradients_of(params):
        def loss(params):
            scores = model.apply(params, PIXELS, TOKENS, MASK)
            return jnp.square(scores - 1).sum(), scores

        return jax.grad(loss, has_aux=True)(params)

    gradients, scores = gradients_of(params)
    theirs = module(to_nchw(PIXELS), torch.from_numpy(TOKENS).long(), torch.from_numpy(MASK))
    assert_close(scores, theirs.detach().numpy(), 1e-5, "scores")
    (theirs - 1).square().sum().backward()
    assert_gradients_close(module, model, gradients, tmp_path, 1e-4)


def test_what_is_padding_changes_nothing(tmp_path):
    model, params = write_folder(tmp_path, randomize(oracle.ImageReward(CONFIG)).state_dict())
    apply = compile_fast(model.apply)
    scores = apply(params, PIXELS, TOKENS, MASK)
    other = apply(params, PIXELS, np.where(MASK, TOKENS, 0), MASK)
    np.testing.assert_allclose(scores, other, rtol=1e-6)
    assert np.abs(apply(params, PIXELS, TOKENS, np.ones_like(MASK)) - scores)[1:].min() > 1e-3


# transformers' names -> those of the published weights.
NAMES = {
    r"vision_model\.embeddings\.class_embedding": "visual_encoder.cls_token",
    r"vision_model\.embeddings\.position_embedding": "visual_encoder.pos_embed",
    r"vision_model\.embeddings\.patch_embedding": "visual_encoder.patch_embed.proj",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv": r"visual_encoder.blocks.\1.attn.qkv",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection": r"visual_encoder.blocks.\1.attn.proj",
    r"vision_model\.encoder\.layers\.(\d+)\.layer_norm": r"visual_encoder.blocks.\1.norm",
    r"vision_model\.encoder\.layers\.(\d+)\.mlp": r"visual_encoder.blocks.\1.mlp",
    r"vision_model\.post_layernorm": "visual_encoder.norm",
    r"text_encoder\.": "text_encoder.",
}


def rename(name):
    for theirs, ours in NAMES.items():
        if re.match(theirs, name):
            return "blip." + re.sub(theirs, ours, name)
    return None  # heads of another task


def test_forward_matches_transformers(tmp_path):
    no_dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    parts = {part: CONFIG[part] | no_dropout for part in ("vision_config", "text_config")}
    theirs = randomize(BlipForImageTextRetrieval(BlipConfig(**parts)))
    head = randomize(oracle.ImageReward(CONFIG)).mlp
    state = {rename(name): tensor for name, tensor in theirs.state_dict().items() if rename(name)}
    state |= {f"mlp.{name}": tensor for name, tensor in head.state_dict().items()}
    model, params = write_folder(tmp_path, state)
    with torch.no_grad():
        states = theirs(
            input_ids=torch.from_numpy(TOKENS).long(),
            pixel_values=to_nchw(PIXELS),
            attention_mask=torch.from_numpy(MASK).long(),
        ).question_embeds
        expected = head["layers"](states[:, 0])[:, 0].numpy()
    assert_close(compile_fast(model.apply)(params, PIXELS, TOKENS, MASK), expected, 1e-5, "scores")


@pytest.mark.slow
def test_full_size_from_the_published_file_to_scores(tmp_path, monkeypatch):
    """2 GB of disk in `tmp_path`, twice; run with -s for the figures."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])  # else each fake one has the weights
    vocabulary = oracle.BERT_SPECIAL + [f"w{i}" for i in range(30_517)]
    tokenizer = oracle.write_vocabulary(tmp_path / "tokenizer", vocabulary)
    prompts = ["w3 w14 w15 w926", "w5 " * 40, ""]
    sizes = [(512, 512), (768, 400), (226, 301)]
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (height, width, 3), np.uint8) for width, height in sizes]

    with torch.device("meta"):
        module = oracle.ImageReward(oracle.CONFIG)
    module = randomize(module.to_empty(device="cpu"))
    torch.save(oracle.published(module), tmp_path / "ImageReward.pt")
    tokens = BertTokenizer.from_pretrained(tokenizer)(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    processor = CLIPImageProcessorPil()
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = module(pixels, tokens["input_ids"], tokens["attention_mask"]).numpy()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    del module

    start = time.perf_counter()
    write_weights(tmp_path / "ImageReward.pt", tmp_path / "rewards" / "imagereward", tokenizer, "the hub")
    written = time.perf_counter()
    assert json.loads((tmp_path / "rewards/imagereward/config.json").read_text()) == oracle.CONFIG
    reward = load_reward("imagereward", tmp_path / "rewards", batch_size=2)
    loaded = time.perf_counter()
    scores = reward.score(images, prompts)
    scored = time.perf_counter()
    expected = (theirs - 0.16717362830052426) / 1.0333394966054072
    print(f"\n{parameters:,} parameters")
    print(f"largest error {np.abs(scores - expected).max():.2e} of {np.abs(expected).max():.2f}")
    print(f"converted in {written - start:.0f} s, loaded in {loaded - written:.0f} s", end=", ")
    print(f"compiled and scored in {scored - loaded:.0f} s")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{memory:.1f} GiB at most, with torch's")
    assert_close(scores, expected, 1e-4, "scores")
