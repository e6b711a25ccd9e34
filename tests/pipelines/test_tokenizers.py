"""A tokenizer reads the same from both its forms, gives the ids that diffusers takes, and fits its model."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from example_shards import FINGERPRINT, MANIFEST, make_example, start_dataset, write_dataset
from model_folders import make_run
from tables import each_row
from tiny_clip import clip_config, write_clip, write_json
from tiny_model import (
    EXCLAMATION_MARK,
    TEXT_ENCODER,
    random_params,
    write_model,
    write_pairs,
    write_tokenizer,
)
from transformers import CLIPTokenizer

from dspo_jax.conversion.export_model import export
from dspo_jax.conversion.import_model import import_model
from dspo_jax.data import datasets, records, shards
from dspo_jax.evaluation.prompt_sets import PromptSet
from dspo_jax.evaluation.run import Comparison, evaluate
from dspo_jax.models.model import build_model
from dspo_jax.pipelines import tokenizers
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.rewards import clip_folder
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Drawing, Rendering
from dspo_jax.weights.components import write_params

CAPTIONS = [
    "a cat, and a <x>",
    "",
    "É é e\u0301 \u732b\n\t 🦊 <|endoftext|>",
    "y" * 200,
    "<X> <x>_1 <y><x>",
    "wow!!!",
]
# Config of the text encoder that `write_tokenizer`'s 514 tokens and some more fit.
ENCODER = {"vocab_size": 520, "max_position_embeddings": 77}
ADDED = ["<x>", "<x>_1", "<x>_2", "<y>", "<z>_1"]
# In the form of transformers 4: flags of each special token, which no longer mean anything.
OLD_FLAGS = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def edit_json(path, **changes):
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def write_added(folder, tokens=ADDED):
    """A tokenizer in the older form with tokens that were added to it."""
    write_tokenizer(folder)
    write_json(folder / "added_tokens.json", {token: 514 + i for i, token in enumerate(tokens)})
    return folder


def write_published(folder):
    """A tokenizer as of openai/clip-vit-large-patch14 and Stable Diffusion 1.5."""
    write_tokenizer(folder)
    special = {
        "bos_token": {"content": "<|startoftext|>", **OLD_FLAGS},
        "eos_token": {"content": "<|endoftext|>", **OLD_FLAGS},
        "unk_token": {"content": "<|endoftext|>", **OLD_FLAGS},
        "pad_token": "<|endoftext|>",
    }
    write_json(folder / "special_tokens_map.json", special)
    typed = {key: {"__type": "AddedToken", **value} for key, value in special.items() if key != "pad_token"}
    edit_json(folder / "tokenizer_config.json", **typed, errors="replace", do_lower_case=True)


def save_today(folder):
    """Replaces the files of a tokenizer by those that today's transformers writes."""
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    shutil.rmtree(folder)
    tokenizer.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    return folder


@each_row(
    "write",
    [write_tokenizer, write_published, write_added, lambda folder: write_tokenizer(folder, EXCLAMATION_MARK)],
    ids=["plain", "published", "added", "OpenCLIP"],
)
def test_both_forms_are_one_tokenizer(write, tmp_path):
    write(tmp_path / "tokenizer")
    old = tokenizers.read_tokenizer(tmp_path / "tokenizer", ENCODER)
    old_ids, old_files = old(CAPTIONS), old.digest_files()
    assert old_ids.shape == (len(CAPTIONS), 77)
    assert old_ids.dtype == np.int32
    assert old.find_long(CAPTIONS) == ["y" * 200]
    today = tokenizers.read_tokenizer(save_today(tmp_path / "tokenizer"), ENCODER)
    np.testing.assert_array_equal(today(CAPTIONS), old_ids)
    assert today.digest() == old.digest()
    assert today.digest_files() is None
    assert (old_files is None) == (write is write_added)


def test_digests_stay_what_they_are(tmp_path):
    """They stand in the manifests of users' shards."""
    write_tokenizer(tmp_path)
    tokenizer = tokenizers.read_tokenizer(tmp_path, ENCODER)
    assert tokenizer.digest() == "9d5cec7356c228031940871a7a95b08315685d0819b5cfd48ff9a9786b806b7b"
    files = (tmp_path / "vocab.json").read_bytes() + (tmp_path / "merges.txt").read_bytes()
    assert tokenizer.digest_files() == hashlib.sha256(files).hexdigest()


