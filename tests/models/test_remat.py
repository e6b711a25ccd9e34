"""Rematerialisation: the same gradients from fewer kept results."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx
from tables import each_row

from dspo_jax.models import blocks, clip, lora, remat, transformer_blocks, unet
from dspo_jax.pipelines.conditioning_inputs import prompt_batch
from dspo_jax.pipelines.loading import load_pipeline

ADAPTED = (r"to_[qkv]", r"to_out\.0", r"(q|v)_proj", r"conv[12]", r"ff\.net\.2")
BATCH = 5  # no axis of a parameter is as long, so that an array of a batch is told by its first axis


@functools.cache
def make_loss(folder, adapters):
    """((params, policy) -> a loss that all networks but the VAE take part in, params)."""
    pipe = load_pipeline(folder)
    params = {name: pipe.read_params(name) for name in pipe.networks if name != "vae"}
    draw = np.random.default_rng(1)
    if adapters:
        fresh = lora.init_adapters(params, ADAPTED, 2, jax.random.key(0))
        noise = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), jnp.float32), fresh)
        params = lora.combine(params, noise)
    latents, target = draw.normal(size=(2, BATCH, 4, 4, 4)).astype(np.float32)
    timesteps = draw.integers(0, 1000, BATCH)
    tokens = pipe.tokenize(["a red heart", "a tree", "a", "b", ""])
    batch = prompt_batch(pipe, tokens, (16, 16))

    def loss(params, policy):
        conditioning = pipe.encode_conditioning(params, batch, remat=policy)
        output = pipe.predict(params, latents, timesteps, conditioning, remat=policy)
        return jnp.square(output - target).mean()

    return loss, params


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def folder(request, tmp_path_factory):
    return tiny_model.write_model(tmp_path_factory.mktemp("remat") / request.param, family=request.param)


def assert_close(expected, other):
    """By tensor; some gradients are zero but for rounding, as those of a bias in front of a norm."""
    total = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(expected)))
    assert total > 0.1

    def check(path, leaf, other):
        assert np.linalg.norm(other - leaf) <= 1e-5 * np.linalg.norm(leaf) + 1e-6 * total, path

    jax.tree_util.tree_map_with_path(check, expected, other)


def kept(function, *args):
    """Shape -> how many arrays of it, of a batch, the backward pass of `function` is given."""
    backward = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    shapes = (leaf.shape for leaf in jax.tree.leaves(backward))
    return collections.Counter(shape for shape in shapes if shape[:1] == (BATCH,))


def size(shapes):
    return sum(count * int(np.prod(shape)) for shape, count in shapes.items())


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["base", "adapters"])
def test_gradients_of_a_model_are_the_same(folder, adapters):
    loss, params = make_loss(folder, adapters)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected = gradient(params, "none")
    for policy in ("blocks", "dots"):
        assert_close(expected, gradient(params, policy))


@pytest.mark.ci
@each_row("adapters", [False, True], ids=["base", "adapters"])
def test_less_is_kept(folder, adapters):
    loss, params = make_loss(folder, adapters)
    nothing, dots, inputs = (kept(lambda p, r=r: loss(p, r), params) for r in ("none", "dots", "blocks"))
    assert size(nothing) > 2 * size(dots) > 3 * size(inputs)
    # Weights of attention, in the text and to it.
    weights = {shape for shape in nothing if shape[-1] == 77}
    assert {shape[2] for shape in weights} > {77}
    assert not weights & (dots.keys() | inputs.keys())


def test_without_a_policy_the_program_is_the_one_without_blocks(folder, monkeypatch):
    loss, params = make_loss(folder, False)

    def program(*policy):
        return str(jax.make_jaxpr(lambda params: loss(params, *policy))(params))

    none, inputs = program("none"), program("blocks")
    for module in (clip, transformer_blocks, unet):
        monkeypatch.setattr(module, "run_block", lambda block, policy, *inputs: block(*inputs))
    assert none == program("none") != inputs


def make_block(kind, adapters):
    """(a block of a network, its inputs)."""
    draw = np.random.default_rng(0)
    rngs = nnx.Rngs(0)
    if kind == "resnet":
        block = blocks.ResnetBlock2D(8, 16, temb=6, groups=4, epsilon=1e-5, rngs=rngs)
        shapes, adapted = [(BATCH, 4, 4, 8), (BATCH, 6)], ["conv1", "time_emb_proj"]
    else:
        block = transformer_blocks.BasicTransformerBlock(8, 2, 4, 6, rngs=rngs)
        shapes, adapted = [(BATCH, 16, 8), (BATCH, 7, 6)], ["attn1.to_q", "attn2.to_out.0"]
    if adapters:
        lora.attach(block, dict.fromkeys(adapted, lora.Adapter(2)), rngs)
    return block, [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.ci
@each_row("adapters", [False, True], ids=["base", "adapters"])
@each_row("kind", ["resnet", "transformer"])
def test_gradients_of_a_block_are_the_same(kind, adapters):
    block, inputs = make_block(kind, adapters)
    graph, state = nnx.split(block)

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(state, inputs, policy):
        return jnp.square(remat.run_block(nnx.merge(graph, state), policy, *inputs)).sum()

    expected = gradient(state, inputs, "none")
    for policy in ("blocks", "dots"):
        assert_close(expected, gradient(state, inputs, policy))


@each_row(
    ("kind", "expected"),
    [
        # The first convolution and the shift by the time; no gradient needs what the second one gives.
        ("resnet", {(BATCH, 4, 4, 16): 1, (BATCH, 16): 1}),
        # Two queries and two outputs, key and value of the image; those of the text; the gated layer. Not
        # the products of attention.
        ("transformer", {(BATCH, 16, 8): 6, (BATCH, 7, 8): 2, (BATCH, 16, 64): 1}),
    ],
)
def test_what_is_kept_of_a_block(kind, expected):
    block, inputs = make_block(kind, adapters=False)
    nothing, dots, only_inputs = (
        kept(lambda *args, r=r: remat.run_block(block, r, *args), *inputs) for r in ("none", "dots", "blocks")
    )
    assert only_inputs == collections.Counter(x.shape for x in inputs)
    assert dots - only_inputs == expected
    assert size(nothing) > 2 * size(dots)


def test_an_unknown_policy_is_refused():
    with pytest.raises(
        ValueError, match=r"^config\.remat = 'block': unknown; did you mean 'blocks'\? \(allowed: [^\n]*\)$"
    ):
        remat.check_policy("block")
    block, inputs = make_block("resnet", adapters=False)
    with pytest.raises(ValueError, match=r"^config\.remat = '': unknown \(allowed: blocks, dots, none\)$"):
        remat.run_block(block, "", *inputs)
