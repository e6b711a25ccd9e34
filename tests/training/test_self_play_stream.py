"""Self-play: the losers of encoded examples are images that the reference draws for their captions."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_model
from online_run import OnlineRun, moved
from tiny_run import read_batches

from dspo_jax.data.datasets import read_datasets
from dspo_jax.models import lora
from dspo_jax.parallel.mesh import shard_batch
from dspo_jax.sampling.guidance import GuidedDenoiser
from dspo_jax.training.loop import AfterStep
from dspo_jax.training.moving_reference import MoveReference
from dspo_jax.training.self_play_stream import SelfPlayStream

CHANGES = {
    "stream.kind": "self_play",
    "stream.batch_size": 4,
    "objective.name": "diffusion_dpo",
    "reference.every": 2,
}


class SelfPlayRun(OnlineRun):
    def __init__(self, model, pairs, changes=None, mesh_sizes=None):
        super().__init__(model, {**CHANGES, **(changes or {})}, mesh_sizes, trajectories=False)
        self.pairs = pairs

    def open(self):
        """A stream at its start."""
        return SelfPlayStream(read_datasets(self.pairs), self.settings, self.task, self.reference, self.mesh)


def make_draw(run):
    """A program that draws the image of an example, with the noise that `Rollout` documents."""
    drawing = run.settings.stream.drawing
    denoiser, sampler = GuidedDenoiser(run.pipe, drawing), drawing.make_sampler(run.pipe)
    shape = (*run.size, run.pipe.latent_channels)

    @jax.jit
    def draw(params, tokens, index):
        conditioning = denoiser.encode(params, tokens[None], run.size)
        of_run = jax.random.fold_in(jax.random.key(run.settings.seed), np.uint32(2**32 - 1))
        of_image = jax.random.fold_in(of_run, index)

        def noise(number):
            return jax.random.normal(jax.random.fold_in(of_image, number), shape)[None]

        states = sampler.rollout(
            lambda x, t: denoiser.predict(params, x, t, conditioning),
            sampler.start(noise(0)),
            lambda i: noise(i + 1),
        )
        return states.latents[-1, 0]

    return lambda params, batch, place: np.asarray(
        draw(params, batch["tokens"][place], batch["index"][place])
    )


@pytest.mark.ci
@pytest.mark.parametrize("changes", [{}, {"lora.rank": 2, "objective.name": "dspo"}], ids=["all", "lora"])
def test_the_loser_is_what_the_reference_draws_for_the_caption(changes, shallow_model, tiny_pairs):
    run = SelfPlayRun(shallow_model, tiny_pairs, changes)
    stream, draw = run.open(), make_draw(run)
    (of_data, following), policy = read_batches(tiny_pairs, batch_size=8, count=2), moved(run.params, 0.1)
    batch = jax.device_get(stream.next(policy))
    shapes = run.loss.input_shapes(run.pipe, 2, run.pipe.image_size)
    assert {name: (array.shape[1:], array.dtype) for name, array in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()
    }
    np.testing.assert_array_equal(batch["moments"][:, 0], of_data["moments"][:, 0])
    np.testing.assert_array_equal(batch["index"], of_data["index"])
    np.testing.assert_array_equal(batch["tokens"], of_data["tokens"])
    np.testing.assert_array_equal(batch["micro_conditioning"][:, 0], of_data["micro_conditioning"][:, 0])
    assert batch["micro_conditioning"][:, 1].tolist() == [[16, 16, 0, 0, 16, 16]] * 8
    assert np.all(batch["preference"] == 1)
    assert not np.any(batch["loser_won"])
    mean, deviation = np.split(batch["moments"][:, 1].astype(np.float32), 2, axis=-1)
    assert not np.any(deviation)
    for place in (0, 5):
        expected = draw(run.reference, of_data, place)
        np.testing.assert_allclose(mean[place], expected, atol=4e-3)
    # The reference moves: the next images are those of the policy.
    of_start = draw(run.reference, following, 3)
    move = MoveReference(run.reference, policy, every=2, decay=0.0)
    move(AfterStep(2, last=False), dataclasses.replace(run.state, params=policy), {})
    mean = np.split(jax.device_get(stream.next(run.params))["moments"][:, 1].astype(np.float32), 2, -1)[0]
    of_policy = draw(lora.combine(run.reference, policy), following, 3)
    np.testing.assert_allclose(mean[3], of_policy, atol=4e-3)
    assert np.abs(of_policy - of_start).max() > 0.05


@pytest.mark.ci
def test_a_mesh_and_a_resumed_stream_give_the_same_pairs(shallow_model, tiny_pairs):
    stream = SelfPlayRun(shallow_model, tiny_pairs).open()
    batches = [jax.device_get(stream.next({})) for _ in range(3)]
    # Other devices and another number of images at a time, from the second batch on.
    run = SelfPlayRun(shallow_model, tiny_pairs, {"stream.batch_size": 2}, {"data": 2})
    other = run.open()
    other.next({})
    state = other.get_state()
    other.close()
    resumed = run.open()
    resumed.set_state(state)
    for batch in batches[1:]:
        found = jax.device_get(resumed.next({}))
        for name, array in batch.items():
            # The programs round differently: within two steps of float16.
            tolerance = 4e-3 if name == "moments" else 0
            np.testing.assert_allclose(found[name], array, atol=tolerance, rtol=0, err_msg=name)


def test_single_images_are_winners(shallow_model, tmp_path):
    singles = tiny_model.write_pairs(tmp_path / "singles", shallow_model, images=1)
    batch = jax.device_get(SelfPlayRun(shallow_model, singles).open().next({}))
    assert batch["moments"].shape[1] == batch["micro_conditioning"].shape[1] == 2
    assert np.all(batch["preference"] == 1)


def test_where_a_drawn_image_is_not_finite_the_winner_stands_in_its_place(shallow_model, tiny_pairs):
    run = SelfPlayRun(shallow_model, tiny_pairs)
    stream = run.open()
    batch = shard_batch(read_batches(tiny_pairs, batch_size=8, count=1)[0], run.mesh)
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((8, *run.size, run.pipe.latent_channels)).astype(np.float32)
    drawn[2, 1, 1, 0], drawn[5, 0, 0, 0] = np.nan, 1e6  # too large for float16
    parts = [drawn[0::2], drawn[1::2]]  # as the stream cuts a batch
    pairs = jax.device_get(stream._pair(batch, shard_batch({"parts": parts}, run.mesh)["parts"]))
    mean, deviation = np.split(pairs["moments"], 2, axis=-1)
    winners = np.split(np.asarray(batch["moments"])[:, 0], 2, axis=-1)[0]
    assert not np.any(deviation[:, 1])
    for place in range(8):
        expected = winners[place] if place in (2, 5) else drawn[place].astype(np.float16)
        np.testing.assert_array_equal(mean[place, 1], expected)