def test_digests_follow_all_that_makes_ids(tmp_path):
    def digest():
        return tokenizers.read_tokenizer(tmp_path, ENCODER).digest()

    write_tokenizer(tmp_path)
    digests = [digest()]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n! !\n")
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    write_json(tmp_path / "vocab.json", vocabulary | {"!!": 514})
    digests.append(digest())
    write_added(tmp_path, ["<x>"])
    digests.append(digest())
    write_added(tmp_path, ["<y>"])
    digests.append(digest())
    today = json.loads((save_today(tmp_path) / "tokenizer.json").read_text())
    today["added_tokens"][-1]["lstrip"] = True
    write_json(tmp_path / "tokenizer.json", today)
    digests.append(digest())
    assert len(set(digests)) == 5
    # How the files are laid out is not of that.
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write_json(tmp_path / "vocab.json", vocabulary)
    (tmp_path / "added_tokens.json").unlink(missing_ok=True)
    assert digest() == digests[0]


def test_tokenizer_json_is_read_before_older_files(tmp_path):
    """As transformers does; the older files are then not what shards were encoded with."""
    save_today(write_added(tmp_path))
    write_tokenizer(tmp_path)
    tokenizer = tokenizers.read_tokenizer(tmp_path, ENCODER)
    assert 514 in tokenizer(["<x>"])
    assert tokenizer.digest_files() is None


def test_inversions_of_several_vectors_are_written_out_as_diffusers_does(tmp_path):
    loaders = pytest.importorskip("diffusers.loaders")
    tokenizer = tokenizers.read_tokenizer(write_added(tmp_path), ENCODER)
    captions = [*CAPTIONS, "<x>,<x>", "<y> <z> <z>_1", "<x> " * 40, "x > <x", "A <x> OF <Y>"]
    theirs = [
        loaders.TextualInversionLoaderMixin().maybe_convert_prompt(caption, tokenizer.tokenizer)
        for caption in captions
        if caption != CAPTIONS[4]  # of two that overlap, diffusers takes any first
    ]
    ours = tokenizer([caption for caption in captions if caption != CAPTIONS[4]])
    padded = tokenizer.tokenizer(theirs, padding="max_length", truncation=True, max_length=77)
    np.testing.assert_array_equal(ours, padded["input_ids"])
    assert ours[0, 9:15].tolist() == tokenizer.tokenizer.convert_tokens_to_ids(
        ["a</w>", "<x>", "<x>_1", "<x>_2", "<|endoftext|>", "<|endoftext|>"]
    )
    assert tokenizer.find_long(["<x> " * 25, "<x> " * 26]) == ["<x> " * 26]


