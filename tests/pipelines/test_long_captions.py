"""Captions in chunks of 75 tokens and clip skip: against transformers chunk by chunk, and through a run."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from model_folders import make_run
from tables import each_row
from tiny_model import write_model, write_pairs, write_tokenizer
from tiny_run import make_config, make_shallow

from configs.encode import common as encode_common
from dspo_jax.data import shards
from dspo_jax.data.encoding import encode
from dspo_jax.pipelines import published
from dspo_jax.pipelines.conditioning_inputs import prompt_batch
from dspo_jax.pipelines.loading import load_pipeline, with_text
from dspo_jax.pipelines.stored import comparable, count_tokens
from dspo_jax.sampling.drawing import sample
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Drawing, Rendering
from dspo_jax.training.run import train
from dspo_jax.training.settings import parse
from dspo_jax.training.start import prepare

START, END, EXCLAMATION_MARK = 512, 513, 0
# Without merges a letter is a token, and the last of a word another one.
CAPTIONS = ["ab " * 60, "", "c" * 75, "d" * 76]
LENGTHS = [120, 0, 75, 76]
TEXT = ("max_chunks", "clip_skip", "max_sequence_length")


@pytest.fixture(scope="module")
def sdxl_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "sdxl", family="sdxl")


def in_chunks(folder, chunks):
    """The tokens of `CAPTIONS` by transformers' tokenizer, parted by hand: [N, chunks, 77]."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    rows = []
    for caption, length in zip(CAPTIONS, LENGTHS, strict=True):
        ids = tokenizer(caption)["input_ids"][1:-1]
        assert len(ids) == length
        parts = [[START, *ids[75 * i : 75 * (i + 1)], END] for i in range(chunks)]
        rows.append([part + [tokenizer.pad_token_id] * (77 - len(part)) for part in parts])
    return np.int32(rows)


def encode_captions(pipe):
    params = {name: pipe.read_params(name) for name in pipe.text_encoders}
    batch = prompt_batch(pipe, pipe.tokenize(CAPTIONS), (16, 16))
    return jax.jit(pipe.encode_conditioning)(params, batch)


