"""LoRA files of others: what each form adds to a model's weights, against float64 NumPy and diffusers."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny_model as tiny_models
from diffusers_picture import draw_in_diffusers
from model_folders import contents, make_run, refused
from safetensors.numpy import load_file, save_file
from tables import each_row

from dspo_jax.conversion.export_model import export
from dspo_jax.conversion.import_model import import_model
from dspo_jax.pipelines.loading import Adapted, load_pipeline
from dspo_jax.pipelines.same_kind import have_same_weights, weights_digest
from dspo_jax.sampling.decoding import Decoder
from dspo_jax.sampling.image_sampler import ImageRequest, ImageSampler, initial_noise
from dspo_jax.sampling.rendering import Drawing
from dspo_jax.weights.components import open_component
from dspo_jax.weights.layout import leaf_tensors, to_torch
from dspo_jax.weights.lora_files import open_lora, parse_lora

BLOCK = {"sd15": "down_blocks.0.attentions.0", "sdxl": "down_blocks.1.attentions.0"}
ORIGINAL = {"sd15": "input_blocks.1.1", "sdxl": "input_blocks.3.1"}  # the same blocks in the original layout
TEXT = "text_model.encoder.layers.0"


def list_layers(family):
    """(component, layer) -> (rank, alpha): attention, feed-forward, convolutions and the text encoders."""
    block = f"{BLOCK[family]}.transformer_blocks.0"
    layers = {
        ("unet", f"{block}.attn1.to_q"): (2, 1.0),
        ("unet", f"{block}.attn2.to_out.0"): (3, 3.0),
        ("unet", f"{block}.ff.net.0.proj"): (4, 0.5),
        ("unet", f"{BLOCK[family]}.proj_in"): (2, 4.0),  # a 1 x 1 convolution in Stable Diffusion 1
        ("unet", "mid_block.resnets.0.conv1"): (3, 1.0),
        ("unet", "down_blocks.0.downsamplers.0.conv"): (2, 2.0),
        ("text_encoder", f"{TEXT}.self_attn.q_proj"): (2, 1.0),
        ("text_encoder", f"{TEXT}.mlp.fc1"): (3, 6.0),
    }
    return layers | ({("text_encoder_2", f"{TEXT}.mlp.fc2"): (2, 1.0)} if family == "sdxl" else {})


def draw(pipe, layers):
    """(component, layer) -> (down, up), float32 arrays with torch's axes, beside alpha."""
    random, drawn = np.random.default_rng(3), {}
    for (component, layer), (rank, alpha) in layers.items():
        stored = open_component(pipe.path / component, pipe.networks[component])
        outputs, inputs, *window = stored[f"{layer}.weight"].shape
        down = random.standard_normal((rank, inputs, *window)).astype(np.float32)
        up = random.standard_normal((outputs, rank, *(1 for _ in window))).astype(np.float32)
        drawn[component, layer] = (down / 4, up / 4, alpha)
    return drawn


def add(weight, down, up, alpha, strength):
    """The weight with the product added, in float64."""
    rank = len(down)
    product = np.float64(up).reshape(len(up), rank) @ np.float64(down).reshape(rank, -1)
    return np.float64(weight) + strength * alpha / rank * product.reshape(weight.shape)


def save_kohya(file, drawn, sdxl=False):
    roots = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if sdxl else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    values = {}
    for (component, layer), (down, up, alpha) in drawn.items():
        name = f"{roots[component]}_{layer.replace('.', '_')}"
        values |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        values[f"{name}.alpha"] = np.array(alpha, np.float16)
    save_file(values, file)
    return file


def save_diffusers(file, drawn):
    """With PEFT's configs in the header, as diffusers writes them: they alone have the alphas."""
    values, configs = {}, {}
    for (component, layer), (down, up, alpha) in drawn.items():
        values |= {f"{component}.{layer}.lora_A.weight": down, f"{component}.{layer}.lora_B.weight": up}
        of_component = {
            "r": 2,
            "lora_alpha": 1.0,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_modules": [],
        }
        for key, value in of_component.items():
            configs.setdefault(f"{component}.{key}", value)
        end = layer.removeprefix("text_model.")  # which transformers 5 leaves out
        configs[f"{component}.rank_pattern"][end] = len(down)
        configs[f"{component}.alpha_pattern"][end] = alpha
        configs[f"{component}.target_modules"].append(end)
    save_file(values, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(configs)})
    return file


