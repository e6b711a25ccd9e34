"""The mesh, the rules over parameter paths, and every refusal, on 8 fake devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import published
import pytest
from jax.sharding import PartitionSpec as P
from tables import each_row

from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models.model import build_model
from dspo_jax.parallel.mesh import (
    MESH_AXES,
    arrange,
    batch_share,
    check_batch_size,
    make_mesh,
    shard_batch,
    use_cpu_cores,
)
from dspo_jax.parallel.rules import bytes_per_device, gather, make_shardings, place, replicated_bytes


def specs(tree):
    return jax.tree.map(lambda s: s.spec, tree)


@each_row(
    ("sizes", "shape"),
    [
        ({}, None),
        ({"data": -1}, (8, 1, 1)),
        ({"data": -1, "fsdp": 1, "tensor": 1}, (8, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_mesh_takes_all_devices_or_refuses(sizes, shape):
    if shape is None:
        with pytest.raises(ValueError, match="does not fit the 8 devices"):
            make_mesh(sizes)
        return
    mesh = make_mesh(sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())


@each_row(
    ("cores", "batch_size", "devices"), [(2, 0, 2), (6, 0, 4), (64, 0, 8), (8, 12, 4), (8, 1, 1), (8, 32, 8)]
)
def test_a_device_of_each_core_that_has_its_share_of_a_batch(monkeypatch, cores, batch_size, devices):
    asked = {}
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    use_cpu_cores(batch_size)
    assert asked == {"jax_num_cpu_devices": devices}
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    asked.clear()
    use_cpu_cores(batch_size)
    assert not asked


def test_mesh_of_chosen_devices():
    assert make_mesh({"data": -1}, devices=jax.devices()[:1]).devices.shape == (1, 1, 1)


@each_row(
    ("sizes", "message"),
    [
        ({"data": 3, "fsdp": 1}, r"config\.mesh = data 3 x fsdp 1 x tensor 1: does not fit the 8 devices"),
        ({"data": -1, "fsdp": 3}, r"data -1 x fsdp 3 x tensor 1: does not fit the 8 devices"),
        ({"data": -1, "fsdp": -1}, "only one axis can be -1"),
        ({"data": 0}, r"config\.mesh\.data = 0: must be positive, or -1"),
        ({"dta": 8}, r"config\.mesh = 'dta': unknown; did you mean 'data'\? \(allowed: data, fsdp, tensor\)"),
    ],
)
def test_mesh_refusals(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


def test_default_rule_splits_the_largest_divisible_axis():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    tree = {
        "conv": {"kernel": jnp.zeros((3, 3, 8, 16)), "bias": jnp.zeros((16,))},
        "square": jnp.zeros((8, 8)),
        "odd": jnp.zeros((3, 5)),
        "wide": jnp.zeros((12, 9)),
        "scalar": jnp.zeros(()),
    }
    assert specs(make_shardings(tree, mesh)) == {
        "conv": {"kernel": P(None, None, None, "fsdp"), "bias": P()},
        "square": P(None, "fsdp"),
        "odd": P(),
        "wide": P("fsdp"),
        "scalar": P(),
    }


def test_nothing_is_split_when_fsdp_is_one():
    mesh = make_mesh({"data": 8})
    assert specs(make_shardings({"kernel": jnp.zeros((8, 8))}, mesh)) == {"kernel": P()}


def test_first_matching_rule_wins_and_moments_follow_their_parameters():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = {"blocks": {"0": {"to_q": {"kernel": jnp.zeros((8, 8))}, "norm": {"scale": jnp.zeros((8,))}}}}
    rules = [(r"to_q\.kernel$", P("fsdp", "tensor")), (r"kernel$", P("tensor")), (r"norm", P())]
    expected = {"blocks": {"0": {"to_q": {"kernel": P("fsdp", "tensor")}, "norm": {"scale": P()}}}}
    assert specs(make_shardings(params, mesh, rules)) == expected
    moments = make_shardings(optax.scale_by_adam().init(params), mesh, rules)
    assert specs(moments.mu) == expected
    assert specs(moments.count) == P()


def test_an_axis_that_does_not_divide_stays_whole_and_a_rule_for_more_axes_is_not_used():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rules = [("factored", P("tensor", "fsdp")), ("kernel", P("fsdp", "tensor"))]
    tree = {"kernel": jnp.zeros((3, 8)), "odd_kernel": jnp.zeros((3, 5)), "factored_kernel": jnp.zeros((8,))}
    assert specs(make_shardings(tree, mesh, rules)) == {
        "kernel": P(None, "tensor"),
        "odd_kernel": P(None, None),
        "factored_kernel": P("fsdp"),
    }


# Blocks of Stable Diffusion 1.5, CLIP, Stable Diffusion 3.5 medium and T5, and what the rules make of them.
@each_row(
    ("path", "shape", "spec"),
    [
        ("transformer_blocks.0.attn1.to_q.kernel", (320, 320), P("fsdp", "tensor")),
        ("transformer_blocks.0.attn2.to_k.kernel", (768, 320), P("fsdp", "tensor")),
        ("transformer_blocks.0.attn1.to_out.0.kernel", (320, 320), P("tensor", "fsdp")),
        ("transformer_blocks.0.ff.net.0.proj.kernel", (320, 2560), P("fsdp", "tensor")),
        ("transformer_blocks.0.ff.net.0.proj.bias", (2560,), P("tensor")),
        ("transformer_blocks.0.ff.net.2.kernel", (1280, 320), P("tensor", "fsdp")),
        ("transformer_blocks.0.ff.net.2.bias", (320,), P()),
        ("transformer_blocks.0.attn1.to_q.lora_A.kernel", (320, 8), P("fsdp")),
        ("resnets.0.conv1.kernel", (3, 3, 320, 640), P(None, None, None, "fsdp")),
        ("resnets.0.norm1.scale", (320,), P()),
        ("layers.0.self_attn.q_proj.kernel", (768, 768), P("fsdp", "tensor")),
        ("layers.0.self_attn.out_proj.kernel", (768, 768), P("tensor", "fsdp")),
        ("layers.0.mlp.fc1.kernel", (768, 3072), P("fsdp", "tensor")),
        ("layers.0.mlp.fc1.bias", (3072,), P("tensor")),
        ("layers.0.mlp.fc2.kernel", (3072, 768), P("tensor", "fsdp")),
        ("embeddings.token_embedding.embedding", (49408, 768), P("fsdp")),
        ("transformer_blocks.0.attn.to_q.kernel", (1536, 1536), P("fsdp", "tensor")),
        ("transformer_blocks.0.attn.to_q.bias", (1536,), P("tensor")),
        ("transformer_blocks.0.attn.add_k_proj.kernel", (1536, 1536), P("fsdp", "tensor")),
        ("transformer_blocks.0.attn.add_v_proj.bias", (1536,), P("tensor")),
        ("transformer_blocks.0.attn.to_out.0.bias", (1536,), P()),
        ("transformer_blocks.0.attn.to_add_out.kernel", (1536, 1536), P("tensor", "fsdp")),
        ("transformer_blocks.0.attn.norm_added_q.scale", (64,), P()),
        ("transformer_blocks.0.attn2.to_v.kernel", (1536, 1536), P("fsdp", "tensor")),
        ("transformer_blocks.0.ff_context.net.0.proj.kernel", (1536, 6144), P("fsdp", "tensor")),
        ("transformer_blocks.0.ff_context.net.0.proj.bias", (6144,), P("tensor")),
        ("transformer_blocks.0.ff_context.net.2.kernel", (6144, 1536), P("tensor", "fsdp")),
        ("transformer_blocks.0.norm1.linear.kernel", (1536, 13824), P("fsdp", "tensor")),
        ("transformer_blocks.0.norm1_context.linear.kernel", (1536, 9216), P("fsdp", "tensor")),
        ("norm_out.linear.kernel", (1536, 3072), P(None, "fsdp")),
        ("pos_embed.proj.kernel", (2, 2, 16, 1536), P(None, None, None, "fsdp")),
        ("layer.0.SelfAttention.k.kernel", (4096, 4096), P("fsdp", "tensor")),
        ("layer.0.SelfAttention.o.kernel", (4096, 4096), P("tensor", "fsdp")),
        ("layer.0.SelfAttention.relative_attention_bias.embedding", (32, 64), P(None, "tensor")),
        ("layer.1.DenseReluDense.wi_1.kernel", (4096, 10240), P("fsdp", "tensor")),
        ("layer.1.DenseReluDense.wo.kernel", (10240, 4096), P("tensor", "fsdp")),
        ("layer.1.layer_norm.scale", (4096,), P()),
        ("shared.embedding", (32128, 4096), P("tensor", "fsdp")),
    ],
)
def test_the_rules_split_heads_and_hidden_units_over_tensor(path, shape, spec):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    tree = {path: jax.ShapeDtypeStruct(shape, jnp.float32)}
    assert specs(make_shardings(tree, mesh)) == {path: spec}


def with_shardings(tree, mesh):
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        tree,
        make_shardings(tree, mesh),
    )


def test_bytes_of_a_device_and_what_is_the_same_on_all():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    tree = with_shardings(
        {
            "to_q": {"kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32)},  # over fsdp and tensor
            "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 4, 4), jnp.bfloat16)},  # over fsdp
            "norm": {"scale": jax.ShapeDtypeStruct((4,), jnp.float32)},
        },
        mesh,
    )
    assert bytes_per_device(tree) == 8 * 6 * 4 // 4 + 9 * 16 * 2 // 2 + 16
    assert replicated_bytes(tree) == (16, "norm.scale")


@pytest.mark.ci
def test_the_split_mmdit_computes_what_the_whole_one_does():
    """Output and gradients over data, fsdp and tensor, gathered as in training, with a head on each of two.

    Where they are not gathered, XLA takes one example for another at one example a device.
    """
    config = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "pos_embed_max_size": 4,
        "dual_attention_layers": [0],
        "qk_norm": "rms_norm",
    }
    model = build_model("SD3Transformer2DModel", config)
    draw = np.random.default_rng(0)

    def normal(*shape):
        return draw.standard_normal(shape, np.float32)

    params = jax.tree.map(lambda leaf: normal(*leaf.shape) / leaf.shape[0] ** 0.5, model.abstract_params())
    batch = (normal(4, 8, 6, 4), np.linspace(1, 999, 4, dtype=np.float32), normal(4, 5, 12), normal(4, 12))
    positions, weights = normal(4, 3, 16), normal(4, 8, 6, 4)

    def loss(params, sample, timesteps, states, pooled):
        conditions = {"pooled_projections": pooled, "positions": positions}
        out = model.apply(gather(params), sample, timesteps, states, **conditions)
        return (weights * out).sum(), out

    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    split = place(params, make_shardings(params, mesh))
    assert split["transformer_blocks"]["0"]["attn"]["to_q"]["kernel"].sharding.spec == P("fsdp", "tensor")
    gradients = jax.grad(loss, has_aux=True)
    expected = jax.jit(gradients)(params, *batch)
    arrays = shard_batch(dict(zip("abcd", batch, strict=True)), mesh)
    actual = jax.jit(on_mesh(gradients, mesh))(split, *arrays.values())
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * (1 + np.abs(theirs).max()))


@pytest.mark.ci
@each_row(
    ("class_name", "config"),
    [("SD3Transformer2DModel", published.SD35_MEDIUM), ("T5EncoderModel", published.T5_XXL)],
)
def test_each_of_8_chips_holds_an_eighth_of_stable_diffusion_3_and_of_t5(class_name, config):
    """But for norms, biases, and the first and last layers, which are small."""
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    tree = build_model(class_name, config).abstract_params()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    assert whole / 8 <= bytes_per_device(with_shardings(tree, mesh)) <= 1.02 * whole / 8


@pytest.mark.ci
@each_row(
    ("sizes", "parameters", "moments"),
    [((8, 1, 1), 1, 1), ((2, 4, 1), 4, 4), ((1, 8, 1), 8, 8), ((2, 2, 2), 2, 2), ((1, 4, 2), 4, 4)],
)
def test_bytes_of_a_full_unet_fall_as_the_axes_say(sizes, parameters, moments):
    """Stable Diffusion 1.5's, 860 million parameters, as shapes."""
    unet = build_model("UNet2DConditionModel", published.SD15_UNET).abstract_params()
    mesh = make_mesh(dict(zip(MESH_AXES, sizes, strict=True)))
    state = jax.eval_shape(optax.adamw(1e-3).init, unet)
    for tree, ways in ((unet, parameters), (state, moments)):
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        held = bytes_per_device(with_shardings(tree, mesh))
        # `tensor` splits attention and feed-forward alone, which are a good third of the weights.
        least = whole / ways / sizes[2]
        assert least <= held <= 1.01 * whole / ways
        if sizes[2] > 1:
            assert held < 0.9 * whole / ways
    whole_arrays, _ = replicated_bytes(with_shardings(unet, mesh))
    if ways > 1:
        assert whole_arrays < 0.002 * 4 * 859_520_964


