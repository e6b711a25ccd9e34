"""LoRA files of Stable Diffusion 3 under kohya's names and diffusers': read, written, loaded by diffusers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import make_run
from safetensors.numpy import load_file, save_file
from tables import each_row

from dspo_jax.conversion.export_model import export
from dspo_jax.models import lora
from dspo_jax.pipelines.conditioning_inputs import prompt_batch
from dspo_jax.pipelines.loading import Adapted, load_pipeline
from dspo_jax.weights.components import open_component
from dspo_jax.weights.layout import flatten
from dspo_jax.weights.lora_files import fold, open_lora
from dspo_jax.weights.lora_names import name_layers

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tiny_sd3 import write_sd3  # noqa: E402
from torch_modules import compile_fast  # noqa: E402

BLOCK = "transformer_blocks"
T5_LAYER = "encoder.block.0.layer"
# Under kohya's name: the layers whose rows it has, one below another. Block 0 of two has a second attention.
FUSED = {
    "lora_unet_joint_blocks_0_x_block_attn_qkv": [f"{BLOCK}.0.attn.to_{part}" for part in "qkv"],
    "lora_unet_joint_blocks_1_context_block_attn_qkv": [f"{BLOCK}.1.attn.add_{part}_proj" for part in "qkv"],
    "lora_unet_joint_blocks_0_x_block_attn2_qkv": [f"{BLOCK}.0.attn2.to_{part}" for part in "qkv"],
}
ALONE = {
    "lora_unet_joint_blocks_1_x_block_attn_proj": ("transformer", f"{BLOCK}.1.attn.to_out.0"),
    "lora_unet_joint_blocks_0_context_block_attn_proj": ("transformer", f"{BLOCK}.0.attn.to_add_out"),
    "lora_unet_joint_blocks_0_x_block_attn2_proj": ("transformer", f"{BLOCK}.0.attn2.to_out.0"),
    "lora_unet_joint_blocks_0_x_block_mlp_fc1": ("transformer", f"{BLOCK}.0.ff.net.0.proj"),
    "lora_unet_joint_blocks_0_context_block_mlp_fc2": ("transformer", f"{BLOCK}.0.ff_context.net.2"),
    "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1": ("transformer", f"{BLOCK}.0.norm1.linear"),
    "lora_unet_joint_blocks_0_context_block_adaLN_modulation_1": (
        "transformer",
        f"{BLOCK}.0.norm1_context.linear",
    ),
    "lora_unet_context_embedder": ("transformer", "context_embedder"),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
        "text_encoder",
        "text_model.encoder.layers.0.self_attn.q_proj",
    ),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"),
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": ("text_encoder_3", f"{T5_LAYER}.0.SelfAttention.q"),
    "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0": (
        "text_encoder_3",
        f"{T5_LAYER}.1.DenseReluDense.wi_0",
    ),
}
# Of these the file has the shift first, and diffusers the scale.
SWAPPED = {
    "lora_unet_joint_blocks_1_context_block_adaLN_modulation_1": f"{BLOCK}.1.norm1_context.linear",
    "lora_unet_final_layer_adaLN_modulation_1": "norm_out.linear",
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load_pipeline(write_sd3(tmp_path_factory.mktemp("sd3") / "model"))


def read(pipe, component):
    return open_component(pipe.path / component, pipe.networks[component])


def open_for(pipe, text):
    return open_lora(str(text), {name: pipe.networks[name] for name in pipe.components})


def draw_file(pipe):
    """Kohya's tensors, and (component, layer) -> float64 matrix that is added; alphas differ."""
    random, values, added = np.random.default_rng(0), {}, {}
    whole = {key: [("transformer", layer) for layer in layers] for key, layers in FUSED.items()}
    whole |= {key: [place] for key, place in ALONE.items()}
    whole |= {key: [("transformer", layer)] for key, layer in SWAPPED.items()}
    for number, (key, places) in enumerate(whole.items()):
        rank, alpha = 2 + number % 3, 0.5 + number
        shapes = [read(pipe, component)[f"{layer}.weight"].shape for component, layer in places]
        down = random.standard_normal((rank, shapes[0][1])).astype(np.float32)
        up = random.standard_normal((sum(shape[0] for shape in shapes), rank)).astype(np.float32)
        values |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        values[f"{key}.alpha"] = np.array(alpha, np.float32)
        product = alpha / rank * (np.float64(up) @ np.float64(down))
        if key in SWAPPED:
            half = len(product) // 2
            product = np.concatenate([product[half:], product[:half]])
        for place, part in zip(places, np.split(product, len(places)), strict=True):
            added[place] = part
    return values, added