@pytest.fixture(scope="module")
def pipes(tiny_model, tmp_path_factory):
    """A pipeline of each family, opened once: to open a network describes it, which takes a while."""
    sdxl = tiny_models.write_model(tmp_path_factory.mktemp("model") / "xl", family="sdxl")
    return {"sd15": load_pipeline(tiny_model), "sdxl": load_pipeline(sdxl)}


@pytest.fixture(scope="module")
def tiny(pipes):
    return pipes["sd15"]


def networks(pipe):
    return {name: pipe.networks[name] for name in pipe.components}


def adapt(pipe, *texts):
    return dataclasses.replace(pipe, loras=tuple(open_lora(str(text), networks(pipe)) for text in texts))


def read_all(pipe):
    """(component, tensor) -> array of all components that may be adapted, as torch has them."""
    return {
        (component, name): tensor.read()
        for component in pipe.components
        for name, tensor in to_torch(leaf_tensors(pipe.read_params(component))).items()
    }


def assert_folded(pipe, before, drawn, strength=1.0):
    after, before = read_all(pipe), read_all(before)
    assert after.keys() == before.keys()
    for (component, name), value in after.items():
        found = drawn.get((component, name.removesuffix(".weight")))
        if found is None:
            np.testing.assert_array_equal(value, before[component, name])
        else:
            expected = add(before[component, name], *found, strength)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@each_row("family", ["sd15", "sdxl"])
@each_row("save", [save_kohya, save_diffusers], ids=["kohya", "diffusers"])
def test_a_file_is_added_to_unet_and_text_encoders(family, save, pipes, tmp_path):
    pipe = pipes[family]
    drawn = draw(pipe, list_layers(family))
    more = {"sdxl": family == "sdxl"} if save is save_kohya else {}
    file = save(tmp_path / "lora.safetensors", drawn, **more)
    adapted = adapt(pipe, f"{file}:0.8")
    assert_folded(adapted, pipe, drawn, 0.8)
    assert weights_digest(adapted) != weights_digest(pipe)


def rename(values, *changes):
    for pattern, new in changes:
        values = {re.sub(pattern, new, name): value for name, value in values.items()}
    return values


@each_row(
    ("form", "changes"),
    [
        ("PEFT's", [(r"^unet\.", "base_model.model.")]),
        ("PEFT's, of an adapter", [(r"^unet\.", "unet.base_model.model."), ("lora_(.)", r"lora_\1.default")]),
        ("without a component", [(r"^unet\.", "")]),
        ("diffusers' before PEFT", [("lora_A", "lora.down"), ("lora_B", "lora.up")]),
        (
            "diffusers' first",
            [
                (r"(to_.)\.lora_A", r"processor.\1_lora.down"),
                (r"(to_.)\.lora_B", r"processor.\1_lora.up"),
                (r"to_out\.0\.lora_A", "processor.to_out_lora.down"),
                (r"to_out\.0\.lora_B", "processor.to_out_lora.up"),
            ],
        ),
    ],
)
def test_names_of_the_unet(form, changes, tiny, tmp_path):
    layers = {key: (rank, rank) for key, (rank, _) in list_layers("sd15").items() if key[0] == "unet"}
    drawn = draw(tiny, layers)  # alpha is the rank where none is named
    file = save_diffusers(tmp_path / "lora.safetensors", drawn)
    values = rename(load_file(file), *changes)
    assert values.keys() != load_file(file).keys(), form
    save_file(values, file)
    assert_folded(adapt(tiny, file), tiny, drawn)


@each_row(
    "changes",
    [
        [(r"lora_(.)\.", r"lora_linear_layer.\1."), (r"layer\.A", "layer.down"), (r"layer\.B", "layer.up")],
        [(r"text_model\.", "")],  # transformers 5
        [(r"^text_encoder\.", "base_model.model.")],
        [(r"q_proj\.lora_A", "to_q_lora.down"), (r"q_proj\.lora_B", "to_q_lora.up")],
    ],
)
def test_names_of_a_text_encoder(changes, tiny, tmp_path):
    layers = {("text_encoder", f"{TEXT}.self_attn.q_proj"): (2, 2)}
    drawn = draw(tiny, layers)
    file = save_diffusers(tmp_path / "lora.safetensors", drawn)
    values = rename(load_file(file), *changes)
    assert values.keys() != load_file(file).keys()
    save_file(values, file)
    assert_folded(adapt(tiny, file), tiny, drawn)


