"""Runs on the model's own images: from the config to checkpoints, stopped between rounds and gone on with."""

import re

import numpy as np
import pytest
from tables import each_row, slow
from tiny_run import make_config, read_reproducible, saved_steps

from dspo_jax.conversion.export_model import export
from dspo_jax.monitoring.metrics import read_metrics, read_validations
from dspo_jax.rewards import Reward, load_reward
from dspo_jax.training.dry_run import dry_run
from dspo_jax.training.run import train
from dspo_jax.training.settings import parse
from dspo_jax.training.start import prepare

PROMPTS = ["a cat", "a dog", "a bird", "a red car", "a blue car", "a tree", "two trees", "a house"]
COMMON = {
    "stream.prompts": PROMPTS,
    "stream.num_inference_steps": 3,
    "stream.batch_size": 8,
    "batch_size": 8,
    "steps": 4,
    "checkpoint.every": 2,
    "log_every": 1,
}
KINDS = {
    "draft": {
        "stream.kind": "prompts",
        "rewards.train": "colourfulness",
        "reward_gradient.name": "alignprop",
    },
    "ddpo": {
        "stream.kind": "trajectories",
        "stream.updates": 2,
        "stream.images": 2,
        "rewards.train": "compressibility",
        "advantages.min_count": 2,
        "advantages.buffer_size": 4,
    },
    "grpo": {
        "stream.kind": "trajectories",
        "stream.images": 2,
        "rewards.train": "colourfulness,0.5*compressibility",
        "policy_gradient.name": "grpo",
        "advantages.of": "group",
        "lora.rank": 2,
    },
    "dpo": {
        "stream.kind": "own_pairs",
        "stream.updates": 2,
        "stream.images": 2,
        "rewards.train": "compressibility",
        "objective.name": "diffusion_dpo",
    },
    "rwr": {
        "stream.kind": "own_pairs",
        "stream.updates": 2,
        "stream.images": 4,
        "rewards.train": "compressibility",
        "objective.name": "rwr",
    },
    "raft": {
        "stream.kind": "own_pairs",
        "stream.images": 2,
        "rewards.train": "compressibility",
        "objective.name": "sft",
        "lora.rank": 2,
    },
    "dgpo": {
        "stream.kind": "own_pairs",
        "stream.updates": 2,
        "stream.images": 3,
        "stream.batch_size": 24,
        "rewards.train": "compressibility",
        "objective.name": "dgpo",
        "lora.rank": 2,
        "reference.every": 1,
        "reference.decay": 0.9,
    },
    # The reference follows the policy, at once and as an average.
    "iterated": {
        "stream.kind": "own_pairs",
        "stream.images": 2,
        "rewards.train": "compressibility",
        "objective.name": "diffusion_dpo",
        "lora.rank": 2,
        "reference.every": 2,
    },
    "averaged": {
        "stream.kind": "trajectories",
        "stream.images": 2,
        "rewards.train": "compressibility",
        "policy_gradient.name": "grpo",
        "advantages.of": "group",
        "reference.every": 1,
        "reference.decay": 0.9,
    },
}

# Kinds that keep nothing in a checkpoint that another one does not keep too.
SELDOM = ("grpo", "rwr", "raft", "dgpo")


def config_of(model, kind, **changes):
    return make_config(model, "", {**COMMON, **KINDS[kind], **changes})


