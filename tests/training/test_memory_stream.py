"""Batches of examples in memory: every example once an epoch, and a position that can be restored."""

import numpy as np
import pytest

from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.training.memory_stream import MemoryStream


@pytest.fixture
def mesh():
    return make_mesh({"data": -1})


def read(stream, count):
    """Numbers of the examples, and their positions."""
    batches = [stream.next({}) for _ in range(count)]
    return [np.concatenate([batch[name] for batch in batches]).tolist() for name in ("moments", "index")]


def make_stream(mesh, seed=0):
    return MemoryStream({"moments": np.arange(12)}, mesh, batch_size=8, seed=seed)


def test_every_example_comes_once_an_epoch_in_an_order_of_its_own(mesh):
    examples, positions = read(make_stream(mesh), 6)
    assert positions == list(range(48))
    epochs = [tuple(examples[start : start + 12]) for start in range(0, 48, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert read(make_stream(mesh, seed=1), 6)[0] != examples


def test_a_restored_position_goes_on_with_the_next_batch(mesh):
    stream = make_stream(mesh)
    read(stream, 2)
    state, expected = stream.get_state(), read(stream, 3)
    other = make_stream(mesh)
    other.set_state(state)
    assert read(other, 3) == expected