@each_row("family", ["sd15", "sdxl"])
def test_kohyas_names_in_the_original_layout(family, pipes, tmp_path):
    layer = f"{BLOCK[family]}.transformer_blocks.0.attn1.to_q"
    drawn = draw(pipes[family], {("unet", layer): (2, 1), ("unet", "conv_in"): (2, 1)})
    file = save_kohya(tmp_path / "lora.safetensors", drawn)
    ours, theirs = (each.replace(".", "_") for each in (BLOCK[family], ORIGINAL[family]))
    changes = ((ours, theirs), ("lora_unet_conv_in", "lora_unet_input_blocks_0_0"))
    save_file(rename(load_file(file), *changes), file)
    assert_folded(adapt(pipes[family], file), pipes[family], drawn)


def test_locon_with_a_convolution_in_the_middle(tiny, tmp_path):
    """The composition is taken from torch, which runs the three convolutions one after another."""
    torch = pytest.importorskip("torch")
    layer = "mid_block.resnets.0.conv1"
    before = open_component(tiny.path / "unet", tiny.networks["unet"])[f"{layer}.weight"].read()
    random = np.random.default_rng(0)
    outputs, inputs = before.shape[:2]
    shapes = {"lora_down": (3, inputs, 1, 1), "lora_mid": (3, 3, 3, 3), "lora_up": (outputs, 3, 1, 1)}
    halves = {part: random.standard_normal(shape).astype(np.float32) for part, shape in shapes.items()}
    name = f"lora_unet_{layer.replace('.', '_')}"
    values = {f"{name}.{part}.weight": half for part, half in halves.items()}
    save_file(values | {f"{name}.alpha": np.float32([1.5])}, tmp_path / "lora.safetensors")
    adapted = adapt(tiny, tmp_path / "lora.safetensors")
    after = to_torch(leaf_tensors(adapted.read_params("unet")))[f"{layer}.weight"].read()
    pixels = torch.tensor(random.standard_normal((1, inputs, 5, 5)))
    x = pixels
    for part in shapes:
        x = torch.nn.functional.conv2d(x, torch.tensor(np.float64(halves[part])))
    added = torch.nn.functional.conv2d(pixels, torch.tensor(np.float64(after) - before))
    np.testing.assert_allclose(added.numpy(), 0.5 * x.numpy(), rtol=1e-4, atol=1e-4)


@each_row(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"r": 4, "lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {r"attn1\.to_q": 12}}, 3.0),
    ],
)
def test_pefts_config_beside_its_file_has_the_alpha(config, scale, tiny, tmp_path):
    layer = f"{BLOCK['sd15']}.transformer_blocks.0.attn1.to_q"
    drawn = draw(tiny, {("unet", layer): (4, 4 * scale)})
    (down, up, _), file = drawn["unet", layer], tmp_path / "adapter_model.safetensors"
    name = f"base_model.model.{layer}"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_folded(adapt(tiny, file), tiny, drawn)


def test_files_add_up_and_over_a_run_too(tiny, tmp_path):
    layers = {key: each for key, each in list_layers("sd15").items() if "to_q" in key[1] or "fc1" in key[1]}
    drawn = draw(tiny, layers)
    file = save_kohya(tmp_path / "lora.safetensors", drawn)
    assert_folded(adapt(tiny, f"{file}:0.75", f"{file}:-0.25"), tiny, drawn, 0.5)
    run = make_run(tmp_path / "run", tiny.path, steps=(1,), change=0.25)
    assert_folded(load_pipeline(Adapted(run, (str(file),))), load_pipeline(run), drawn)


def test_a_component_with_a_lora_is_not_that_of_the_model_without(tiny, tmp_path):
    """Or `sample --negative_model` would run another text encoder than its own."""
    drawn = draw(tiny, {("text_encoder", f"{TEXT}.mlp.fc1"): (2, 1.0)})
    adapted = adapt(tiny, save_kohya(tmp_path / "lora.safetensors", drawn))
    assert have_same_weights(tiny, tiny, "text_encoder")
    assert have_same_weights(adapted, tiny, "unet")
    assert not have_same_weights(adapted, tiny, "text_encoder")
    assert not have_same_weights(tiny, adapted, "text_encoder")