@pytest.mark.ci
@pytest.mark.parametrize("kind", [slow(kind) if kind in SELDOM else kind for kind in KINDS])
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(kind, shallow_model, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(config_of(shallow_model, kind), whole).finished
    assert train(config_of(shallow_model, kind, steps=2), parts).finished
    assert train(config_of(shallow_model, kind), parts).finished
    assert saved_steps(whole) == saved_steps(parts) == [2, 4]
    assert (whole / "pins.json").read_text() == (parts / "pins.json").read_text()
    records = read_reproducible(whole)
    assert records == read_reproducible(parts)
    steps = [record for record in records if record["step"] > 0]
    assert all(np.isfinite(record["loss"]) and "reward" in record for record in steps)
    assert all(record["grad_norm"] > 0 for record in steps)
    speed = "pairs_per_second" if KINDS[kind]["stream.kind"] == "own_pairs" else "images_per_second"
    last = read_metrics(whole / "metrics.jsonl")[-1]
    assert [name for name in last if name.endswith("_per_second")] == [speed]
    if kind == "iterated":  # after it moved the reference is the policy again
        margins = [abs(record["margin"]) for record in steps]
        assert max(margins[0], margins[2]) < 1e-2 * min(margins[1], margins[3])
    if kind in ("ddpo", "grpo"):
        # The policy of the first update of a round is the one that drew.
        first = [record for record in steps if record["step"] % 2 == 1 or kind == "grpo"]
        assert all(record["ratio"] == pytest.approx(1, abs=1e-6) for record in first)
    if kind == "ddpo":
        assert any(record["ratio"] != 1 for record in steps if record["step"] % 2 == 0)


@pytest.mark.ci
def test_held_out_rewards_are_compared_with_those_of_the_start(shallow_model, tmp_path):
    changes = {
        "validation.every": 2,
        "rewards.prompts": ["a horse", "a cow"],
        "rewards.validation": ["compressibility"],
        "optimizer.learning_rate": 0.03,
        "lora.rank": 2,
    }
    outcome = train(config_of(shallow_model, "draft", **changes), tmp_path)
    found = read_validations(tmp_path / "metrics.jsonl")
    assert list(found) == [0, 2, 4]
    start = found[0]
    assert start["win_rate_colourfulness"] == start["win_rate_compressibility"] == 0.5
    assert start["prediction_drift"] == 0 < found[4]["prediction_drift"]
    assert start["score"] == start["reward_compressibility"]
    assert found[4]["reward_colourfulness"] != start["reward_colourfulness"]
    for scores in found.values():
        assert scores["win_rate_colourfulness_low"] <= scores["win_rate_colourfulness"]
        assert 0 <= scores["saturated"] <= 1
        assert scores["diversity"] > 0 == scores["unusable"]
    assert outcome.best == max((2, 4), key=lambda step: (found[step]["score"], -step))
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.ci
@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_tells_what_is_drawn_and_how_much_memory_a_step_takes(kind, shallow_model):
    said = "\n".join(dry_run(config_of(shallow_model, kind)))
    assert "its own images" in said
    assert "8 prompts" in said
    assert "3 steps of ddim, eta 1, guidance 5" in said
    assert "trained by" in said
    assert ("TFLOP a pair" if "pairs an update" in said else "TFLOP an image") in said
    # Latents of 4 x 4 x 4 float32 numbers, a state before and after each of 3 steps, on 8 devices.
    of_rounds = (
        "{} rounds of {} images, {} update(s) with each; their states in float32 are {} on each device"
    )
    kept = {
        "draft": "are kept for the backward pass: 768 B on each device",
        "ddpo": of_rounds.format(2, 16, 2, "2 KiB"),
        "grpo": of_rounds.format(4, 8, 1, "1 KiB"),
        "dpo": of_rounds.format(2, 32, 2, "1 KiB"),
    }
    assert kept.get(kind, "") in said
    own = "a prompt has the 2 rewards of its own statistics after 1 round(s) on average"
    assert (own in said) == (kind == "ddpo")
    assert " to train by it; " in said or "drawn and trained by; " in said
    programs = ["the step"] if kind == "draft" else ["the step", "drawing"]
    assert re.findall(r"^(.*) compiles in \d+ s$", said, re.MULTILINE) == programs
    assert said.count("at the peak") == len(programs)


@each_row(
    ("kind", "changes", "message"),
    [
        ("ddpo", {"stream.eta": 0.0}, "config.stream.eta = 0: .*no density"),
        ("grpo", {"stream.eta": 0.0}, "config.stream.eta = 0: .*no density"),
        (
            "ddpo",
            {"stream.eta": 0.0, "policy_gradient.name": "d3po"},
            "config.stream.eta = 0: .*no density.*must be above 0",
        ),
        ("draft", {"rewards.train": "compressibility"}, "reward compressibility: has no gradient: .*ddpo"),
        ("draft", {"stream.sampler": "dpmpp_2m"}, "config.stream.sampler = 'dpmpp_2m': .*allowed: ddim,"),
        ("ddpo", {"stream.sampler": "dpmpp_2m"}, "config.stream.sampler = 'dpmpp_2m': .*allowed: ddim,"),
        ("dpo", {"stream.sampler": "pndm"}, "config.stream.sampler = 'pndm': .*allowed: ddim,"),
        ("ddpo", {"steps": 3}, "config.steps = 3: must be a multiple of config.stream.updates = 2"),
        ("dpo", {"checkpoint.every": 3}, "config.checkpoint.every = 3: must be a multiple"),
        ("ddpo", {"policy_gradient.name": "ddpo_sf"}, "config.stream.updates = 2: .*ddpo_sf"),
        ("grpo", {"stream.images": 1}, "config.stream.images = 1: .*at least 2"),
        ("dpo", {"stream.images": 1}, "config.stream.images = 1: .*at least 2"),
        ("rwr", {"stream.images": 1}, "config.stream.images = 1: .*at least 2"),
        ("rwr", {"stream.images": 3}, "config.stream.images = 3: 'rwr' .*even number"),
        ("rwr", {"stream.kind": "dataset"}, "config.objective.name = 'rwr': .*stream.kind=own_pairs"),
        ("rwr", {"stream.kind": "self_play"}, "config.objective.name = 'rwr': .*stream.kind=own_pairs"),
        ("raft", {"reference.every": 2}, "config.reference.every = 2: 'sft' reads no reference"),
        ("ddpo", {"advantages.min_count": 100}, "config.advantages.min_count"),
        ("dpo", {"rewards.train": "pickscore"}, "reward pickscore: no weights in rewards"),
        ("draft", {"reference.every": 1}, "config.reference.every = 1: 'alignprop' reads no reference"),
        (
            "averaged",
            {"reference_dtype": "bfloat16", "compute_dtype": "bfloat16"},
            "config.reference.decay = 0.9",
        ),
        ("grpo", {"advantages.of": "prompt"}, "config.advantages.of = 'prompt': policy gradient 'grpo'"),
        ("dpo", {"epochs": 2.0}, "config.epochs: "),
        ("ddpo", {"rewards.train": "0*compressibility"}, "reward compressibility: its weight is 0"),
        ("ddpo", {"stream.images": 3}, "config.stream.images = 3: must divide the 16 images"),
        ("draft", {"stream.num_inference_steps": 5000}, "config.stream.num_inference_steps = 5000"),
        ("ddpo", {"seed": -1}, "config.seed = -1: must be between 0"),
        ("draft", {"stream.batch_size": 4}, "config.stream.batch_size = 4"),
        (
            "ddpo",
            {"stream.sampler": "ddpm", "stream.num_inference_steps": 1},
            "config.stream.num_inference_steps = 1: the last step of ddpm .*at least 2",
        ),
        (
            "ddpo",
            {"timesteps.last": 300},
            "config.timesteps.last = 300: is of noised examples, .*'trajectories'",
        ),
        (
            "draft",
            {"timesteps.first": 300},
            "config.timesteps.first = 300: is of noised examples, .*'prompts'",
        ),
        ("ddpo", {"levels.shift": 3.0}, "config.levels.shift = 3.0: is of noised examples, .*'trajectories'"),
        (
            "dpo",
            {"data.curriculum_groups": 2},
            "config.data.curriculum_groups = 2: .*'own_pairs' draws images",
        ),
        ("dpo", {"reference.decay": 0.9}, "config.reference.decay = 0.9: .*config.reference.every = 0"),
        ("draft", {"reference.decay": 0.9}, "config.reference.decay = 0.9: .*config.reference.every = 0"),
        ("draft", {"rewards.train": "colourfulness,"}, "config.rewards.train = 'colourfulness,': .*unknown"),
        (
            "ddpo",
            {"rewards.train": "compresibility"},
            "config.rewards.train = .*did you mean 'compressibility'",
        ),
        ("draft", {"rewards.train": "0*colourfulness"}, "config.rewards.train = .*its weight is 0"),
        ("dpo", {"rewards.validation": ["nope"]}, r"config.rewards.validation = \['nope'\]: .*unknown"),
        ("dpo", {"rewards.validation": ["colourfulness"] * 2}, "config.rewards.validation = .*stands twice"),
        (
            "draft",
            {"reward_gradient.name": "draft", "reward_gradient.k": 1.0},
            "leave config.reward_gradient.k unset",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_weights_are_read(kind, changes, message, shallow_model):
    with pytest.raises((ValueError, OSError), match=message) as error:
        prepare(config_of(shallow_model, kind, **changes))
    assert "\n" not in str(error.value)


# Some images of the second round, and of those after it, have no reward.
# A run tries the function once before it starts.
UNSURE = """
asked = -1

def unsure(images, prompts):
    global asked
    asked += 1
    missing = lambda i: asked > {of_a_round} and i % 4 in {missing}
    return [float("nan") if missing(i) else image.mean() for i, image in enumerate(images)]
"""


@pytest.mark.ci
@pytest.mark.parametrize(("kind", "images"), [("ddpo", 16), ("dpo", 32)])
def test_images_that_lose_their_reward_in_the_middle_are_left_out_or_end_the_run(
    kind, images, shallow_model, tmp_path
):
    def run(name, missing):
        file = tmp_path / f"{name}.py"
        file.write_text(UNSURE.format(of_a_round=images // 8, missing=missing))
        train(config_of(shallow_model, kind, **{"rewards.train": f"{file}:unsure"}), tmp_path / name)

    run("some", [0])
    steps = [record for record in read_reproducible(tmp_path / "some") if record["step"] > 0]
    assert [record["unusable_images"] for record in steps] == [0, 0, images / 4, images / 4]
    assert all(np.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in steps)
    assert not any(record["skipped"] for record in steps)
    if kind == "dpo":  # the first image of every second prompt
        assert [record["replaced_pairs"] for record in steps] == [0, 0, 8, 8]

    expected = rf"^round 1: {images * 3 // 4} of {images} images have no reward, 0 .* config\.rewards\.train"
    with pytest.raises(ValueError, match=expected) as error:
        run("most", [0, 1, 2])
    assert "\n" not in str(error.value)
    assert saved_steps(tmp_path / "most") == [2]


SELF_PLAY = {
    "stream.kind": "self_play",
    "stream.num_inference_steps": 3,
    "stream.batch_size": 8,
    "objective.name": "diffusion_dpo",
    "reference.every": 2,
    "steps": 4,
    "checkpoint.every": 1,
}


@pytest.mark.ci
@pytest.mark.parametrize("rank", [0, slow(2)])
def test_self_play_goes_on_in_the_middle_of_an_iteration(rank, shallow_model, tiny_pairs, tmp_path):
    changes = SELF_PLAY | {"lora.rank": rank, "validation.every": 2, "validation.draws": 2}
    changes |= {"validation.batch_size": 8, "checkpoint.max_to_keep": 9}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(make_config(shallow_model, tiny_pairs, changes), whole).finished
    for steps in (1, 3, 4):
        assert train(make_config(shallow_model, tiny_pairs, changes | {"steps": steps}), parts).finished
    assert saved_steps(whole) == saved_steps(parts) == [1, 2, 3, 4]
    # The last step of each part is validated, too.
    records = [
        [
            {key: value for key, value in record.items() if not key.startswith("validation/")}
            for record in read_reproducible(folder)
            if "loss" in record
        ]
        for folder in (whole, parts)
    ]
    assert records[0] == records[1]
    losses = [record["loss"] for record in records[0]]
    # In the first update of an iteration the policy is the reference.
    assert np.isclose(losses, np.log(2), atol=1e-3).tolist() == [True, False, True, False]
    export(whole, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The losers are images that the reference drew." in card
    assert "| reference.every | 2 |" in card
    assert f"| name | {tiny_pairs.name} |" in card


def test_a_dry_run_of_self_play_tells_what_the_reference_draws(shallow_model, tiny_pairs):
    said = "\n".join(dry_run(make_config(shallow_model, tiny_pairs, SELF_PLAY)))
    assert "32 images that the reference draws, each by 3 steps of ddim, eta 1, guidance 5" in said
    assert "it moves every 2 steps" in said
    assert "at the peak" in said


@each_row(
    ("changes", "message"),
    [
        ({"reference.every": 0}, "config.reference.every = 0: in self-play .*reference.every=500"),
        ({"objective.name": "sft"}, "config.objective.name = 'sft': does not compare"),
        ({"objective.name": "dspo_e"}, "config.objective.name = 'dspo_e': does not compare"),
        ({"stream.batch_size": 16, "batch_size": 24}, "config.stream.batch_size = 16: must divide the 24"),
        ({"stream.num_inference_steps": 5000}, "config.stream.num_inference_steps = 5000"),
        ({"data.path": None}, "config.data.path is not set"),
    ],
)
def test_self_play_that_compares_nothing_is_refused(changes, message, shallow_model, tiny_pairs):
    with pytest.raises((ValueError, OSError), match=message):
        prepare(make_config(shallow_model, tiny_pairs, SELF_PLAY | changes))


def test_the_method_is_that_of_the_kind(shallow_model):
    methods = {kind: parse(config_of(shallow_model, kind)).method for kind in KINDS}
    assert methods["draft"] == "alignprop"
    assert methods["averaged"] == "grpo"
    assert methods["dpo"] == "diffusion_dpo"


def test_one_reward_keeps_its_weight_and_a_sum_its_units(shallow_model):
    images, prompts = [np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), (255, 0, 0), np.uint8)], ["", ""]
    small, red = load_reward("compressibility"), load_reward("colourfulness")
    alone = prepare(config_of(shallow_model, "ddpo", **{"rewards.train": "-1*compressibility"})).own_images
    np.testing.assert_allclose(alone.score(images, prompts), -small.score(images, prompts), rtol=1e-6)
    both = prepare(config_of(shallow_model, "grpo")).own_images
    expected = red.score(images, prompts) / 18 + 0.5 * small.score(images, prompts)
    np.testing.assert_allclose(both.score(images, prompts), expected, rtol=1e-6)


@pytest.mark.ci
def test_a_function_of_ones_own_is_trained_and_watched(shallow_model, tmp_path):
    (tmp_path / "mine.py").write_text("def red(images):\n    return images[..., 0].mean((1, 2))\n")
    changes = {"rewards.train": f"{tmp_path / 'mine.py'}:red", "rewards.prompts": ["a horse"], "steps": 2}
    train(config_of(shallow_model, "draft", **changes, **{"validation.every": 2}), tmp_path / "run")
    found = read_validations(tmp_path / "run" / "metrics.jsonl")
    assert found[2]["score"] == found[2]["reward_red"]
    assert 0 < found[2]["reward_red"] < 1


@pytest.mark.ci
@pytest.mark.parametrize("method", ["ddpo", "dpok"])
def test_advantages_are_in_the_units_of_the_method(method, shallow_model, tmp_path):
    """DPOK weighs with the reward less its mean; the others with that over its deviation."""
    changes = {"policy_gradient.name": method, "advantages.of": "round", "stream.updates": 1, "steps": 1}
    train(config_of(shallow_model, "ddpo", **changes, **{"checkpoint.every": 1}), tmp_path)
    (record,) = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["step"] == 1]
    assert 0 < record["advantage"] <= (1.0 if method == "ddpo" else record["reward_std"])


@pytest.mark.ci
@pytest.mark.parametrize(
    ("kind", "method"), [("draft", "alignprop"), ("ddpo", "ddpo"), ("dpo", "diffusion_dpo")]
)
def test_a_run_is_exported_with_a_card_of_its_method(kind, method, shallow_model, tmp_path):
    changes = {"steps": 2, "validation.every": 2, "rewards.prompts": ["a horse"]}
    train(config_of(shallow_model, kind, **changes), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"after 2 steps of `{method}`" in card
    assert f".name | {method} |" in card
    assert "The model's own images." in card
    assert f"| rewards.train | {KINDS[kind]['rewards.train']} |" in card
    assert "| held-out " in card


def test_scores_that_are_none_are_refused_by_the_name_of_the_reward():
    images, prompts = [np.zeros((4, 4, 3), np.uint8)] * 2, ["", ""]
    for given, message in ((["a", "b"], "reward mine: gave .*number"), ([1.0], r"shape \[1\] for 2 images")):
        reward = Reward("mine", "", lambda images, prompts, given=given: given)
        with pytest.raises(ValueError, match=message):
            reward.score_or_nan(images, prompts)
    some = Reward("mine", "", lambda images, prompts: [1, float("nan")]).score_or_nan(images, prompts)
    assert some[0] == 1
    assert np.isnan(some[1])
