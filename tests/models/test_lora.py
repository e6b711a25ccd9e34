"""Adapters: what they compute, what is trained and saved, and what diffusers makes of the files."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from diffusers_picture import draw_in_diffusers
from safetensors.numpy import load_file
from tables import each_row
from tiny_run import make_config

from dspo_jax.conversion.export_model import ADAPTER_FORMATS, export
from dspo_jax.conversion.import_model import import_model
from dspo_jax.models import lora
from dspo_jax.models.model import build_model
from dspo_jax.monitoring.metrics import read_metrics
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.sampling.decoding import Decoder
from dspo_jax.sampling.image_sampler import ImageRequest, ImageSampler, initial_noise
from dspo_jax.sampling.rendering import Drawing
from dspo_jax.training.make_task import make_task
from dspo_jax.training.run import train
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_adapters, make_state
from dspo_jax.weights.layout import flatten, unflatten
from dspo_jax.weights.saved_params import SavedParams, restore_params

ATTENTION = (r"to_[qkv]", r"to_out\.0", r"(q|k|v|out)_proj")
# Linear layers, 3x3 convolutions with stride 1 and 2, a 1x1 one.
EVERYWHERE = (*ATTENTION, r"conv\d?", r"proj_in", r"linear_1", r"ff\.net\.2")


LORA = {
    **{"lora.rank": 2, "lora.alpha": 3.0, "lora.rank_stabilised": True},
    **{"lora.targets": (*ATTENTION, r"conv\d?"), "train_text_encoder": True},
}
FACTOR = 3 / np.sqrt(2)


def make_unet():
    model = build_model("UNet2DConditionModel", tiny_model.UNET)
    return model, tiny_model.random_params(model, np.random.default_rng(0))


def randomise(adapters, seed=1):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: draw.normal(0, 0.3, leaf.shape).astype(np.float32), adapters)


def fold(params, adapters, factor=1.0):
    """The products, times a factor, added in float64, kernel by kernel."""
    leaves, kernels = flatten(adapters), dict(flatten(params))
    for layer in lora.find_ranks(adapters):
        a, b = (np.float64(leaves[f"{layer}.lora_{matrix}.kernel"]) for matrix in "AB")
        added = np.einsum("hwir,xyro->hwio", a, b) if a.ndim == 4 else a @ b
        kernels[f"{layer}.kernel"] = (kernels[f"{layer}.kernel"] + factor * added).astype(np.float32)
    return unflatten(kernels)


def run_unet(model, params):
    draw = np.random.default_rng(2)
    latents = draw.standard_normal((2, 4, 4, 4)).astype(np.float32)
    text = draw.standard_normal((2, 77, tiny_model.UNET["cross_attention_dim"])).astype(np.float32)
    return np.asarray(jax.jit(model.apply)(params, latents, np.int32([5, 900]), text))


@pytest.mark.ci
@each_row("targets", [ATTENTION, EVERYWHERE], ids=["attention", "everywhere"])
def test_an_adapted_model_is_the_model_with_the_products_added(targets):
    model, params = make_unet()
    adapters = randomise(lora.init_adapters(params, targets, 2, jax.random.key(0)))
    base, adapted = run_unet(model, params), run_unet(model, lora.combine(params, adapters))
    folded = run_unet(model, fold(params, adapters))
    assert np.abs(adapted - base).max() > 0.1 * np.abs(base).max()
    np.testing.assert_allclose(adapted, folded, atol=2e-5 * np.abs(base).max())


@pytest.mark.ci
def test_fresh_adapters_change_nothing_and_have_their_shapes():
    model, params = make_unet()
    adapters = lora.init_adapters(params, EVERYWHERE, 4, jax.random.key(0))
    np.testing.assert_array_equal(
        run_unet(model, lora.combine(params, adapters)),
        run_unet(model, lora.combine(params, jax.tree.map(jnp.zeros_like, adapters))),
    )
    shapes = {path: leaf.shape for path, leaf in flatten(adapters).items()}
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert shapes[f"{block}.lora_A.kernel"] == (tiny_model.UNET["cross_attention_dim"], 4)
    assert shapes[f"{block}.lora_B.kernel"] == (4, 8)
    assert shapes["down_blocks.0.downsamplers.0.conv.lora_A.kernel"] == (3, 3, 8, 4)
    assert shapes["down_blocks.0.downsamplers.0.conv.lora_B.kernel"] == (1, 1, 4, 8)
    drawn = np.concatenate([leaf.ravel() for path, leaf in flatten(adapters).items() if "_A" in path])
    assert abs(drawn.std() - 1 / 4) < 0.01
    assert not any(leaf.any() for path, leaf in flatten(adapters).items() if "_B" in path)


def test_patterns_match_whole_ends_of_paths():
    _, params = make_unet()
    ranks = lora.find_ranks(
        lora.init_adapters(params, (r"to_k", r"mid_block\..*\.to_q"), 3, jax.random.key(0))
    )
    assert all(re.search(r"\.to_k$|^mid_block\..*\.to_q$", path) for path in ranks)
    assert {path.rsplit(".", 1)[1] for path in ranks} == {"to_k", "to_q"}
    assert set(ranks.values()) == {3}


@each_row(
    ("changes", "message"),
    [
        ({"lora.rank": -1}, "config.lora.rank = -1: must be at least 1, or 0 to turn LoRA off"),
        (
            {"lora.targets": ("to_x",)},
            "config.lora.targets = .*to_x: no layer matches; there are, for example, .*to_q",
        ),
        *(
            ({"lora.alpha": alpha}, f"config.lora.alpha = {alpha}: must be above 0 and finite")
            for alpha in (0.0, -1.0, float("inf"))
        ),
        (
            {"lora.rank": 0, "lora.alpha": 4.0},
            "config.lora.alpha = 4.0: LoRA is off; set config.lora.rank, or leave this key out",
        ),
        *(
            ({"lora.dropout": rate}, f"config.lora.dropout = {rate}: must be at least 0 and below 1")
            for rate in (-0.1, 1.0, float("nan"))
        ),
        (
            {"lora.dropout": 0.1, "stream.kind": "prompts"},
            "config.lora.dropout = 0.1: is of noised examples, and config.stream.kind = 'prompts'",
        ),
        (
            {"optimizer.text_encoder_learning_rate": 1e-4},
            "config.optimizer.text_encoder_learning_rate = 0.0001: the text encoders are not trained",
        ),
        ({"lora.targets": ("to_(",)}, "config.lora.targets = .*unterminated subpattern"),
    ],
)
def test_a_wrong_setting_is_refused(changes, message, shallow_model, tiny_pairs):
    config = make_config(shallow_model, tiny_pairs, {"lora.rank": 2, **changes})
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        make_adapters(parse(config), load_pipeline(shallow_model))


@pytest.fixture(scope="module")
def run(shallow_model, tiny_pairs, tmp_path_factory):
    """A finished run over adapters of the UNet and the text encoder."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    changes = {
        "objective.name": "diffusion_dpo",
        "objective.beta": 5000.0,
        "optimizer.learning_rate": 3e-2,
        "optimizer.weight_decay": 0.0,
        **LORA,
        "steps": 3,
        "validation.every": 3,
    }
    train(make_config(shallow_model, tiny_pairs, changes), workdir)
    return workdir