def test_kohyas_names_add_what_numpy_adds(pipe, tmp_path):
    values, added = draw_file(pipe)
    file = tmp_path / "lora.safetensors"
    save_file(values, file)
    opened = open_for(pipe, f"{file}:0.5")
    assert {(component, name) for component, modules in opened.modules.items() for name in modules} == {
        (component, f"{layer}.weight") for component, layer in added
    }
    for component in pipe.components:
        stored = read(pipe, component)
        for name, tensor in fold(stored, opened, component).items():
            expected = np.float64(stored[name].read())
            product = added.get((component, name.removesuffix(".weight")))
            if product is not None:
                assert np.abs(product).max() > 0.1
                expected = expected + 0.5 * product
            np.testing.assert_allclose(tensor.read(), expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_no_name_stands_for_two_layers_but_thirds_of_one(pipe):
    for name, targets in name_layers({name: pipe.networks[name] for name in pipe.components}).items():
        parts = [target.place.part for target in targets if target.place.kind == "third"]
        assert sorted(parts) == [0, 1, 2] or len(targets) == 1, name


@each_row(
    ("theirs", "ours"),
    [
        ("transformer.{}", "{}"),
        ("base_model.model.{}", "{}"),
        ("{}", "{}"),
        ("lora_transformer_{}", "_"),
        ("lycoris_{}", "_"),
        ("lora_unet_{}", "_"),
    ],
)
def test_other_names_that_comfyui_reads(theirs, ours, pipe, tmp_path):
    """Under diffusers' names of layers the halves stay where they are."""
    file = tmp_path / "lora.safetensors"
    for layer in ("norm_out.linear", f"{BLOCK}.0.attn.to_k"):
        name = theirs.format(layer if ours == "{}" else layer.replace(".", "_"))
        down, up = np.ones((1, 16), np.float32), np.arange(32, dtype=np.float32)[:, None]
        up = up if "norm" in layer else up[:16]
        save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)
        ((found, module),) = open_for(pipe, file).modules["transformer"].items()
        assert found == f"{layer}.weight"
        np.testing.assert_array_equal(module.product(), up @ down)


@each_row(
    ("name", "rows", "message"),
    [
        (
            "lora_unet_joint_blocks_0_x_block_attn_qkv",
            46,
            r"of a half \(46, 2\), where the model asks for \(16",
        ),
        (
            "lora_unet_joint_blocks_0_x_block_attn_qkv",
            24,
            r"of a half \(8, 2\), where the model asks for \(16",
        ),
        ("lora_unet_joint_blocks_2_x_block_attn_qkv", 48, "the model has no such layer; is the LoRA for a"),
        ("lora_unet_joint_blocks_1_x_block_attn2_qkv", 48, "the model has no such layer; is the LoRA for a"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 48, "the model has no such layer; is the LoRA for a"),
    ],
)
def test_names_and_shapes_of_another_model_are_refused(name, rows, message, pipe, tmp_path):
    file = tmp_path / "lora.safetensors"
    matrices = {"lora_down": np.ones((2, 16), np.float32), "lora_up": np.ones((rows, 2), np.float32)}
    save_file({f"{name}.{part}.weight": value for part, value in matrices.items()}, file)
    with pytest.raises(ValueError, match=rf"^[^\n]*tensor {name}\.lora_\w+\.weight: {message}[^\n]*$"):
        open_for(pipe, file)


@pytest.fixture(scope="module")
def run(pipe, tmp_path_factory):
    """A run's adapters, B drawn too; alpha is not the rank, and queries have another one than keys."""
    trees = {}
    for component in pipe.components:
        params = pipe.read_params(component)
        targets = ((r"to_q", 3), (r"to_[kv]|to_(add_)?out.*|add_[kv]_proj|net\.0\.proj|norm_out\.linear", 2))
        if component == "transformer":
            targets += ((rf"{BLOCK}\.\d\.norm1_context\.linear", 2),)
        else:
            targets = ((r"SelfAttention\.[qo]|q_proj|fc1", 2),)
        for pattern, rank in targets:
            drawn = lora.init_adapters(params, (pattern,), rank, jax.random.key(rank))
            trees[component] = lora.combine(trees.get(component, {}), drawn)
    random = np.random.default_rng(0)
    trees = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32) / 2, trees)
    workdir = tmp_path_factory.mktemp("run") / "run"
    return make_run(workdir, pipe.path, params=trees, lora={"rank": 2, "alpha": 3.0})


@pytest.fixture(scope="module")
def predict(pipe):
    """Gives what a model of this architecture predicts, perhaps with files, and its conditioning."""
    batch = prompt_batch(pipe, pipe.tokenize(["a red fox"]), (16, 16))
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4), np.float32)

    @compile_fast
    def run(params):
        conditioning = pipe.encode_conditioning(params, batch)
        return pipe.predict(params, latents, jnp.float32([700.0]), conditioning), conditioning

    return lambda loaded: run({name: loaded.read_params(name) for name in pipe.components})