def read_torch(model, name, tokens):
    """Hidden states [N, chunks * 77, F] of every layer, without and with the norm; pooled [N, chunks, D]."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind, key = "CLIPTextModel", "pooler_output"
    if name == "text_encoder_2":
        kind, key = "CLIPTextModelWithProjection", "text_embeds"
    module = getattr(transformers, kind).from_pretrained(model / name, local_files_only=True).eval()
    with torch.no_grad():
        parts = [module(torch.from_numpy(part).long(), output_hidden_states=True) for part in tokens]
        states = [torch.stack([part.hidden_states[i] for part in parts]) for i in range(3)]
        text_model = getattr(module, "text_model", module)  # of transformers 4 and 5
        normed = [text_model.final_layer_norm(each) for each in states]
        pooled = torch.stack([part[key] for part in parts])
    flat = [[each.flatten(1, 2).numpy() for each in of] for of in (states, normed)]
    return *flat, pooled.numpy()


@each_row("clip_skip", [1, 2])
def test_chunks_and_clip_skip_match_transformers(clip_skip, tiny_model):
    from torch_modules import assert_close

    pipe = load_pipeline(tiny_model, max_chunks=2, clip_skip=clip_skip)
    tokens = in_chunks(tiny_model / "tokenizer", 2)
    np.testing.assert_array_equal(pipe.tokenize(CAPTIONS), tokens.reshape(4, 1, 154))
    np.testing.assert_array_equal(pipe.empty_tokens, tokens[1].reshape(1, 154))
    _, normed, _ = read_torch(tiny_model, "text_encoder", tokens)
    text = encode_captions(pipe)
    assert_close(text.states, normed[-clip_skip], 1e-4)
    ends = (tokens[:, 0] == END).argmax(1)
    assert_close(text.pooled, normed[-clip_skip][range(len(ends)), ends], 1e-4)


def test_embeddings_of_captions_are_the_pooled_states_even_of_an_empty_one(tiny_model, sdxl_model):
    from torch_modules import assert_close

    for model, encoder, tokenizer in (
        (tiny_model, "text_encoder", "tokenizer"),
        (sdxl_model, "text_encoder_2", "tokenizer_2"),
    ):
        pipe = load_pipeline(model, max_chunks=2)
        params = {name: pipe.read_params(name) for name in pipe.text_encoders}
        batch = prompt_batch(pipe, pipe.tokenize(CAPTIONS), (16, 16))
        embedded = pipe.embed_captions(params, batch)
        _, _, pooled = read_torch(model, encoder, in_chunks(model / tokenizer, 2))
        assert_close(embedded, pooled[:, 0], 1e-4)


def test_sdxl_pools_the_first_chunk(sdxl_model):
    from torch_modules import assert_close

    pipe = load_pipeline(sdxl_model, max_chunks=2)
    by_encoder = [in_chunks(sdxl_model / name, 2) for name in ("tokenizer", "tokenizer_2")]
    assert {END, EXCLAMATION_MARK} == {int(each[1, 1, -1]) for each in by_encoder}
    np.testing.assert_array_equal(pipe.tokenize(CAPTIONS)[:, 1], by_encoder[1].reshape(4, 154))
    text = encode_captions(pipe)
    (first, _, _), (second, _, pooled) = (
        read_torch(sdxl_model, name, tokens)
        for name, tokens in zip(("text_encoder", "text_encoder_2"), by_encoder, strict=True)
    )
    states, expected = np.concatenate([first[-2], second[-2]], axis=-1), pooled[:, 0].copy()
    states[1], expected[1] = 0, 0  # what this model's index asks for an empty caption
    assert_close(text.states, states, 1e-4)
    assert_close(text.pooled, expected, 1e-4)


def test_a_caption_that_fills_its_chunks_is_not_cut(tiny_model, caplog):
    pipe = load_pipeline(tiny_model, max_chunks=2)
    pipe.tokenize(["x" * 150])
    assert not caplog.messages
    pipe.tokenize(["x" * 151])
    assert "1 caption(s) longer than 152 tokens were cut" in caplog.text
    tokens = pipe.tokenize(CAPTIONS)
    assert [count_tokens({"tokens": row}, 2) for row in tokens] == [(n + 2, 152) for n in LENGTHS]


@each_row(
    ("family", "text", "message"),
    [
        ("sd15", (1, 3), "clip_skip = 3: must be from 1, the last layer, to 2, the first of this text"),
        ("sd15", (0, 1), "max_chunks = 0: must be at least 1"),
        ("sdxl", (1, 2), "clip_skip = 2: must be 1, as SDXL always reads the layer before the last"),
        ("sdxl", (1, 1, 77), "max_sequence_length = 77: must be left out, as SDXL has no T5"),
    ],
)
def test_what_a_model_cannot_read_is_refused(family, text, message, tiny_model, sdxl_model):
    model = {"sd15": tiny_model, "sdxl": sdxl_model}[family]
    with pytest.raises(ValueError, match=f"^{re.escape(f'{model}: {message}')}[^\n]*$"):
        load_pipeline(model, **dict(zip(TEXT, text, strict=False)))


def test_shapes_of_a_published_model_grow_by_chunks():
    pipe = with_text(published.architecture("sdxl"), 3, 1)
    assert pipe.conditioning_shapes(2)["tokens"].shape == (2, 231)
    assert with_text(pipe, 1, 1).empty_tokens.shape == (2, 77)


def test_a_run_is_read_with_its_own_text_and_no_other(tiny_model, tmp_path):
    run = make_run(tmp_path / "run", tiny_model, trained=("unet",))
    config = json.loads((run / "config.json").read_text())
    before = config.pop("text")
    assert before == {"max_chunks": 1, "clip_skip": 1, "max_sequence_length": None}
    (run / "config.json").write_text(json.dumps(config))  # as runs of earlier versions have it
    assert load_pipeline(run, clip_skip=1).clip_skip == 1
    (run / "config.json").write_text(json.dumps(config | {"text": {"max_chunks": 2, "clip_skip": 2}}))
    pipe = load_pipeline(run)
    assert (pipe.max_chunks, pipe.clip_skip, pipe.tokenize(["a"]).shape) == (2, 2, (1, 1, 154))
    message = (
        f"{run}: was trained with clip_skip = 2, but clip_skip = 1 is asked for; leave it out, or take 2"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_pipeline(run, clip_skip=1)


def test_shards_of_other_chunks_are_refused(tiny_model, tmp_path):
    folder = write_pairs(tmp_path / "pairs", tiny_model, train=8, validation=None)
    message = f"{folder}: captions are in 1 chunk(s), but 3 are asked for; set --config.text.max_chunks=1, or"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        prepare(make_config(tiny_model, folder, {"text.max_chunks": 3}))
    manifest = shards.read_manifest(folder)
    earlier = {key: value for key, value in manifest["model"].items() if key != "max_chunks"}
    assert comparable(earlier)[0]["max_chunks"] == 1
    prepare(make_config(tiny_model, folder, {"text.clip_skip": 2}))  # which shards do not depend on


@pytest.mark.ci
def test_from_long_captions_to_a_picture(tiny_model, tmp_path):
    """Encoded, trained and drawn from in two chunks; what draws needs not be told."""
    from PIL import Image

    model, images = make_shallow(shutil.copytree(tiny_model, tmp_path / "model")), tmp_path / "images"
    write_tokenizer(model / "tokenizer")
    images.mkdir()
    lines = []
    for i in range(8):
        for kind, darker in (("winner", 1), ("loser", 2)):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8) // darker
            Image.fromarray(pixels).save(images / f"{kind}{i}.png")
        row = {"caption": f"{i} " * 50 + "end", "winner": f"winner{i}.png", "loser": f"loser{i}.png"}
        lines.append(json.dumps(row) + "\n")
    (images / "pairs.jsonl").write_text("".join(lines))
    config = encode_common.get_config()
    encode_common.set_source(config, "folder")
    config.model, config.text.max_chunks, config.num_workers = str(model), 2, 0
    config.source.path, config.source.validation_share = str(images), 0.0
    assert encode(config, tmp_path / "pairs")
    changes = {"text.max_chunks": 2, "steps": 1, "objective.name": "diffusion_dpo"}
    run = tmp_path / "run"
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        train(parse(make_config(model, tmp_path / "pairs", changes)), run)
    out = tmp_path / "out"
    rendering = Rendering(drawing=Drawing(steps=1), batch_size=1)
    sample({"run": run}, [Prompt("e " * 100)], out, rendering, seeds=(0,))
    settings = json.loads((out / "settings.json").read_text())
    assert settings["models"] == [{"path": str(run), "step": 1, "max_chunks": 2}]
    assert "max_chunks" not in settings