@pytest.mark.ci
def test_a_run_starts_at_the_reference(run):
    records = read_metrics(run / "metrics.jsonl")
    before = next(record for record in records if record["step"] == 0)
    assert before["validation/implicit_accuracy"] == 0.5
    assert before["validation/winner_drift"] == 0
    first = next(record for record in records if "loss" in record)
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-4)  # at beta = 5000 rounding shows
    assert records[-1]["validation/winner_drift"] != 0


def test_only_adapters_are_saved_and_all_of_them_moved(run, shallow_model, tiny_pairs):
    config = make_config(shallow_model, tiny_pairs, LORA)
    before = flatten(make_adapters(parse(config), load_pipeline(shallow_model)))
    with SavedParams(run / "checkpoints") as saved:
        assert set(saved.arrays) == set(before)
        assert all(re.search(r"\.lora_[AB]\.kernel$", path) for path in saved.arrays)
        assert [path for path in before if np.array_equal(saved.read(path), before[path])] == []


def test_the_optimizer_holds_adapters_and_the_reference_is_the_base_model(shallow_model, tiny_pairs):
    config = make_config(shallow_model, tiny_pairs, {"lora.rank": 2, "objective.name": "sft"})
    pipe = load_pipeline(shallow_model)
    task = make_task(parse(config), pipe)
    adapters = make_adapters(parse(config), pipe)
    state, reference = make_state(task, make_mesh({"data": -1}), adapters)
    assert set(state.params) == {"unet"}
    num_adapted = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) <= 2 * num_adapted + 8  # two moments
    assert set(reference) == {"unet", "text_encoder"}
    of_layers = {p: leaf for p, leaf in flatten(reference).items() if "lora_" not in p}
    base = {name: pipe.read_params(name) for name in reference}
    assert of_layers.keys() == flatten(base).keys()
    for path, leaf in flatten(base).items():
        np.testing.assert_array_equal(of_layers[path], leaf)