def test_an_import_writes_the_sum_in_the_dtype_of_the_base(published, out, tmp_path):
    pipe = load_pipeline(published)
    drawn = draw(pipe, {key: each for key, each in list_layers("sd15").items() if key[0] == "unet"})
    file = save_kohya(tmp_path / "lora.safetensors", drawn)
    before, stored = read_all(pipe), contents(published)
    import_model(published, out, loras=[f"{file}:0.8"])
    for (component, name), value in read_all(load_pipeline(out)).items():
        found = drawn.get((component, name.removesuffix(".weight")))
        expected = before[component, name]
        if found:
            expected = add(expected, *found, 0.8).astype(np.float16)
            assert value.dtype == np.float16
        np.testing.assert_allclose(np.float32(value), np.float32(expected), rtol=1e-3, atol=1e-6)
    after = contents(out)
    assert "`lora.safetensors` with weight 0.8" in after.pop("README.md").decode()
    others = {name for name in stored if not name.startswith("unet:")}
    assert {name: after[name] for name in others} == {name: stored[name] for name in others}


@pytest.mark.ci
def test_an_import_of_a_single_file_adds_it_to_that_and_to_what_the_base_gives(tiny, out, tmp_path):
    single = tmp_path / "single.safetensors"
    export(make_run(tmp_path / "run", tiny.path, steps=(1,), change=0.25), single)
    save_file({name: value for name, value in load_file(single).items() if "cond_stage" not in name}, single)
    drawn = draw(tiny, list_layers("sd15"))
    file = save_kohya(tmp_path / "lora.safetensors", drawn)
    plain = tmp_path / "plain"
    import_model(single, plain, base=tiny.path)
    import_model(single, out, base=tiny.path, loras=[f"{file}:0.8"])
    before = read_all(load_pipeline(plain))
    np.testing.assert_allclose(
        before["unet", "conv_in.bias"] - read_all(tiny)["unet", "conv_in.bias"], 0.25, atol=1e-6
    )
    assert_folded(load_pipeline(out), load_pipeline(plain), drawn, 0.8)
    assert "`lora.safetensors` with weight 0.8" in (out / "README.md").read_text()


def find_fault(tiny, tmp_path, values, **changes):
    file = tmp_path / "lora.safetensors"
    save_file(values, file, **changes)

    def read():
        lora = open_lora(str(file), networks(tiny))
        return [module.product() for modules in lora.modules.values() for module in modules.values()]

    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        read()
    return str(caught.value).removeprefix(f"{file}: ")


LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN, UP = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)
GOOD = {f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP}


@each_row(
    ("more", "message"),
    [
        (
            {"lora_unet_x.dora_scale": UP},
            r"holds DoRA under LyCORIS' names \(tensor lora_unet_x.dora_scale\), but LoRA, LoCon and PEFT's ",
        ),
        (
            {f"{LAYER}.lora_magnitude_vector": UP},
            r"tensor .*: of magnitudes \(8, 2\), where the model asks for \(8,\)",
        ),
        ({"lora_unet_x.lokr_w1": UP}, "holds LoKr "),
        ({"lora_unet_x.hada_w1_a": UP}, "holds LoHa "),
        ({"lora_unet_x.oft_blocks": UP}, "holds OFT "),
        ({f"{LAYER}.oft_R.weight": UP}, "holds OFT "),
        ({"lora_unet_x.a1.weight": UP}, "holds GLoRA "),
        ({"lora_unet_x.on_input": UP}, "holds IA3 "),
        ({"lora_unet_x.w_norm": UP}, "holds trained norms "),
        ({"lora_unet_x.diff_b": UP}, "holds trained biases or whole weights "),
        ({f"{LAYER}.lora_B.bias": UP}, "holds trained biases "),
        ({"bundle_emb.x": UP}, "tensor bundle_emb.x: not of a LoRA as it is known here"),
        ({"lora_te2_text_model.lora_up.weight": UP}, "tensor lora_te2_.*: the model has no such layer"),
        ({f"{LAYER}.lora_up.weight": UP}, f"tensor {LAYER}.*: of a layer that is adapted under another name"),
        ({f"{LAYER}.lora_A.weight": UP}, r"tensor .*: of a half \(8, 2\), where the model asks for \(8, 8\)"),
        (
            {f"{LAYER}.lora_B.weight": DOWN},
            r"tensor .*: of a half \(2, 8\), .* \(8, 2\); is the LoRA of another",
        ),
        ({f"{LAYER}.alpha": DOWN}, r"tensor .*: alpha = .*: must be a finite number"),
        ({f"{LAYER}.alpha": np.float32([np.nan])}, r"tensor .*: alpha = .*: must be a finite number"),
        ({f"{LAYER}.lora_B.weight": UP * np.inf}, "tensor .*: its layer has numbers that are not finite"),
    ],
)
def test_what_is_not_a_lora_of_the_model_is_refused_by_name(more, message, tiny, tmp_path):
    assert re.match(message, find_fault(tiny, tmp_path, GOOD | more))


