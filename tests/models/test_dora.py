"""DoRA: layers against PEFT's, magnitudes at the start, and what diffusers makes of exported files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_folders import refused
from safetensors.numpy import load_file
from tables import each_row
from tiny_run import make_config

from dspo_jax.conversion.export_model import export
from dspo_jax.models import lora
from dspo_jax.models.blocks import conv2d, linear
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.pipelines.loading import Adapted, load_pipeline
from dspo_jax.training.make_task import make_task
from dspo_jax.training.reference import open_reference
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_adapters, make_state
from dspo_jax.weights.checkpoints import Checkpoints
from dspo_jax.weights.layout import flatten, leaf_tensors, to_torch, unflatten

# Linear layers, convolutions of 1 x 1 and of 3 x 3, and those of a text encoder.
TARGETS = (r"to_q", r"proj_in", r"conv1", r"q_proj")
CONFIG = {
    **{"lora.rank": 2, "lora.alpha": 3.0, "lora.dora": True, "lora.targets": TARGETS},
    "train_text_encoder": True,
}


class Layer(nnx.Module):
    def __init__(self, kind):
        self.one = (
            linear(6, 5, rngs=nnx.Rngs(0))
            if kind == "linear"
            else conv2d(6, 5, 3, stride=2, rngs=nnx.Rngs(0))
        )


def run_layer(kind, params, x):
    layer = Layer(kind)
    lora.attach(layer, lora.find_adapters(params), nnx.Rngs(0))
    graph, state = nnx.split(layer, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state).one(x)


def run_peft(kind, leaves, x, cotangent):
    """Output and gradients of PEFT's layer, by the names of the leaves; alpha is 3."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    base = torch.nn.Linear(6, 5) if kind == "linear" else torch.nn.Conv2d(6, 5, 3, stride=2, padding=1)
    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    layer = model.base_model.model[0]
    parts = {
        "kernel": layer.base_layer.weight,
        "bias": layer.base_layer.bias,
        "lora_A.kernel": layer.lora_A["default"].weight,
        "lora_B.kernel": layer.lora_B["default"].weight,
        "lora_magnitude_vector": layer.lora_magnitude_vector["default"].weight,
    }
    theirs = {name: tensor.read() for name, tensor in to_torch(leaf_tensors(unflatten(leaves))).items()}
    with torch.no_grad():
        for name, part in parts.items():
            value = theirs[name.replace("kernel", "weight")]
            part.copy_(torch.tensor(np.ascontiguousarray(value)).reshape(part.shape))
    channels_first = kind != "linear"

    def turn(array):
        return torch.tensor(np.moveaxis(array, -1, 1).copy() if channels_first else array)

    inputs = turn(x).requires_grad_()
    out = model(inputs)
    (out * turn(cotangent)).sum().backward()

    def turn_back(tensor):
        return np.moveaxis(tensor.detach().numpy(), 1, -1) if channels_first else tensor.detach().numpy()

    grads = {name: part.grad.numpy() for name, part in parts.items() if name.startswith("lora")}
    grads["lora_magnitude_vector"] = grads["lora_magnitude_vector"].ravel()
    return turn_back(out), turn_back(inputs.grad), grads


@each_row("kind", ["linear", "convolution"])
def test_a_layer_and_its_gradients_are_those_of_peft(kind):
    random = np.random.default_rng(0)
    window = () if kind == "linear" else (3, 3)
    shapes = {
        **{"kernel": (*window, 6, 5), "bias": (5,), "lora_A.kernel": (*window, 6, 2)},
        **{"lora_B.kernel": (*(1 for _ in window), 2, 5), "lora_magnitude_vector": (5,)},
    }
    leaves = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    x = random.standard_normal((3, 6) if kind == "linear" else (3, 4, 4, 6)).astype(np.float32)
    cotangent = random.standard_normal((3, 5) if kind == "linear" else (3, 2, 2, 5)).astype(np.float32)

    def run(params, x):
        out = run_layer(kind, lora.scaled({"one": params}, lora.Scale(3.0)), x)
        return (out * cotangent).sum(), out

    (_, out), (grads, of_x) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(
        jax.tree.map(jnp.asarray, unflatten(leaves)), jnp.asarray(x)
    )
    expected, expected_of_x, expected_grads = run_peft(kind, leaves, x, cotangent)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_x, expected_of_x, rtol=1e-4, atol=1e-5)
    ours = to_torch(leaf_tensors(grads))
    for name, value in expected_grads.items():
        found = ours[name.replace("kernel", "weight")].read()
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4, err_msg=name)


def begin(model, pairs, changes=None, **options):
    settings, pipe = parse(make_config(model, pairs, CONFIG | (changes or {}))), load_pipeline(model)
    name = settings.reference.model
    task = make_task(settings, pipe, reference=open_reference(name, pipe) if name else None)
    return settings, make_state(task, make_mesh({"data": -1}), make_adapters(settings, pipe), **options)


def lengths(weight):
    return np.sqrt(np.square(np.float64(weight)).reshape(len(weight), -1).sum(1))