def test_host_arrays_become_global_ones():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    tree = {"to_q": {"kernel": np.arange(48, dtype=np.float32).reshape(8, 6)}}
    placed = place(tree, make_shardings(tree, mesh))["to_q"]["kernel"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(4, 3)}
    np.testing.assert_array_equal(placed, tree["to_q"]["kernel"])


class Device:
    """As much of a device as arranging it takes."""

    def __init__(self, number, process, slice_index=None):
        self.id, self.process_index, self.platform, self.device_kind = number, process, "cpu", "cpu"
        if slice_index is not None:
            self.slice_index = slice_index


@each_row("by", ["process", "slice"])
def test_slices_lie_along_the_axis_that_dcn_names(by, monkeypatch):
    devices = [
        Device(i, i // 2 if by == "slice" else i // 4, i // 4 if by == "slice" else None) for i in range(8)
    ]
    arranged = arrange({"fsdp": -1}, devices, {"data": 2})
    assert arranged.shape == (2, 4, 1)
    assert [[d.id for d in row] for row in arranged[:, :, 0]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    arranged = arrange({"data": 2, "fsdp": 2}, devices, {"fsdp": 2})
    assert arranged.shape == (2, 4, 1)
    assert {d.id for d in arranged[:, :2].flat} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=rf"config\.mesh\.dcn = data 3 .* does not fit the 2 {by}"):
        arrange({"fsdp": -1}, devices, {"data": 3})
    with pytest.raises(
        ValueError, match=r"config\.mesh = data 1 x fsdp 8 x tensor 1: does not fit the 4 devices of"
    ):
        arrange({"fsdp": 8}, devices, {"data": 2})


@each_row(
    ("sizes", "shares"),
    [
        # Mesh of 8 devices, 4 a process: (number, of how many) for each process.
        ({"data": 8}, [(0, 2), (1, 2)]),
        ({"data": 2, "fsdp": 2, "tensor": 2}, [(0, 2), (1, 2)]),
        ({"fsdp": 2, "tensor": 4}, [(0, 2), (1, 2)]),
        ({"tensor": 8}, [(0, 1), (0, 1)]),
    ],
)
def test_the_part_of_a_batch_that_a_process_reads(sizes, shares, monkeypatch):
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    devices = np.array([Device(i, i // 4) for i in range(8)]).reshape(shape)
    mesh = SimpleNamespace(devices=devices, shape=dict(zip(MESH_AXES, shape, strict=True)))
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert batch_share(mesh) == share


def test_a_mesh_that_scatters_a_process_over_the_batch_is_refused(monkeypatch):
    devices = np.array([Device(i, i % 2) for i in range(8)]).reshape(8, 1, 1)
    mesh = SimpleNamespace(devices=devices, shape={"data": 8, "fsdp": 1, "tensor": 1})
    with pytest.raises(ValueError, match="do not lie together along the batch"):
        batch_share(mesh)


def test_arrays_are_born_sharded():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    abstract = jax.eval_shape(lambda: {"kernel": jnp.ones((8, 16))})
    made = jax.jit(lambda: {"kernel": jnp.ones((8, 16))}, out_shardings=make_shardings(abstract, mesh))()
    assert made["kernel"].addressable_shards[0].data.shape == (8, 4)


def test_batch_is_split_over_data_and_fsdp_in_order():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = {
        "moments": np.arange(8 * 3, dtype=np.float16).reshape(8, 3),
        "preference": np.arange(8, dtype=np.float32),
    }
    sharded = shard_batch(batch, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(np.asarray(sharded[name]), array)
        assert sharded[name].dtype == array.dtype
        assert {shard.data.shape[0] for shard in sharded[name].addressable_shards} == {2}


@each_row(
    ("batch_size", "message"),
    [
        (6, r"config\.batch_size = 6: not a multiple of 8, .*\(data 2 x fsdp 4\); nearest: 8$"),
        (21, r"nearest: 16 or 24$"),
        (0, r"config\.batch_size = 0: .*nearest: 8$"),
    ],
)
def test_batch_size_must_fit_the_mesh(batch_size, message):
    mesh = make_mesh({"data": 2, "fsdp": 4})
    with pytest.raises(ValueError, match=message):
        check_batch_size(batch_size, mesh)
    check_batch_size(16, mesh)
