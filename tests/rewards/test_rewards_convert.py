"""What the conversion of reward models writes, and what it refuses."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tables import each_row
from tiny_clip import clip_config, write_clip, write_json
from tiny_model import write_tokenizer

from dspo_jax.pipelines import tokenizers
from dspo_jax.rewards.publish import RECIPES, prepare
from dspo_jax.weights import tensors


@pytest.fixture
def clip(tmp_path):
    """A transformers folder that each test may spoil."""
    return write_clip(tmp_path / "clip")


@pytest.fixture
def state(clip):
    """The same weights with open_clip's names: the table the other way round, by hand."""
    return open_clip_state(load_file(clip / "model.safetensors"))


def open_clip_state(stored):
    state = {
        "visual.class_embedding": stored.pop("vision_model.embeddings.class_embedding"),
        "visual.conv1.weight": stored.pop("vision_model.embeddings.patch_embedding.weight"),
        "visual.positional_embedding": stored.pop("vision_model.embeddings.position_embedding.weight"),
        "visual.proj": stored.pop("visual_projection.weight").T,
        "text_projection": stored.pop("text_projection.weight").T,
        "token_embedding.weight": stored.pop("text_model.embeddings.token_embedding.weight"),
        "positional_embedding": stored.pop("text_model.embeddings.position_embedding.weight"),
        "logit_scale": stored.pop("logit_scale"),
    }
    for kind in ("weight", "bias"):
        state[f"visual.ln_pre.{kind}"] = stored.pop(f"vision_model.pre_layrnorm.{kind}")
        state[f"visual.ln_post.{kind}"] = stored.pop(f"vision_model.post_layernorm.{kind}")
        state[f"ln_final.{kind}"] = stored.pop(f"text_model.final_layer_norm.{kind}")
        for here, there in (("vision_model.encoder.layers", "visual."), ("text_model.encoder.layers", "")):
            for i in range(2):
                old, new = f"{here}.{i}", f"{there}transformer.resblocks.{i}"
                parts = [stored.pop(f"{old}.self_attn.{letter}_proj.{kind}") for letter in "qkv"]
                state[f"{new}.attn.in_proj_{kind}"] = np.concatenate(parts)
                state[f"{new}.attn.out_proj.{kind}"] = stored.pop(f"{old}.self_attn.out_proj.{kind}")
                for a, b in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
                    state[f"{new}.{a}.{kind}"] = stored.pop(f"{old}.{b}.{kind}")
                for a, b in (("c_fc", "fc1"), ("c_proj", "fc2")):
                    state[f"{new}.mlp.{a}.{kind}"] = stored.pop(f"{old}.mlp.{b}.{kind}")
    assert not stored
    return {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in state.items()}


def convert(reward, out, weights=None, tokenizer=None, head=None):
    as_text = [None if path is None else str(path) for path in (weights, tokenizer, head)]
    job = prepare(reward, out, weights=as_text[0], tokenizer=as_text[1], head=as_text[2])
    RECIPES[reward].write(job)


def refused(error, message, out, reward, weights=None, tokenizer=None, head=None):
    with pytest.raises(error, match=message) as caught:
        convert(reward, out, weights, tokenizer, head)
    assert "\n" not in str(caught.value)
    assert list(out.parent.iterdir()) == []


def test_a_folder_keeps_its_tensors_and_an_open_clip_file_is_the_same_model(clip, state, out):
    convert("pickscore", out, clip)
    original = load_file(clip / "model.safetensors")
    copied = load_file(out / "model.safetensors")
    assert copied.keys() == original.keys()
    assert all(np.array_equal(copied[name], original[name]) for name in original)
    assert json.loads((out / "config.json").read_text()) == clip_config()
    tokenizer = {"merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"}
    names = {"config.json", "model.safetensors", "reward.json"} | tokenizer
    assert {path.name for path in out.iterdir()} == names

    save_file(state, clip.parent / "open_clip.safetensors")
    other = out.with_name("hps")
    convert("hpsv2.1", other, clip.parent / "open_clip.safetensors", clip)
    translated = load_file(other / "model.safetensors")
    assert translated.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(translated[name], value, err_msg=name)
    assert json.loads((other / "config.json").read_text()) == clip_config()


