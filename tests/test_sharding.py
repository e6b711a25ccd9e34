"""The mesh, the rules over parameter paths, and every refusal, on 8 fake devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dspo_jax import sharding


def specs(tree):
    return jax.tree.map(lambda s: s.spec, tree)


@pytest.mark.parametrize(
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
            sharding.make_mesh(sizes)
        return
    mesh = sharding.make_mesh(sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())


def test_mesh_of_chosen_devices():
    assert sharding.make_mesh({"data": -1}, devices=jax.devices()[:1]).devices.shape == (1, 1, 1)


@pytest.mark.parametrize(
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
        sharding.make_mesh(sizes)


def test_default_rule_splits_the_largest_divisible_axis():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    tree = {
        "conv": {"kernel": jnp.zeros((3, 3, 8, 16)), "bias": jnp.zeros((16,))},
        "square": jnp.zeros((8, 8)),
        "odd": jnp.zeros((3, 5)),
        "wide": jnp.zeros((12, 9)),
        "scalar": jnp.zeros(()),
    }
    assert specs(sharding.make_shardings(tree, mesh)) == {
        "conv": {"kernel": P(None, None, None, "fsdp"), "bias": P("fsdp")},
        "square": P(None, "fsdp"),
        "odd": P(),
        "wide": P("fsdp"),
        "scalar": P(),
    }


def test_nothing_is_split_when_fsdp_is_one():
    mesh = sharding.make_mesh({"data": 8})
    assert specs(sharding.make_shardings({"kernel": jnp.zeros((8, 8))}, mesh)) == {"kernel": P()}


def test_first_matching_rule_wins_and_moments_follow_their_parameters():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = {"blocks": {"0": {"to_q": {"kernel": jnp.zeros((8, 8))}, "norm": {"scale": jnp.zeros((8,))}}}}
    rules = [(r"to_q\.kernel$", P("fsdp", "tensor")), (r"kernel$", P("tensor")), (r"norm", P())]
    expected = {"blocks": {"0": {"to_q": {"kernel": P("fsdp", "tensor")}, "norm": {"scale": P()}}}}
    assert specs(sharding.make_shardings(params, mesh, rules)) == expected
    moments = sharding.make_shardings(optax.scale_by_adam().init(params), mesh, rules)
    assert specs(moments.mu) == expected
    assert specs(moments.count) == P()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            (r"kernel", P("fsdp")),
            r"rule 'kernel': .* splits a\.kernel of shape \[6, 3\] unevenly: 6 is not a multiple of fsdp = 4",
        ),
        ((r"kernel", P(None, None, "fsdp")), r"has 3 axes, but a\.kernel has shape \[6, 3\]"),
        ((r"kernel", P(("data", "fsdp"))), r"6 is not a multiple of data x fsdp = 8"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rule, message):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    with pytest.raises(ValueError, match=message):
        sharding.make_shardings({"a": {"kernel": jnp.zeros((6, 3))}}, mesh, [rule])


def test_arrays_are_born_sharded():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    abstract = jax.eval_shape(lambda: {"kernel": jnp.ones((8, 16))})
    made = jax.jit(
        lambda: {"kernel": jnp.ones((8, 16))}, out_shardings=sharding.make_shardings(abstract, mesh)
    )()
    assert made["kernel"].addressable_shards[0].data.shape == (8, 4)


def test_batch_is_split_over_data_and_fsdp_in_order():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = {
        "moments": np.arange(8 * 3, dtype=np.float16).reshape(8, 3),
        "preference": np.arange(8, dtype=np.float32),
    }
    sharded = sharding.shard_batch(batch, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(np.asarray(sharded[name]), array)
        assert sharded[name].dtype == array.dtype
        assert {shard.data.shape[0] for shard in sharded[name].addressable_shards} == {2}


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (6, r"config\.batch_size = 6: not a multiple of 8, .*\(data 2 x fsdp 4\); nearest: 8$"),
        (21, r"nearest: 16 or 24$"),
        (0, r"config\.batch_size = 0: .*nearest: 8$"),
    ],
)
def test_batch_size_must_fit_the_mesh(batch_size, message):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    with pytest.raises(ValueError, match=message):
        sharding.check_batch_size(batch_size, mesh)
    sharding.check_batch_size(16, mesh)