def test_a_textual_inversion_tells_the_unet_what_it_does_in_diffusers(tiny_model, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from torch_modules import assert_close

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    embeddings = 3 * torch.randn(3, TEXT_ENCODER["hidden_size"], generator=torch.Generator().manual_seed(0))
    theirs.load_textual_inversion({"<x>": embeddings}, token="<x>")
    theirs.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        states, _ = theirs.encode_prompt("a <x> on a chair", "cpu", 1, False)
    pipe = load_pipeline(tmp_path / "model")
    tokens = pipe.tokenize(["a <x> on a chair"])
    assert {514, 515, 516} <= set(tokens.flat)
    params = {"text_encoder": pipe.read_params("text_encoder", "float32")}
    assert_close(pipe.encode_conditioning(params, {"tokens": tokens}).states, states.numpy(), 1e-4)


@each_row("form", ["old", "today"])
def test_ids_beyond_the_embeddings_are_refused(form, model):
    folder = write_added(model / "tokenizer", ["<x>"])
    if form == "today":
        save_today(folder)
    message = f"{folder}: token '<x>' has the id 514, but the text encoder has embeddings of 514 tokens"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*resized embeddings[^\n]*$"):
        load_pipeline(model)


def test_the_highest_id_counts_and_not_the_number_of_tokens(model):
    file = model / "tokenizer" / "vocab.json"
    vocabulary = json.loads(file.read_text())
    vocabulary["ÿ"] = 600
    write_json(file, vocabulary)
    with pytest.raises(ValueError, match="token 'ÿ' has the id 600, but the text encoder has embeddings"):
        load_pipeline(model)


def test_another_clips_tokenizer_is_refused_by_import(model, out):
    vocabulary = json.loads((model / "tokenizer" / "vocab.json").read_text())
    more = {f"{token}!": 514 + i for i, token in enumerate(vocabulary)}
    write_json(model / "tokenizer" / "vocab.json", vocabulary | more)
    with pytest.raises(ValueError, match="embeddings of 514 tokens"):
        import_model(model, out)
    assert not list(out.parent.iterdir())


@each_row(
    ("length", "expected"), [("absent", 77), (None, 77), (int(1e30), 77), (1e30, 77), (77, 77), (40, 40)]
)
def test_the_length_of_captions(length, expected, model):
    file = model / "tokenizer" / "tokenizer_config.json"
    edit_json(file, model_max_length=length)
    if length == "absent":
        config = json.loads(file.read_text())
        del config["model_max_length"]
        write_json(file, config)
    pipe = load_pipeline(model)
    assert pipe.caption_length == expected
    assert pipe.tokenize(["a", "x" * 100]).shape == (2, 1, expected)
    assert pipe.empty_tokens.shape == (1, expected)
    assert pipe.fingerprint()["caption_length"] == expected


@each_row("length", [10**9, 78, 2, 0, -1, "77", 77.0, True, [77]])
def test_lengths_that_a_text_encoder_cannot_take_are_refused(length, model, out):
    file = model / "tokenizer" / "tokenizer_config.json"
    edit_json(file, model_max_length=length)
    message = f"{file}: model_max_length = {length!r}; allowed: integers from 3 to 77, the positions of the"
    for read in (load_pipeline, lambda model: import_model(model, out)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
            read(model)


def test_text_encoders_of_one_model_take_captions_of_one_length(tmp_path):
    model = write_model(tmp_path / "sdxl", family="sdxl")
    edit_json(model / "tokenizer_2" / "tokenizer_config.json", model_max_length=40)
    message = f"{model / 'tokenizer_2'}: captions of 40 tokens, but of 77 in {model / 'tokenizer'}; give"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        load_pipeline(model)


def replace_text_encoder(model, **changes):
    """A text encoder of another size, with random weights."""
    network = build_model("CLIPTextModel", TEXT_ENCODER | changes)
    write_params(model / "text_encoder", network, random_params(network, np.random.default_rng(0)))


@each_row("length", [40, 248])
def test_shards_of_other_lengths_are_read_back(length, tmp_path):
    """248 is Long-CLIP's."""
    model = write_model(tmp_path / "model")
    replace_text_encoder(model, max_position_embeddings=248)
    edit_json(model / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    folder = write_pairs(tmp_path / "pairs", model, train=3, validation=0)
    pipe = load_pipeline(model)
    shards.check_manifest(shards.read_manifest(folder), pipe.fingerprint())
    batch = records.Records(datasets.read_datasets(folder), "train", "16x16").read([0, 2])
    np.testing.assert_array_equal(batch["tokens"], pipe.tokenize(batch["caption"]))
    assert batch["tokens"].shape == (2, 1, length)
    with pytest.raises(ValueError, match=rf"model.caption_length = {length}, but this model has 77"):
        shards.check_manifest(
            shards.read_manifest(folder), pipe.fingerprint() | {"caption_length": 77}, path=folder
        )


def earlier(fingerprint):
    """What a version of dspo_jax before `tokens_sha256` wrote."""
    return {
        key: value for key, value in fingerprint.items() if key not in ("tokens_sha256", "caption_length")
    }


def test_shards_fit_a_model_whose_tokenizer_is_saved_anew(model, tmp_path):
    before = load_pipeline(model).fingerprint()
    save_today(model / "tokenizer")
    today = load_pipeline(model).fingerprint()
    assert today["tokenizer_sha256"] == [None]
    write_dataset(tmp_path / "before", manifest=MANIFEST | {"model": before})
    manifest = shards.read_manifest(tmp_path / "before")
    shards.check_manifest(manifest, today)
    assert shards.is_complete(tmp_path / "before", MANIFEST | {"model": today}, ["train", "validation"])
    write_dataset(tmp_path / "today", manifest=MANIFEST | {"model": today})
    assert len(datasets.read_datasets(f"{tmp_path / 'before'},{tmp_path / 'today'}")) == 2


def test_shards_of_earlier_versions_fit_an_unchanged_tokenizer_only(model, tmp_path):
    fingerprint = load_pipeline(model).fingerprint()
    made_with = MANIFEST | {"model": earlier(fingerprint)}
    write_dataset(tmp_path / "before", manifest=made_with)
    manifest = shards.read_manifest(tmp_path / "before")
    shards.check_manifest(manifest, fingerprint)
    assert shards.is_complete(tmp_path / "before", MANIFEST | {"model": fingerprint}, ["train", "validation"])
    write_dataset(tmp_path / "today", manifest=MANIFEST | {"model": fingerprint})
    assert len(datasets.read_datasets(f"{tmp_path / 'before'},{tmp_path / 'today'}")) == 2

    start_dataset(tmp_path / "begun", {"train": 2}, manifest=made_with).write_shard(
        "train", 0, [make_example(0)]
    )
    resumed = start_dataset(tmp_path / "begun", {"train": 2}, manifest=MANIFEST | {"model": fingerprint})
    assert resumed.finished() == {("train", 0)}

    write_added(model / "tokenizer", ["<x>"])
    replace_text_encoder(model, vocab_size=515)
    added = load_pipeline(model).fingerprint()
    for theirs in (earlier(fingerprint), fingerprint):
        with pytest.raises(ValueError, match=r"model.token\w+_sha256 = .* encode the data again"):
            shards.check_manifest({"model": theirs}, added)
    shards.check_manifest({"model": added}, added)


@each_row("key", ["tokens_sha256", "caption_length"])
def test_datasets_of_other_tokens_are_not_mixed(key, tmp_path):
    for name, value in (("one", [1]), ("two", [2])):
        model = FINGERPRINT | {"tokens_sha256": ["0"], "caption_length": 77} | {key: value}
        write_dataset(tmp_path / name, manifest=MANIFEST | {"model": model})
    with pytest.raises(ValueError, match=rf"model.{key} = \[1\] and \[2\]: datasets of one run must agree"):
        datasets.read_datasets(f"{tmp_path / 'one'},{tmp_path / 'two'}")


BERT = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
    "vocab": {"[UNK]": 0, "a": 1},
}


def spoil_json(name, **changes):
    return lambda folder: edit_json(folder / name, **changes)


@each_row(
    ("spoil", "message"),
    [
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is no CLIP tokenizer ("),
        (lambda f: (f / "tokenizer.json").write_text("[" * 10**5), "tokenizer.json is no CLIP tokenizer ("),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json is no CLIP tokenizer ("),
        (spoil_json("tokenizer.json", model=[]), "tokenizer.json is no CLIP tokenizer ("),
        (
            spoil_json("tokenizer.json", model=BERT),
            "its bos_token '<|startoftext|>' is not in the vocabulary",
        ),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer.json is no CLIP tokenizer ("),
        (spoil_json("tokenizer_config.json", bos_token=None), "tokenizer.json is no CLIP tokenizer ("),
        (spoil_json("tokenizer_config.json", pad_token=None), "pad_token = None: captions are padded to one"),
        (
            lambda f: (f / "tokenizer.json").unlink(),
            "vocab.json: no such file; fetch the model again: a CLIP tokenizer is vocab.json and merges.txt",
        ),
    ],
)
def test_what_is_no_tokenizer_is_refused(spoil, message, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    spoil(save_today(tmp_path / "tokenizer"))
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as caught:
        tokenizers.read_tokenizer(tmp_path / "tokenizer", ENCODER)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ImportError("no tokenizers")])
def test_what_says_nothing_of_the_files_is_not_blamed_on_them(error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    write_tokenizer(tmp_path)
    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        tokenizers.open_tokenizer(tmp_path, ENCODER["vocab_size"])
    assert caught.value is error


def test_rewards_take_both_forms(tmp_path):
    folder = write_clip(tmp_path / "clip")
    model = clip_folder.read_clip(folder)
    ids = clip_folder.read_tokenizer(folder, model)(CAPTIONS)
    saved = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    for name in tokenizers.FILES:
        (folder / name).unlink(missing_ok=True)
    saved.save_pretrained(folder)
    np.testing.assert_array_equal(clip_folder.read_tokenizer(folder, model)(CAPTIONS), ids)

    saved.add_tokens(["<x>"])
    saved.save_pretrained(folder)
    with pytest.raises(
        ValueError, match="clip: token '<x>' has the id 514, but the text encoder has embeddi"
    ):
        clip_folder.read_tokenizer(folder, model)
    write_json(folder / "config.json", clip_config(eos_token_id=512))
    write_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"with the end token 513; config\.json asks for 514 with 512"):
        clip_folder.read_tokenizer(folder, clip_folder.read_clip(folder))


@pytest.mark.ci
@each_row("kind", ["sd15", "sdxl"])
def test_an_exported_model_comes_back_from_diffusers(kind, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    base = write_model(tmp_path / "base", family=kind)
    exported, saved, imported = (tmp_path / name for name in ("exported", "saved", "imported"))
    export(make_run(tmp_path / "run", base), exported)
    diffusers.DiffusionPipeline.from_pretrained(exported, local_files_only=True).save_pretrained(saved)
    assert not list(saved.rglob("vocab.json"))
    import_model(saved, imported)
    assert sorted(file.name for file in (imported / "tokenizer").iterdir()) == [
        *("tokenizer.json", "tokenizer_config.json")
    ]
    ours, theirs = load_pipeline(exported), load_pipeline(imported)
    np.testing.assert_array_equal(theirs.tokenize(CAPTIONS), ours.tokenize(CAPTIONS))
    shards.check_manifest({"model": ours.fingerprint()}, theirs.fingerprint())
    if kind == "sd15":  # the drawing of SDXL takes longer to compile
        found = evaluate(
            Comparison(
                exported,
                {"saved": saved, "imported": imported},
                PromptSet("one", (Prompt("a red heart"),)),
                seeds=1,
            ),
            tmp_path / "out",
            Rendering(Drawing(steps=1, guidance_scale=2.0)),
            rewards=["compressibility"],
        )
        for name in ("saved", "imported"):
            assert found.scores[name]["compressibility"] == found.scores["base"]["compressibility"]