def test_the_activation_is_that_of_the_rewards_model(tmp_path, out):
    """Nothing in a file tells it: ViT-L/14 is OpenAI's, which has another than LAION's ViT-H/14."""
    clip = write_clip(tmp_path / "clip", clip_config(features=768, activation="quick_gelu"))
    save_file(open_clip_state(load_file(clip / "model.safetensors")), tmp_path / "l.safetensors")
    convert("clip-l", out, tmp_path / "l.safetensors", clip)
    config = json.loads((out / "config.json").read_text())
    assert config == clip_config(features=768, activation="quick_gelu")


def test_shards_and_what_old_files_hold_besides(clip, out):
    stored = tensors.open_file(clip / "model.safetensors")
    ids = np.arange(77)[None]
    stored["text_model.embeddings.position_ids"] = tensors.Tensor(ids.shape, ids.dtype, lambda: ids)
    whole = {name: tensor.read() for name, tensor in stored.items() if not name.endswith("ids")}
    (clip / "model.safetensors").unlink()
    tensors.write_tensors(clip / "model.safetensors", stored, max_shard_bytes=200_000)
    assert len(list(clip.glob("model-*.safetensors"))) > 2
    convert("clip-h", out, clip)
    written = load_file(out / "model.safetensors")
    assert written.keys() == whole.keys()
    assert all(np.array_equal(written[name], whole[name]) for name in whole)
    assert len(json.loads((out / "reward.json").read_text())["sha256"]) == 64


def test_the_tokenizer_of_another_folder(clip, out, tmp_path):
    (clip / "merges.txt").unlink()
    write_tokenizer(tmp_path / "tokenizer")
    convert("pickscore", out, clip, tmp_path / "tokenizer")
    assert (out / "merges.txt").read_text() == "#version: 0.2\n"


def test_what_is_fetched_of_the_hub(clip, state, out, tmp_path, monkeypatch):
    """Both kinds of repository, and the tokenizer for a file that comes without one."""
    save_file(state, tmp_path / "HPS.safetensors")
    fetched = []

    def snapshot_download(name, revision, allow_patterns):
        fetched.append((f"{name}@{revision}" if revision else name, sorted(allow_patterns)))
        return str(clip)

    def hf_hub_download(name, file, revision):
        assert revision is None
        fetched.append((name, file))
        return str(tmp_path / "HPS.safetensors")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    laion, tokenizer = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", sorted(tokenizers.FILES)

    convert("hpsv2.1", out)
    assert fetched == [("xswu/HPSv2", "HPS_v2.1_compressed.pt"), (laion, tokenizer)]
    fetched.clear()
    convert("pickscore", out.with_name("pickscore"), tokenizer="somebody/clip@main")
    (name, patterns), of_the_tokenizer = fetched
    assert (name, of_the_tokenizer) == ("yuvalkirstain/PickScore_v1", ("somebody/clip@main", tokenizer))
    assert {"config.json", "model.safetensors", *tokenizer} <= set(patterns)
    assert not any(".bin" in pattern for pattern in patterns)
    fetched.clear()
    convert("clip-h", out.with_name("clip-h"))
    assert [name for name, _ in fetched] == [laion]
    assert json.loads((out.with_name("clip-h") / "reward.json").read_text())["source"] == laion


