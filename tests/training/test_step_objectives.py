"""What a training step runs, and gives, for every objective; with a network that compiles in a moment."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_task import make_batch, make_reference, make_state, make_task

from dspo_jax.training.losses.preference import draw_noise
from dspo_jax.training.step import train_step

GOLDEN = Path(__file__).parents[1] / "golden" / "objectives_step.json"

# The strengths put the sigmoids where they bend, and show more than SFT.
OBJECTIVES = {
    "ddpm": {},
    "sft": {},
    "diffusion_dpo": {"beta": 10.0},
    "diffusion_dpo_l2": {"beta": 10.0},
    "sdpo": {"beta": 10.0},
    "ipo": {"beta": 2.0},
    "dmpo": {"beta": 10.0},
    "alpha_dpo": {"beta": 10.0},
    "hinge": {"beta": 10.0},
    "linear_dpo": {"beta": 10.0},
    "diffusion_rpo": {"beta": 50.0},
    "npo": {"beta": 10.0},
    "orpo": {},
    "kto": {"beta": 5.0},
    "nft": {},
    "awm": {"clip": 0.2},
    "lpo_list": {"beta": 10.0},
    "dgpo": {"beta": 10.0, "clip": 0.2},
    "crd": {"beta": 1.0},
    "mapo": {"scale": 10.0},
    "dspo": {"reward_scale": 10.0, "score_weight": 1.0},
    "dspo_ref": {"reward_scale": 10.0, "score_weight": 1.0},
    "dspo_e": {"score_weight": 0.5},
    "dspo_sdxl": {"beta": 10.0},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_step_gives_the_golden_metrics(name, request):
    """From a reference other than the start, so that no metric is zero."""
    task = make_task(name, **OBJECTIVES[name])
    state, metrics = train_step(
        make_state(task), make_reference(task, seed=1), make_batch(), jax.random.key(0)
    )
    before = make_state(task).params
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, state.params)))
    actual = {key: float(value) for key, value in sorted(metrics.items())}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(json.dumps({**golden, name: actual}, indent=2, sort_keys=True) + "\n")
        return
    assert actual == pytest.approx(golden.get(name, {}), rel=2e-5), (
        f"one {name} step does not give the metrics in {GOLDEN.name}. If your change was meant to alter "
        "them: pytest -k golden --regenerate-golden tests/training/test_step_objectives.py; say why in the "
        "commit"
    )


# In forward passes of one image of each pair; a backward pass is two of them.
COSTS = [
    ("ddpm", {}, 6),  # policy: two images there and back
    ("sft", {}, 3),  # no loser
    ("dspo_e", {}, 3 + 1),  # no loser, with a reference
    ("kto", {}, 3 + 1),  # one image of the pair
    ("mapo", {}, 6),  # no reference
    ("diffusion_dpo", {}, 6 + 2),
    ("dspo", {}, 6 + 2),
    ("dspo", {"detach": True}, 3 + 1 + 2),  # the loser forward only
]


def test_a_step_costs_what_its_objective_reads():
    """FLOPs of the compiled step."""

    def flops(name, hyperparameters):
        task = make_task(name, **hyperparameters)
        arguments = make_state(task), make_reference(task), make_batch(), jax.random.key(0)
        return jax.jit(train_step).lower(*arguments).compile().cost_analysis()["flops"]

    counted = {(name, bool(given)): flops(name, given) for name, given, _ in COSTS}
    unit = counted["sft", False] / 3
    for name, given, passes in COSTS:
        assert counted[name, bool(given)] / unit == pytest.approx(passes, rel=0.06), name


def test_mapo_neither_holds_nor_runs_a_reference():
    task = make_task("mapo")
    assert set(make_reference(task)) == {"text_encoder"}
    _, metrics = train_step(make_state(task), make_reference(task), make_batch(), jax.random.key(0))
    assert {"margin", "implicit_accuracy", "winner_error", "loser_error"} < set(metrics)
    assert not {"winner_drift", "deviation"} & set(metrics)


def test_detaching_does_not_change_the_value_and_leaves_the_gradient_of_the_winner():
    results = []
    for detach in (False, True):
        # At the reference the gradient through G is zero, so that the two agree there.
        task = make_task("dspo", reward_scale=10.0, score_weight=1.0, detach=detach)
        results.append(train_step(make_state(task), make_reference(task), make_batch(), jax.random.key(0)))
    for one, other in zip(
        *(jax.tree.leaves((state.params, metrics)) for state, metrics in results), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_the_winner_is_noised_alike_whatever_is_run_of_the_pair():
    batch, key = make_batch(), jax.random.key(0)
    *drawn, _ = draw_noise(make_task("sft").loss.draws, batch, key)
    (latents, noise, timesteps), preference = make_task("sft").loss.choose_images(batch, key, drawn)
    for chosen, full in zip((latents, noise, timesteps), drawn, strict=True):
        np.testing.assert_array_equal(chosen, full[:, :1])
    np.testing.assert_array_equal(preference, batch["preference"])
    (whole, *_), _ = make_task("dspo").loss.choose_images(batch, key, drawn)
    np.testing.assert_array_equal(whole, drawn[0])


def test_kto_draws_one_labelled_image_of_each_pair():
    loss, key, count = make_task("kto").loss, jax.random.key(3), 4000
    batch = {
        "moments": jnp.zeros((count, 2)),
        "index": jnp.arange(count, dtype=jnp.uint32),
        "preference": jnp.full(count, 0.9),
        "loser_won": jnp.arange(count) % 2 == 1,
    }
    image = jnp.broadcast_to(jnp.arange(2.0), (count, 2))
    chosen, liked = loss.choose_images(batch, key, image)
    assert chosen.shape == (count, 1)
    drawn = np.asarray(chosen[:, 0])
    # The winner is liked with the probability of the label, the loser with what is left, or for what it won.
    expected = np.where(drawn == 0, 0.9, np.where(batch["loser_won"], 1.0, 0.1))
    np.testing.assert_allclose(liked, expected, rtol=1e-6)
    assert abs((drawn == 0).mean() - 0.8) < 4 * np.sqrt(0.8 * 0.2 / count)
    # By the example, not by its place in the batch.
    order = np.array([7, 3, 3999])
    part = {name: values[order] for name, values in batch.items()}
    again, _ = loss.choose_images(part, key, image[order])
    np.testing.assert_array_equal(again[:, 0], drawn[order])
    always_winner = dataclasses.replace(loss, draws=dataclasses.replace(loss.draws, positive_ratio=1.0))
    always, _ = always_winner.choose_images(batch, key, image)
    assert not always.any()


def test_a_step_on_scored_lists_and_on_labelled_images():
    """Four images of each prompt; the scores reach the objective, in their order."""
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    for name in ("nft", "awm", "lpo_list", "dgpo", "crd"):
        task = make_task(name, **OBJECTIVES[name])
        given = make_state(task), make_reference(task, seed=1)
        losses = [
            train_step(*given, make_batch(images=4) | batch, jax.random.key(0))[1]["loss"]
            for batch in ({"scores": scores}, {"scores": -scores}, {"scores": 3 * scores + 1})
        ]
        assert losses[0] != losses[1], name
        np.testing.assert_allclose(losses[0], losses[2], rtol=1e-5, err_msg=name)
    _, metrics = train_step(
        make_state(make_task("nft")),
        make_reference(make_task("nft"), seed=1),
        make_batch(images=1),
        jax.random.key(0),
    )
    assert {"error", "drift", "deviation", "liked"} < set(metrics)


def test_single_images_are_taken_as_they_are():
    batch = make_batch(images=1)
    for name in ("sft", "dspo_e", "kto", "ddpm"):
        loss = make_task(name).loss
        moments, preference = loss.choose_images(batch, jax.random.key(0), batch["moments"])
        np.testing.assert_array_equal(moments, batch["moments"])
        np.testing.assert_array_equal(preference, batch["preference"])
