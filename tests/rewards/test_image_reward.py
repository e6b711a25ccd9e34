"""The reward `imagereward`: from the published file to scores, with random weights at a reduced size."""

import hashlib
import json
import re

import image_reward_torch as oracle
import numpy as np
import pytest
from PIL import Image
from tables import each_row

from dspo_jax.models.model import build_model
from dspo_jax.rewards import load_reward
from dspo_jax.rewards.blip_weights import read_tokenizer
from dspo_jax.rewards.image_reward import write_weights as write
from dspo_jax.rewards.preprocess import image_reward_pixels
from dspo_jax.rewards.publish import RECIPES, prepare

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402
from torch_modules import assert_close, randomize  # noqa: E402
from transformers import BertTokenizer  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

CONFIG = oracle.reduced()
LONG = "a red cat ! " * 12
# What BERT and BLIP make of them, written out: 3 [SEP] ends each, 14 is [DEC], 15 is [ENC].
IDS = {
    "A red CATS, é!": [2, 5, 6, 7, 8, 1, 11, 10, 3],
    "": [2, 3],
    "[ENC]a 猫[DEC] enc": [2, 15, 5, 12, 14, 13, 3],
    LONG: [2] + [5, 6, 7, 10] * 8 + [5, 3],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return oracle.write_vocabulary(tmp_path_factory.mktemp("bert") / "tokenizer")


@pytest.fixture(scope="module")
def module():
    return randomize(oracle.ImageReward(CONFIG))


@pytest.fixture(scope="module")
def weights(module, tmp_path_factory):
    file = tmp_path_factory.mktemp("published") / "ImageReward.pt"
    torch.save(oracle.published(module), file)
    return file


def write_weights(weights, out, tokenizer):
    write(weights, out, tokenizer, weights.name)


def draw_images(*sizes):
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (height, width, 3), np.uint8) for width, height in sizes]


def process(images, size):
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]