def test_half_a_file_is_refused(tiny, tmp_path):
    for part, other in (("A", "up"), ("B", "down")):
        values = {name: value for name, value in GOOD.items() if f"lora_{part}" in name}
        assert f"without its lora_{other}; fetch" in find_fault(tiny, tmp_path, values)
    metadata = {"lora_adapter_metadata": "{"}
    assert "in its header is not JSON" in find_fault(tiny, tmp_path, GOOD, metadata=metadata)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {"to_(": 1}})}
    assert "alpha_pattern 'to_('" in find_fault(tiny, tmp_path, GOOD, metadata=metadata)


def test_the_weight_is_what_follows_the_last_colon(tmp_path):
    assert parse_lora("a:b/c.safetensors") == parse_lora("a:b/c.safetensors:1")
    assert parse_lora("c.safetensors:-0.5")[1] == -0.5
    for text, message in (
        ("c.safetensors:x", "'x' is no weight; write FILE.safetensors:0.8"),
        ("c.safetensors:nan", "must be a finite number"),
        ("c.bin", "a pickle, which is not read"),
        (str(tmp_path), "a folder; name the .safetensors file in it"),
    ):
        with refused(f"--lora={re.escape(text)}: .*{re.escape(message)}"):
            parse_lora(text)


def draw_ours(pipe):
    requests = [ImageRequest("a red heart", 0, 7)]
    sampler = ImageSampler(pipe, Drawing(steps=3, guidance_scale=7.5))
    return Decoder(pipe)(sampler.sample_latents(requests, initial_noise(requests, (4, 4, 4))))[0]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("family", "save"),
    [("sd15", save_kohya), ("sdxl", save_diffusers)],
    ids=["kohya", "diffusers"],
)
def test_diffusers_fuses_to_the_same_weights_and_draws_the_same(family, save, pipes, tmp_path):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    pipe = pipes[family]
    # Of kohya's files diffusers loses the alphas of to_out and, where they differ, of the text encoders.
    layers = {
        key: each for key, each in list_layers(family).items() if key[0] == "unet" and "to_out" not in key[1]
    }
    attention = [f"{TEXT}.self_attn.{name}_proj" for name in ("q", "out")]
    layers |= {(component, layer): (2, 1.0) for component in pipe.text_encoders for layer in attention}
    drawn = draw(pipe, layers)
    file = save(tmp_path / "lora.safetensors", drawn)
    theirs = diffusers.DiffusionPipeline.from_pretrained(pipe.path, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="lora")
    theirs.set_adapters("lora", 0.8)
    attached = draw_in_diffusers(theirs)
    ours = draw_ours(adapt(pipe, f"{file}:0.8")) / 255.0
    assert np.abs(ours - attached).mean() <= 1 / 255
    assert np.abs(ours - draw_ours(pipe) / 255.0).mean() > 3 / 255  # the LoRA shows
    theirs.fuse_lora(components=[*theirs.components.keys() & {"unet", "text_encoder", "text_encoder_2"}])
    theirs.unload_lora_weights()
    after = read_all(adapt(pipe, f"{file}:0.8"))
    for (component, name), value in after.items():
        fused = getattr(theirs, component).state_dict()
        found = fused[name] if name in fused else fused[name.removeprefix("text_model.")]
        np.testing.assert_allclose(value, found.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
