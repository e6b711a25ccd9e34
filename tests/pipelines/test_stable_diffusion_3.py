"""Captions of Stable Diffusion 3: T5's tokens against transformers', joined states against diffusers'."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row
from tiny_model import END, OPEN_CLIP, TEXT_ENCODER, write_tokenizer

from dspo_jax.pipelines.stable_diffusion_3 import join_text
from dspo_jax.pipelines.t5_tokenizer import read_t5_tokenizer
from dspo_jax.pipelines.tokenizers import read_tokenizer

transformers = pytest.importorskip("transformers")
from tiny_sd3 import write_t5_tokenizer  # noqa: E402

CAPTIONS = ["a red fox", "", "snow on a red fox on snow on a fox", "fox \u2581 unheard"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5_tokenizer")
    write_t5_tokenizer(folder)
    return folder


@each_row("length", [4, 6, 20])
def test_captions_are_ended_and_padded_as_in_diffusers(length, folder):
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    options = {"padding": "max_length", "max_length": length, "truncation": True, "add_special_tokens": True}
    tokenizer = read_t5_tokenizer(folder, 9, length)
    ids = tokenizer(CAPTIONS)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, theirs(CAPTIONS, **options)["input_ids"])
    whole = [len(theirs(caption)["input_ids"]) for caption in CAPTIONS]
    expected = [caption for caption, count in zip(CAPTIONS, whole, strict=True) if count > length]
    assert tokenizer.find_long(CAPTIONS) == expected
    assert bool(expected) == (length < 20)


def test_the_digest_is_of_the_tokens_and_not_of_their_number(folder, tmp_path):
    digest = read_t5_tokenizer(folder, 9, 4).digest()
    assert read_t5_tokenizer(folder, 100, 20).digest() == digest
    file = shutil.copytree(folder, tmp_path / "other") / "tokenizer.json"
    file.write_text(file.read_text().replace("fox", "cat"))
    assert read_t5_tokenizer(tmp_path / "other", 9, 4).digest() != digest


@each_row(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "tokenizer.json: no such file; fetch the model again"),
        (
            "spiece.model",
            FileNotFoundError,
            "spiece.model alone is not read; write this file beside it: python",
        ),
        ("{", ValueError, "tokenizer.json: no tokenizer (EOF while parsing"),
        ("first", ValueError, "no tokenizer of T5: its first tokens are ['<unk>', '</s>']"),
        ("large", ValueError, "has a token with the id 8, but the text encoder has embeddings of 8 tokens"),
    ],
)
def test_what_is_no_tokenizer_of_t5_is_refused(content, error, message, folder, tmp_path):
    text = (folder / "tokenizer.json").read_text()
    if content == "spiece.model":
        (tmp_path / content).write_bytes(b"")
    elif content == "first":
        swapped = text.replace("<pad>", "<x>").replace("<unk>", "<pad>").replace("<x>", "<unk>")
        (tmp_path / "tokenizer.json").write_text(swapped)
    elif content:
        (tmp_path / "tokenizer.json").write_text(text if content == "large" else content)
    with pytest.raises(error) as caught:
        read_t5_tokenizer(tmp_path, 8, 20)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.ci
@each_row("has_t5", [True, False])
def test_states_are_joined_as_in_diffusers(has_t5, folder, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from torch_modules import assert_close, randomize, save

    encoders, ours, clip_tokenizers = [], [], []
    for number, (config, pad) in enumerate(((TEXT_ENCODER, END), (OPEN_CLIP, "!"))):
        settings = transformers.CLIPTextConfig(**config | {"projection_dim": 6 + number})
        encoders.append(randomize(transformers.CLIPTextModelWithProjection(settings), number))
        model, params = save(encoders[-1], tmp_path / f"clip{number}")
        write_tokenizer(tmp_path / f"tokenizer{number}", pad)
        tokenizer = read_tokenizer(tmp_path / f"tokenizer{number}", model.settings)
        clip_tokenizers.append(tokenizer.tokenizer)
        ours.append(model.apply(params, tokenizer(CAPTIONS)))
    width = 2 + sum(config["hidden_size"] for config in (TEXT_ENCODER, OPEN_CLIP))
    t5 = transformers.T5Config(
        vocab_size=9, d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    module = randomize(transformers.T5EncoderModel(t5))
    model, params = save(module, tmp_path / "t5")
    length = 12
    states = jnp.zeros((len(CAPTIONS), length, width))
    if has_t5:
        states = model.apply(params, read_t5_tokenizer(folder, 9, length)(CAPTIONS))

    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=1,
            caption_projection_dim=4,
            joint_attention_dim=width,
            pos_embed_max_size=4,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=encoders[0],
        tokenizer=clip_tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=clip_tokenizers[1],
        text_encoder_3=module if has_t5 else None,
        tokenizer_3=transformers.PreTrainedTokenizerFast.from_pretrained(folder) if has_t5 else None,
    )
    with torch.no_grad():
        theirs, _, theirs_pooled, _ = pipe.encode_prompt(
            CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    joined, pooled = join_text(ours, states)
    assert_close(joined, theirs.numpy(), 1e-5, "states")
    assert_close(pooled, theirs_pooled.numpy(), 1e-5, "pooled")