@pytest.fixture(scope="module")
def run(shallow_model, tiny_pairs, tmp_path_factory):
    """A workdir with one checkpoint of a run with DoRA, whose adapters were drawn."""
    workdir = tmp_path_factory.mktemp("dora") / "run"
    _, (state, _) = begin(shallow_model, tiny_pairs)
    draw = np.random.default_rng(1).normal
    moved = {
        path: leaf * draw(1, 0.2, leaf.shape) if "magnitude" in path else draw(0, 0.2, leaf.shape)
        for path, leaf in flatten(jax.device_get(state.params)).items()
    }
    workdir.mkdir()
    (workdir / "config.json").write_text(make_config(shallow_model, tiny_pairs, CONFIG).to_json())
    params = unflatten({path: jnp.asarray(value, jnp.float32) for path, value in moved.items()})
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": params, "opt_state": jnp.zeros(3)}, {}, None, wait=True)
    return workdir


def test_magnitudes_begin_as_the_lengths_of_the_weights(shallow_model, tiny_pairs):
    changes = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16", "reference_dtype": "float32"}
    _, (state, reference) = begin(shallow_model, tiny_pairs, changes)
    pipe, found = load_pipeline(shallow_model), 0
    for component, tree in state.params.items():
        stored = to_torch(leaf_tensors(pipe.read_params(component)))
        for path, leaf in flatten(tree).items():
            layer, _, name = path.rpartition(".")
            if name == "lora_magnitude_vector":
                assert leaf.dtype == jnp.float32
                np.testing.assert_allclose(leaf, lengths(stored[f"{layer}.weight"].read()), rtol=1e-5)
                np.testing.assert_array_equal(leaf, flatten(reference[component])[path])
                found += 1
    assert found == sum(len(lora.find_ranks(tree)) for tree in state.params.values()) > 4
    _, (shapes, _) = begin(shallow_model, tiny_pairs, changes, abstract=True)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes.params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state.params
    )


def test_another_reference_has_magnitudes_of_its_own(run, shallow_model, tiny_pairs, tmp_path):
    export(run, tmp_path / "other")
    _, (state, reference) = begin(shallow_model, tiny_pairs, {"reference.model": str(tmp_path / "other")})
    for folder, trees in ((shallow_model, state.params), (tmp_path / "other", reference)):
        stored = read_all(load_pipeline(folder))
        for component in ("unet", "text_encoder"):
            for layer in lora.find_ranks(trees[component]):
                found = flatten(trees[component])[f"{layer}.lora_magnitude_vector"]
                np.testing.assert_allclose(found, lengths(stored[component, f"{layer}.weight"]), rtol=1e-5)


def read_all(pipe):
    return {
        (component, name): tensor.read()
        for component in pipe.components
        for name, tensor in to_torch(leaf_tensors(pipe.read_params(component))).items()
    }


@pytest.mark.ci
def test_diffusers_reads_an_export_as_the_run_is(run, shallow_model, tiny_pairs, tmp_path):
    """The whole model, the run, and the file as it is added here and fused there have the same weights."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    file = tmp_path / "dora.safetensors"
    export(run, file, adapters="diffusers")
    export(run, tmp_path / "merged")
    assert load_file(file)["unet.mid_block.resnets.0.conv1.lora_magnitude_vector.weight"].shape == (
        1,
        8,
        1,
        1,
    )
    theirs = diffusers.DiffusionPipeline.from_pretrained(shallow_model, local_files_only=True)
    theirs.load_lora_weights(tmp_path, weight_name=file.name)
    theirs.fuse_lora(components=["unet", "text_encoder"])
    theirs.unload_lora_weights()
    base, changed = read_all(load_pipeline(shallow_model)), 0
    for model in (tmp_path / "merged", run, Adapted(shallow_model, (str(file),))):
        for (component, name), value in read_all(load_pipeline(model)).items():
            fused = getattr(theirs, component).state_dict()
            found = fused[name] if name in fused else fused[name.removeprefix("text_model.")]
            np.testing.assert_allclose(value, found.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
            changed += not np.array_equal(value, base[component, name])
    assert changed > 12
    _, (state, _) = begin(shallow_model, tiny_pairs, {"lora.init": str(file)})
    saved = flatten(load_file(file))
    assert len(saved) == len(flatten(state.params))
    again = {
        f"{component}.{name}": tensor.read()
        for component, tree in jax.device_get(state.params).items()
        for name, tensor in to_torch(leaf_tensors(tree)).items()
    }
    for name, value in saved.items():
        ours = again[name.replace("vector.weight", "vector")]
        np.testing.assert_allclose(ours, value.reshape(ours.shape), rtol=1e-6, err_msg=name)
    with refused(r".*dora\.safetensors: is DoRA; set config\.lora\.dora=True"):
        begin(shallow_model, tiny_pairs, {"lora.init": str(file), "lora.dora": False})
    with refused(r".*: holds DoRA, for which kohya's names have no place"):
        export(run, tmp_path / "kohya.safetensors", adapters="kohya")