def test_scores_are_those_of_torch(weights, module, tokenizer, tmp_path):
    paths = {"weights": str(weights), "tokenizer": str(tokenizer)}
    job = prepare("imagereward", tmp_path / "imagereward", **paths, head=None)
    RECIPES["imagereward"].write(job)
    assert json.loads((tmp_path / "imagereward" / "config.json").read_text()) == CONFIG
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    about = {"name": "imagereward", "source": "ImageReward.pt", "sha256": digest}
    assert json.loads((tmp_path / "imagereward" / "reward.json").read_text()) == about

    images = draw_images((32, 32), (64, 48), (21, 50), (90, 32))
    prompts = list(IDS)
    reward = load_reward("imagereward", tmp_path, batch_size=3)
    assert (reward.name, reward.version) == ("imagereward", f"v1.0, ImageReward.pt {digest[:8]}")
    scores = reward.score(images, prompts)

    ids = torch.zeros(4, 35, dtype=torch.long)
    for row, tokens in zip(ids, IDS.values(), strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    lengths = torch.tensor([len(tokens) for tokens in IDS.values()])
    assert lengths.tolist() == [9, 2, 7, 35]
    with torch.no_grad():
        head = module(process(images, 32), ids, torch.arange(35)[None] < lengths[:, None]).numpy()
    assert_close(scores, (head - 0.16717362830052426) / 1.0333394966054072, 1e-5, "scores")


@each_row(
    "prompt",
    [
        *IDS,
        "[enc] [MASK]cats\tred\u200b猫猫!!",
        "\0a\ufffd é e\u0301 É",
        "  [ENC]  red [SEP]",
        "dog" * 80,
        "CATS'S",
    ],
)
def test_the_ids_are_those_of_the_released_tokenizer(prompt, tokenizer):
    """It was written in Python then, and BLIP gave it its tokens in two steps."""
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    theirs = legacy.BertTokenizerLegacy(tokenizer / "vocab.txt")
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    theirs.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    settings = {"padding": "max_length", "truncation": True, "max_length": 35}
    expected = theirs([prompt], **settings)
    ours = read_tokenizer(tokenizer / "vocab.txt", len(oracle.VOCABULARY) + 2)([prompt], **settings)
    for key in ("input_ids", "attention_mask"):
        assert ours[key] == expected[key]


def test_safetensors_of_the_same_names_give_the_same_files(weights, module, tokenizer, tmp_path):
    write_weights(weights, tmp_path / "torch", tokenizer)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    write_weights(tmp_path / "w.safetensors", tmp_path / "out", tokenizer / "vocab.txt")
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()


@each_row("size", [(512, 512), (300, 224), (225, 400), (640, 418), (100, 60)])
def test_pixels_are_those_of_clips_processor(size):
    image = draw_images(size)[0]
    ours = image_reward_pixels(Image.fromarray(image), 224)
    assert (ours.shape, ours.dtype) == ((224, 224, 3), np.float32)
    np.testing.assert_allclose(ours, process([image], 224)[0].numpy().transpose(1, 2, 0), atol=1e-5)


@each_row(("margin", "left"), [(1, 0), (2, 1), (3, 2), (5, 2), (7, 4)])
def test_the_crop_is_torchvisions(margin, left):
    """It rounds half a pixel to even, where transformers rounds down."""
    columns = np.broadcast_to(np.arange(40 + margin, dtype=np.uint8)[None, :, None], (40, 40 + margin, 3))
    pixels = image_reward_pixels(Image.fromarray(columns.copy()), 40)
    first = pixels[0, 0, 0] * 0.26862954 + 0.48145466
    assert round(float(first) * 255) == left


QKV = "blip.visual_encoder.blocks.1.attn.qkv.weight"


@each_row(
    ("change", "message"),
    [
        (lambda state: state.pop(QKV), f"tensor {QKV} is missing"),
        (lambda state: state.pop("mlp.layers.4.weight"), "tensor mlp.layers.4.weight is missing"),
        (lambda state: state.pop("mlp.layers.7.bias"), "tensor mlp.layers.7.bias is missing"),
        (
            lambda state: state.update({"blip.itm_head.bias": torch.ones(2)}),
            "1 tensor(s) that are not part of",
        ),
        (
            lambda state: state.update({QKV: torch.ones(384, 64)}),
            f"tensor {QKV} has shape (384, 64), but its other tensors ask for (384, 128)",
        ),
        (
            lambda state: state.update({"blip.visual_encoder.pos_embed": torch.ones(5, 128)}),
            "tensor blip.visual_encoder.pos_embed has shape (5, 128); it should have 3 axes",
        ),
        (
            lambda state: state.update(
                {"blip.visual_encoder.patch_embed.proj.weight": torch.ones(96, 3, 4, 4)}
            ),
            "blip.visual_encoder.blocks are 96 wide; it must be a multiple of 64",
        ),
        (lambda state: state["mlp.layers.0.bias"].fill_(torch.nan), "tensor mlp.layers.0.bias is not finite"),
        (
            lambda state: [state.pop(name) for name in list(state)[1:]],
            "patch_embed.proj.weight is missing; is it the published file?",
        ),
    ],
)
def test_weights_that_are_not_imagerewards_are_refused(change, message, weights, tokenizer, tmp_path, out):
    state = torch.load(weights, weights_only=True)
    change(state)
    file = tmp_path / "changed.pt"
    torch.save(state, file)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        write_weights(file, out, tokenizer)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
    assert not list(out.parent.iterdir())


def test_the_vocabulary_of_tokenizer_json(weights, tokenizer, tmp_path):
    """Today's transformers saves no vocab.txt."""
    BertTokenizer.from_pretrained(tokenizer, local_files_only=True).save_pretrained(tmp_path / "bert")
    assert not (tmp_path / "bert" / "vocab.txt").exists()
    write_weights(weights, tmp_path / "from_txt", tokenizer)
    for i, given in enumerate((tmp_path / "bert", tmp_path / "bert" / "tokenizer.json")):
        write_weights(weights, tmp_path / f"from_json_{i}", given)
        written = (tmp_path / f"from_json_{i}" / "vocab.txt").read_bytes()
        assert written == (tmp_path / "from_txt" / "vocab.txt").read_bytes()


@each_row(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "no vocabulary; give vocab"),
        ('{"model": {"vocab": 3}}', "no vocabulary; give vocab"),
        ('{"model": {"vocab": {"a": "b", "c": 1}}}', "no vocabulary; give vocab"),
        ('{"model": {"vocab": {"a": 0, "b": 2}}}', "ids with gaps; give vocab"),
    ],
)
def test_a_tokenizer_json_without_berts_vocabulary_is_refused(content, message, weights, tmp_path, out):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {message}[^\n]*$"):
        write_weights(weights, out, tmp_path / "tokenizer.json")