@each_row("style", ["kohya", "diffusers"])
def test_what_is_exported_is_read_as_the_same_model(style, run, pipe, predict, tmp_path):
    file = tmp_path / "lora.safetensors"
    export(run, file, adapters=style)
    ours = load_pipeline(run)
    read_back = load_pipeline(Adapted(pipe.path, (str(file),)))
    for component in pipe.components:
        theirs = flatten(read_back.read_params(component))
        base = flatten(pipe.read_params(component))
        for path, leaf in flatten(ours.read_params(component)).items():
            np.testing.assert_allclose(theirs[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)
            adapted = any(end in path for end in ("to_q.kernel", "SelfAttention.q.kernel", "q_proj.kernel"))
            assert not (adapted and "add_" not in path and np.allclose(leaf, base[path])), path
    output, _ = predict(ours)
    np.testing.assert_allclose(predict(read_back)[0], output, rtol=1e-4, atol=1e-4)
    assert np.abs(output - predict(pipe)[0]).max() > 0.1


def test_kohyas_file_is_as_kohya_writes_it(run, tmp_path):
    """Three matrices below one another, blocks of a diagonal, one factor; the text has no query here."""
    file = tmp_path / "lora.safetensors"
    export(run, file, adapters="kohya")
    export(run, tmp_path / "peft.safetensors", adapters="diffusers")
    values, peft = load_file(file), load_file(tmp_path / "peft.safetensors")
    layer = f"transformer.{BLOCK}.0.attn"
    down, up = (
        {part: peft[f"{layer}.to_{part}.lora_{half}.weight"] for part in "qkv"} for half in ("A", "B")
    )
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    np.testing.assert_array_equal(values[f"{name}.lora_down.weight"], np.concatenate([*down.values()]))
    expected = np.zeros((48, 7), np.float32)
    expected[:16, :3] = up["q"]  # of factor 3 / 3, which is the file's
    expected[16:32, 3:5], expected[32:, 5:] = 1.5 * up["k"], 1.5 * up["v"]
    np.testing.assert_array_equal(values[f"{name}.lora_up.weight"], expected)
    assert values[f"{name}.alpha"] == 7
    text = "lora_unet_joint_blocks_0_context_block_attn_qkv"
    assert values[f"{text}.lora_down.weight"].shape == (4, 16)
    assert values[f"{text}.lora_up.weight"].shape == (48, 4)
    assert not values[f"{text}.lora_up.weight"][:16].any()
    assert values[f"{text}.alpha"] == 6
    swapped = values["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    np.testing.assert_array_equal(
        np.roll(swapped, 16, axis=0), peft["transformer.norm_out.linear.lora_B.weight"]
    )
    assert not any("lora_A" in key for key in values)
    card = file.with_suffix(".md").read_text()
    assert "convert import --model=" in card
    assert "load_lora_weights" not in card
    assert any(key.startswith("lora_te3_encoder_block_0_layer_0_SelfAttention_o.") for key in values)


def test_kohyas_names_need_the_models_config(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    lost = tmp_path / "run"
    lost.mkdir()
    (lost / "checkpoints").symlink_to(run / "checkpoints")
    (lost / "config.json").write_text(json.dumps(config | {"model": str(tmp_path / "gone")}))
    with pytest.raises(
        ValueError, match=r"^[^\n]*kohya's names follow from the config[^\n]*name it with --base"
    ):
        export(lost, tmp_path / "lora.safetensors", adapters="kohya")
    export(lost, tmp_path / "lora.safetensors", adapters="kohya", base=load_config_model(run))


def load_config_model(run):
    return json.loads((run / "config.json").read_text())["model"]


@pytest.mark.ci
def test_diffusers_loads_our_file_and_predicts_the_same(run, pipe, predict, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    export(run, tmp_path / "lora.safetensors", adapters="diffusers")
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(pipe.path, local_files_only=True)
    theirs.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    ours, conditioning = predict(load_pipeline(run))
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4), np.float32)
    with torch.no_grad():
        states, _, pooled, _ = theirs.encode_prompt(
            "a red fox", None, None, do_classifier_free_guidance=False
        )
        output = theirs.transformer(
            torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
            timestep=torch.tensor([700.0]),
            encoder_hidden_states=torch.from_numpy(np.array(conditioning.states)),
            pooled_projections=torch.from_numpy(np.array(conditioning.pooled)),
        ).sample
    np.testing.assert_allclose(ours, output.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    # Of T5's adapters diffusers reads none; those of both CLIPs are in the pooled state.
    np.testing.assert_allclose(conditioning.pooled, pooled.numpy(), rtol=1e-4, atol=1e-4)
    assert states.shape == conditioning.states.shape