@pytest.mark.ci
def test_the_command(clip, out):
    options = ["--reward=pickscore", f"--weights={clip}", f"--out={out}"]
    command = [sys.executable, "-m", "dspo_jax.rewards.convert", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{out}: the reward pickscore of clip\n"
    with pytest.raises(ValueError, match=f"--out={out}: exists already"):
        convert("pickscore", out, clip)


@each_row(
    ("reward", "options", "message"),
    [
        ("pikscore", {}, "--reward = 'pikscore': unknown; did you mean 'pickscore'"),
        ("pickscore", {"weights": "none"}, "none: no such file or folder"),
        ("pickscore", {"head": "h.pth"}, "--head=h.pth: not an option of pickscore"),
        ("aesthetic", {}, "--head is missing: name the file sac"),
        (
            "aesthetic",
            {"head": "h.pth", "tokenizer": "c"},
            "--tokenizer=c: not an option of aesthetic, which reads no prompt",
        ),
        # Tests have no network.
        ("pickscore", {}, "yuvalkirstain/PickScore_v1: no such folder, and the model hub did not give it"),
        ("hpsv2.1", {}, "xswu/HPSv2: no such folder, and the model hub did not give it"),
        ("clip-l", {}, "openai/clip-vit-large-patch14: no such folder, and the model hub"),
    ],
)
def test_options_and_sources_that_are_not_there(reward, options, message, out):
    refused((ValueError, OSError), re.escape(message), out, reward, **options)


def spoil(change):
    def spoiled(clip):
        config = clip_config()
        change(config)
        write_json(clip / "config.json", config)

    return spoiled


def drop_tensor(clip):
    stored = load_file(clip / "model.safetensors")
    del stored["visual_projection.weight"]
    save_file(stored, clip / "model.safetensors")


def infinite_tensor(clip):
    stored = load_file(clip / "model.safetensors")
    stored["logit_scale"] = np.full((), np.inf, np.float32)
    save_file(stored, clip / "model.safetensors")


@each_row(
    ("change", "message"),
    [
        (
            lambda clip: (clip / "config.json").unlink(),
            "clip: no config.json; give a transformers folder of a CLIP",
        ),
        (lambda clip: write_json(clip / "model_index.json", {}), "clip: is a text-to-image model"),
        (
            lambda clip: (clip / "vocab.json").unlink(),
            "model hub did not give it .*; name a folder that holds",
        ),
        (
            lambda clip: (clip / "merges.txt").write_text("a b c\n"),
            "clip: vocab.json and merges.txt are no CLIP",
        ),
        (spoil(lambda c: c.update(architectures=["CLIPTextModel"])), "config.json: CLIPTextModel config: "),
        (
            spoil(lambda c: c["text_config"].update(eos_token_id=5)),
            "clip: a tokenizer of 514 tokens with the end token 513",
        ),
        (spoil(lambda c: c["text_config"].update(vocab_size=99)), "token_embedding.weight has shape"),
        (spoil(lambda c: c["vision_config"].update(num_hidden_layers=3)), "layers.2.* is missing"),
        (
            spoil(lambda c: c["vision_config"].update(num_hidden_layers=1)),
            "32|16 tensor.s. that config.json does",
        ),
        (drop_tensor, "model.safetensors: tensor visual_projection.weight is missing"),
        (infinite_tensor, "clip: tensor logit_scale is not finite"),
        (
            lambda clip: write_clip(clip, clip_config(features=768)),
            "embeds into 768 features, .* pickscore into 1024",
        ),
    ],
)
def test_folders_of_something_else(change, message, clip, out):
    change(clip)
    refused((ValueError, OSError), message, out, "pickscore", clip)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual.conv1.weight"), "holds ln_final.bias and not a CLIP with open_clip's names"),
        (
            lambda s: s.pop("ln_final.bias"),
            "what transformers calls text_model.final_layer_norm.bias is missing",
        ),
        (lambda s: s.pop("text_projection"), "what transformers calls text_projection.weight is missing"),
        (lambda s: s.update(logit_bias=np.zeros(1)), "tensor logit_bias is not part of an open_clip ViT"),
        (
            lambda s: s.update({"transformer.resblocks.0.ls_1.gamma": np.zeros(64)}),
            "tensor transformer.resblocks.0.ls_1.gamma is not part of an open_clip ViT",
        ),
        (lambda s: s.update({"ln_final.bias": np.zeros(63)}), "tensor ln_final.bias has shape"),
        (
            lambda s: s.update({"visual.transformer.resblocks.1.attn.in_proj_bias": np.zeros(9)}),
            "tensor visual.transformer.resblocks.1.attn.in_proj_bias has shape .9,., which does not fit",
        ),
    ],
)
def test_files_of_something_else(change, message, clip, state, out, tmp_path):
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    refused(
        ValueError, f"weights.safetensors: {message}", out, "hpsv2.0", tmp_path / "weights.safetensors", clip
    )


def test_a_file_of_a_folder_and_a_head_of_another_size(clip, out, tmp_path):
    hint = "not a CLIP with open_clip's names; give the folder it lies in"
    refused(ValueError, hint, out, "pickscore", clip / "model.safetensors", clip)
    folder = write_clip(tmp_path / "large", clip_config(features=768, activation="quick_gelu"))
    save_file({"layers.0.weight": np.zeros((1024, 512), np.float32)}, tmp_path / "head.safetensors")
    message = r"head\.safetensors: tensor layers\.0\.weight is \(1024, 512\), the aesthetic head asks for \(1"
    refused(ValueError, message, out, "aesthetic", folder, head=tmp_path / "head.safetensors")