def test_vocabularies_that_do_not_fit_are_refused(weights, tmp_path, out):
    with pytest.raises(ValueError, match=r"^reward imagereward: needs a tokenizer: a folder with vocab\.txt"):
        write_weights(weights, out, None)
    with pytest.raises(
        FileNotFoundError, match=r"vocab\.txt: no such file; it is vocab\.txt of bert-base-unc"
    ):
        write_weights(weights, out, tmp_path)
    cased = oracle.write_vocabulary(tmp_path / "cased", oracle.VOCABULARY[:-1])
    with pytest.raises(ValueError, match=r"vocab\.txt: has 13 tokens; the weights are for 14 tokens of bert"):
        write_weights(weights, out, cased)
    other = oracle.write_vocabulary(tmp_path / "other", ["x", *oracle.VOCABULARY[1:]])
    with pytest.raises(
        ValueError, match=r"vocab\.txt: has no \[PAD\]; the weights are for 14 tokens of bert"
    ):
        write_weights(weights, out, other)
    (tmp_path / "noise.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        ValueError, match=r"noise\.txt: not a text file; give vocab\.txt of bert-base-uncased"
    ):
        write_weights(weights, out, tmp_path / "noise.txt")
    assert not list(out.parent.iterdir())


def test_folders_that_are_not_imagerewards_are_refused(weights, tokenizer, tmp_path):
    folder = tmp_path / "imagereward"
    write_weights(weights, folder, tokenizer)
    with pytest.raises(ValueError, match="exists already"):
        write_weights(weights, folder, tokenizer)
    about, config = (folder / name for name in ("reward.json", "config.json"))
    for file, content, message in (
        (config, {"architectures": ["CLIPTextModel"]}, r"config\.json: is of class CLIPTextModel, not"),
        (
            about,
            {"name": "pickscore", "sha256": "0" * 64},
            r"reward\.json: is not of the reward imagereward; con",
        ),
        (
            about,
            {"name": "imagereward"},
            r"reward\.json: source is missing; convert the weights again",
        ),
    ):
        kept = file.read_text()
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_reward("imagereward", tmp_path)
        file.write_text(kept)
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt: no such file"):
        load_reward("imagereward", tmp_path)
    about.unlink()
    with pytest.raises(FileNotFoundError, match=r"reward\.json: no such file; convert the weights again"):
        load_reward("imagereward", tmp_path)


@each_row(
    ("part", "change", "message"),
    [
        (
            None,
            {"head_features": [1, 2]},
            "ImageReward config: head_features = [1, 2] must be a list of 4 entries",
        ),
        (None, {"vision": {}}, "ImageReward config: unknown key vision = {}"),
        ("vision_config", {"patch_size": 5}, "image_size = 32 is no multiple of patch_size = 5"),
        (
            "text_config",
            {"num_attention_heads": 3},
            "hidden_size = 64 is no multiple of num_attention_heads = 3",
        ),
        (
            "text_config",
            {"is_decoder": True},
            "ImageReward text_config config: unknown key is_decoder = True",
        ),
    ],
)
def test_configs_that_would_be_computed_wrongly_are_refused(part, change, message):
    config = CONFIG | ({part: CONFIG[part] | change} if part else change)
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model("ImageReward", config)