def draw_ours(path):
    requests = [ImageRequest("a red heart", 0, 7)]
    pipe = load_pipeline(path)
    sampler = ImageSampler(pipe, Drawing(steps=3, guidance_scale=7.5))
    return Decoder(pipe)(sampler.sample_latents(requests, initial_noise(requests, (4, 4, 4))))[0]


def draw_theirs(path, adapters=None):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if adapters:
        pipe.load_lora_weights(adapters.parent, weight_name=adapters.name)
    return draw_in_diffusers(pipe)


@pytest.mark.ci
def test_the_exported_model_has_the_products_in_its_kernels(run, shallow_model, tmp_path):
    assert export(run, tmp_path / "merged") == 3
    merged, base = load_pipeline(tmp_path / "merged"), load_pipeline(shallow_model)
    trained, _ = restore_params(run / "checkpoints")
    for name, adapters in trained.items():
        expected = flatten(fold(base.read_params(name), adapters, FACTOR))
        changed = lora.find_ranks(adapters)
        for path, leaf in flatten(merged.read_params(name)).items():
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-7)
            moved = not np.array_equal(leaf, flatten(base.read_params(name))[path])
            assert moved == (path.removesuffix(".kernel") in changed), path
    ours = draw_ours(run)
    assert np.abs(ours / 255.0 - draw_theirs(tmp_path / "merged")).mean() <= 1 / 255
    assert np.abs(draw_ours(shallow_model).astype(int) - ours.astype(int)).mean() > 1  # the training shows


@pytest.mark.ci
@each_row("style", ADAPTER_FORMATS)
def test_diffusers_loads_the_adapters_and_draws_the_same(style, run, shallow_model, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    file = tmp_path / "adapters.safetensors"
    assert export(run, file, adapters=style) == 3
    names = set(load_file(file))
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    expected = {
        "diffusers": f"unet.{layer}.lora_A.weight",
        "kohya": f"lora_unet_{layer.replace('.', '_')}.lora_down.weight",
    }
    assert expected[style] in names
    with pytest.raises(ValueError, match=r"adapters\.safetensors: is a LoRA"):
        import_model(file, tmp_path / "out")
    theirs = draw_theirs(shallow_model, file)
    assert np.abs(draw_ours(run) / 255.0 - theirs).mean() <= 1 / 255
    (tmp_path / shallow_model.name).symlink_to(shallow_model)  # what the card tells to run, where the base is
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", file.with_suffix(".md").read_text(), re.DOTALL)
    exec(re.sub(r"num_inference_steps=\d+", "num_inference_steps=1", program), {})
    assert (tmp_path / "image.png").is_file()


def test_adapters_of_another_model_are_refused(run, shallow_model, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"^[^\n]*name the model that the run started from with --base$"):
        export(run, tmp_path / "merged", base=tiny_model)
    with pytest.raises(
        ValueError, match=r"^--out=.*merged: adapters are one file; give it a name that ends in"
    ):
        export(run, tmp_path / "merged", adapters="kohya")
    assert list(tmp_path.iterdir()) == []
