"""Rewards from converted folders against their definitions in torch."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from PIL import Image
from tables import each_row
from tiny_clip import SIDE, clip_config, pictures, write_clip, write_json
from tiny_model import EXCLAMATION_MARK, write_tokenizer

from dspo_jax.models.model import build_model
from dspo_jax.rewards import REWARDS, aesthetic, load_reward, open_clip
from dspo_jax.rewards.preprocess import clip_pixels, hps_pixels
from dspo_jax.rewards.publish import RECIPES, prepare
from dspo_jax.rewards.scorer import Scorer
from dspo_jax.weights.layout import torch_shapes
from dspo_jax.weights.tensors import Tensor

torch = pytest.importorskip("torch")
from open_clip_modules import CLIP  # noqa: E402
from torch_modules import randomize  # noqa: E402
from transformers import CLIPModel, CLIPTokenizer  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

IMAGES = pictures((40, 30), (SIDE, SIDE), (16, 50))
# One of them is cut: its 90 letters are 92 tokens.
PROMPTS = ["a cat, and a dog", "x" * 45 + "y" * 45, ""]


def convert(reward, out, weights, *, tokenizer=None, head=None):
    as_text = [None if path is None else str(path) for path in (weights, tokenizer, head)]
    job = prepare(reward, out / reward, weights=as_text[0], tokenizer=as_text[1], head=as_text[2])
    RECIPES[reward].write(job)
    return load_reward(reward, out, batch_size=2)


def theirs_of(folder):
    """Unit embeddings of the images and prompts, and the module."""
    module = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    pixels = processor(images=[Image.fromarray(image) for image in IMAGES], return_tensors="pt")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    # As the released code: padded to the longest only, and with a mask.
    text = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        vectors = (module.get_image_features(**pixels), module.get_text_features(**text))
        return *(torch.nn.functional.normalize(each.pooler_output, dim=-1) for each in vectors), module


def assert_scores(ours, theirs):
    """Within 1e-4 of the largest, of scores that differ by much more."""
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    assert np.ptp(theirs) > 0.01 * np.abs(theirs).max()


def test_pickscore_is_the_scaled_cosine(tmp_path):
    source = write_clip(tmp_path / "published")
    reward = convert("pickscore", tmp_path, source)
    images, texts, module = theirs_of(source)
    scores = reward.score(IMAGES, PROMPTS)
    assert_scores(scores, module.logit_scale.exp() * (images * texts).sum(-1))

    assert reward.reads_alpha  # and drops it
    unseen = np.dstack([IMAGES[0], np.zeros(IMAGES[0].shape[:2], np.uint8)])
    np.testing.assert_array_equal(reward.score([unseen, *IMAGES[1:]], PROMPTS), scores)

    about = json.loads((tmp_path / "pickscore" / "reward.json").read_text())
    assert reward.version == f"published {about['sha256'][:8]}"
    # What follows the end of a prompt changes nothing.
    write_tokenizer(source, EXCLAMATION_MARK)
    padded = convert("pickscore", tmp_path / "other", source)
    np.testing.assert_array_equal(padded.score(IMAGES, PROMPTS), scores)


@each_row(("name", "features"), [("clip-l", 768), ("clip-b", 512)])
def test_an_old_config_finds_the_end_of_a_prompt(name, features, tmp_path):
    config = clip_config(features=features, activation="quick_gelu", eos_token_id=2)
    source = write_clip(tmp_path / "published", config)
    write_tokenizer(source, EXCLAMATION_MARK)
    scores = convert(name, tmp_path, source).score(IMAGES, PROMPTS)
    images, texts, _ = theirs_of(source)
    assert_scores(scores, 100 * (images * texts).sum(-1))
    assert scores.min() < 0  # not clamped


@each_row("half", [False, True], ids=["float32", "float16"])
def test_hps_of_an_open_clip_file(half, tmp_path):
    module = randomize(CLIP())
    state = {name: value.half() if half else value for name, value in module.state_dict().items()}
    module.load_state_dict({name: value.float() for name, value in state.items()})
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "HPS_v2_compressed.pt")
    write_tokenizer(tmp_path / "clip")
    reward = convert("hpsv2.0", tmp_path, tmp_path / "HPS_v2_compressed.pt", tokenizer=tmp_path / "clip")
    assert reward.version.startswith("HPS_v2_compressed.pt ")

    pixels = np.stack([hps_pixels(Image.fromarray(image), SIDE) for image in IMAGES])
    tokens = CLIPTokenizer.from_pretrained(tmp_path / "clip")(
        PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        theirs = module.cosine(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), tokens)
    assert_scores(reward.score(IMAGES, PROMPTS), theirs)

    # open_clip's tokenizer straightens quotes and reads HTML first.
    curled, plain = "a \u201ccat\u2019s&amp;amp;dog\u201d", 'a "cat\'s&dog"'
    both = reward.score([IMAGES[0]] * 2, [curled, plain])
    assert both[0] == both[1]


def test_the_published_sizes_are_read_off_the_weights():
    """What ViT-H/14 is follows from the shapes of its tensors."""
    sizes = {"side": 224, "patch": 14, "widths": (1280, 1024), "layers": (32, 24), "hidden": (5120, 4096)}
    with torch.device("meta"):
        module = CLIP(**sizes, heads=(16, 16), vocabulary=49408)
    stored = {
        name: Tensor(tuple(value.shape), np.dtype("float32"), lambda: np.zeros(0))
        for name, value in module.state_dict().items()
    }
    config, translated = open_clip.translate(Path("HPS_v2_compressed.pt"), stored, "gelu")
    model = build_model("CLIPModel", config)
    assert model.settings == build_model("CLIPModel", published.CLIP_H).settings
    assert {name: tensor.shape for name, tensor in translated.items()} == torch_shapes(model)


def torch_head(state=None):
    """The released head, dropout left out."""
    sizes = [768, 1024, 128, 64, 16, 1]
    layers = [torch.nn.Linear(sizes[i], sizes[i + 1]) for i in range(5)]
    places = ["0", "2", "4", "6", "7"]
    head = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict(dict(zip(places, layers, strict=True)))})
    if state is not None:
        head.load_state_dict(state)
    return head, torch.nn.Sequential(*layers)


def test_the_aesthetic_score(tmp_path):
    source = write_clip(tmp_path / "published", clip_config(features=768, activation="quick_gelu"))
    head, function = torch_head()
    torch.save(head.state_dict(), tmp_path / "head.pth")
    reward = convert("aesthetic", tmp_path, source, head=tmp_path / "head.pth")
    images, _, _ = theirs_of(source)
    scores = reward.score(IMAGES, PROMPTS)
    np.testing.assert_allclose(scores, function(images)[:, 0].detach(), rtol=1e-4)
    np.testing.assert_array_equal(reward.score(IMAGES, ["", "", ""]), scores)
    assert re.fullmatch(r"published [0-9a-f]{8}, head\.pth [0-9a-f]{8}", reward.version)


def test_the_published_aesthetic_head(test_data):
    file = test_data / "sac+logos+ava1-l14-linearMSE.pth"
    _, function = torch_head(torch.load(file, map_location="cpu", weights_only=True))
    images = np.random.default_rng(0).standard_normal((64, 768), np.float32)
    images /= np.linalg.norm(images, axis=-1, keepdims=True)
    theirs = function(torch.from_numpy(images))[:, 0].detach().numpy()
    head = aesthetic.read_head(file, 768)
    ours = aesthetic.apply_head(head, jnp.asarray(images))
    print(f"\nlargest relative difference {np.abs(ours / theirs - 1).max():.1e} of scores {theirs[:3]}")
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_folder_of_another_reward(tmp_path):
    convert("pickscore", tmp_path, write_clip(tmp_path / "published"))
    shutil.copytree(tmp_path / "pickscore", tmp_path / "clip-h")
    with pytest.raises(ValueError, match=r"clip-h.reward\.json: is of the reward 'pickscore', not clip-h"):
        load_reward("clip-h", tmp_path)
    write_json(tmp_path / "clip-h" / "reward.json", {"name": "clip-h", "source": "somewhere"})
    with pytest.raises(ValueError, match=r"clip-h.reward\.json: sha256 is missing; make the"):
        load_reward("clip-h", tmp_path)
    (tmp_path / "clip-h" / "reward.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"reward\.json: no such file; make the folder with python"):
        load_reward("clip-h", tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights in"):
        load_reward("hpsv2.1", tmp_path)
    assert set(RECIPES) <= set(REWARDS)


def test_networks_multiply_in_float32_on_every_device():
    seen = []

    def network(params, pixels, tokens):
        seen.append(jax.config.jax_default_matmul_precision)
        return pixels.sum((1, 2, 3)) * params + tokens

    def prepare(image):
        return clip_pixels(image, 4)

    scorer = Scorer(network, np.float32(1), prepare, lambda prompts: np.zeros(len(prompts)), batch_size=8)
    assert scorer(pictures((4, 4)), ["a"]).shape == (1,)
    assert seen == ["highest"]
