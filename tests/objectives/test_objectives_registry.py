"""The registry of objectives: what it refuses and in which words, and what an objective says of itself."""

import dataclasses
import json
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import objectives_numpy
import pytest
from jaxtyping import TypeCheckError
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.objectives import Predictions, dpo, get_objective, registry
from dspo_jax.schedules.variance_preserving import Schedule
from dspo_jax.spelling import OBJECTIVE_ALIASES

OF_PAIRS = (
    *("diffusion_dpo", "diffusion_dpo_l2", "sdpo", "ipo", "dmpo", "alpha_dpo", "hinge", "linear_dpo"),
    *("diffusion_rpo", "npo"),
    *("dspo", "dspo_ref", "dspo_sdxl"),
)
OF_LISTS = ("lpo_list", "dgpo", "crd")
PAIRWISE = (*OF_PAIRS, *OF_LISTS, "mapo", "orpo")
OF_LABELS = ("kto", "nft", "awm")
WITH_REFERENCE = (*OF_PAIRS, *OF_LISTS, *OF_LABELS, "dspo_e")
OBJECTIVES = ("ddpm", "sft", "rwr", "dspo_e", *OF_LABELS, *PAIRWISE)
SHAPE = (4, 2, 3, 2, 2)  # B, P, h, w, C


@pytest.fixture(scope="module")
def pairs():
    policy, reference, target = jnp.asarray(np.random.default_rng(0).normal(size=(3, *SHAPE)), jnp.float32)
    return Predictions(policy, reference, target, jnp.array([0, 20, 500, 999]), jnp.ones(SHAPE[0]))


@each_row("name", WITH_REFERENCE)
def test_missing_reference_is_one_clear_error(name, pairs):
    with pytest.raises(ValueError, match=f"'{name}' .* reference model: Predictions.reference is None"):
        get_objective(name)(dataclasses.replace(pairs, reference=None), Schedule.scaled_linear())


def test_missing_weights_are_one_clear_error(pairs):
    with pytest.raises(ValueError, match=r"'rwr' weighs .* rewards: Predictions\.weight is None"):
        get_objective("rwr")(pairs, Schedule.scaled_linear())


def test_missing_captions_are_one_clear_error(pairs):
    with pytest.raises(
        ValueError, match=r"'diffusion_rpo' weighs .* captions: Predictions\.captions is None"
    ):
        get_objective("diffusion_rpo")(pairs, Schedule.scaled_linear())


@each_row("name", PAIRWISE)
def test_missing_loser_is_one_clear_error(name, pairs):
    objective, schedule = get_objective(name), Schedule.scaled_linear()
    winners = jax.tree.map(lambda array: array[:, :1] if array.ndim == 5 else array, pairs)
    with pytest.raises(ValueError, match=rf"'{name}' .* one image per example \(P = 1\)"):
        objective(winners, schedule)


@each_row(
    ("field", "shape", "message"),
    [
        ("policy", (4, 3, 2, 2), r"Predictions.policy has shape \(4, 3, 2, 2\)"),
        ("policy", (4, 0, 3, 2, 2), r"Predictions.policy has shape \(4, 0, 3, 2, 2\)"),
        ("reference", (4, 2, 2, 3, 2), r"Predictions.reference has shape \(4, 2, 2, 3, 2\)"),
        ("target", (1, 2, 3, 2, 2), r"Predictions.target has shape \(1, 2, 3, 2, 2\)"),
        ("levels", (8,), r"Predictions.levels has shape \(8,\)"),
        ("preference", (4, 1), r"Predictions.preference has shape \(4, 1\)"),
        ("weight", (4,), r"Predictions.weight has shape \(4,\)"),
        ("captions", (3, 5), r"Predictions.captions has shape \(3, 5\)"),
    ],
)
def test_wrong_shape_is_refused_by_field(field, shape, message, pairs):
    wrong = jnp.zeros(shape, jnp.int32 if field == "levels" else jnp.float32)
    predictions = dataclasses.replace(pairs, **{field: wrong})
    with pytest.raises(ValueError, match=message):
        get_objective("dspo")(predictions, Schedule.scaled_linear())


@each_row(
    ("name", "given", "message"),
    [
        (
            "dpso",
            {},
            r"^config\.objective\.name = 'dpso': unknown; did you mean 'dspo'\?.*ddpm, .*, sft",
        ),
        ("", {}, r"^config\.objective\.name = '': unknown"),
        (
            "diffusion_dpo",
            {"bata": 1.0},
            r"argument of objective 'diffusion_dpo' = 'bata': .*did you mean 'beta'\?",
        ),
        ("dspo", {"lambda": 1.0}, r"argument of objective 'dspo' = 'lambda': .*did you mean 'lam'\?"),
        (
            "sft",
            {"detach": True},
            r"argument of objective 'sft' = 'detach': .*allowed: min_snr_gamma, reduction, time_weight",
        ),
        ("dspo", {"reduction": "men"}, r"config\.objective\.reduction = 'men': .*did you mean 'mean'\?"),
        ("dspo", {"time_weight": None}, r"config\.objective\.time_weight = 'None': .*none, paper"),
        ("dspo", {"detach": 1}, r"config\.objective\.detach = 1: must be True or False"),
        ("dspo", {"lam": None}, r"config\.objective\.lam = None: must be a finite number"),
        ("dspo", {"gamma": -1.0}, r"config\.objective\.gamma = -1\.0: .*zero or above"),
        ("diffusion_dpo", {"beta": float("inf")}, r"config\.objective\.beta = inf: must be a finite number"),
        ("diffusion_dpo", {"beta": 0.0}, r"config\.objective\.beta = 0\.0: .*above zero"),
        ("dmpo", {"alpha": 0.0}, r"config\.objective\.alpha = 0\.0: .*above 0 and below 1"),
        ("dmpo", {"alpha": 1.0}, r"config\.objective\.alpha = 1\.0: .*above 0 and below 1"),
        ("mapo", {"kappa": 0.0}, r"config\.objective\.kappa = 0\.0: .*above zero"),
        ("sft", {"min_snr_gamma": 0.0}, r"config\.objective\.min_snr_gamma = 0\.0: .*above zero"),
        (
            "ddpm",
            {"min_snr_gamma": 5.0, "time_weight": "paper"},
            r"^config\.objective\.min_snr_gamma = 5\.0: .*config\.objective\.time_weight = 'paper'$",
        ),
        (
            "hinge",
            {"min_snr_gamma": 5.0, "time_weight": "paper"},
            r"^config\.objective\.min_snr_gamma = 5\.0: .*config\.objective\.time_weight = 'paper'$",
        ),
        ("mapo", {"sft_weight": 1.0}, r"argument of objective 'mapo' = 'sft_weight': unknown"),
        ("hinge", {"anchor_weight": -1.0}, r"config\.objective\.anchor_weight = -1\.0: .*zero or above"),
        ("dspo", {"min_snr_gamma": 5.0}, r"argument of objective 'dspo' = 'min_snr_gamma': unknown"),
        ("rwr", {"softmax_over": "promt"}, r"config\.objective\.softmax_over = 'promt': .*'prompt'"),
        ("hinge", {"smpo_weight": 1.0}, r"argument of objective 'hinge' = 'smpo_weight': unknown"),
        ("awm", {"clip": 1.5}, r"config\.objective\.clip = 1\.5: .*above 0 and at most 1"),
        ("sdpo", {"mu": 1.5}, r"config\.objective\.mu = 1\.5: .*between 0 and 1"),
        ("dspo_e", {"detach": True}, r"'dspo_e' = 'detach': .*allowed: gamma, lam, reduction, score_weight"),
        ("mapo", {"beta": 1.0}, r"argument of objective 'mapo' = 'beta': .*kappa, margin_weight"),
        ("diffusion_dpo", {"beta": "5000"}, r"config\.objective\.beta = '5000': must be a finite number"),
        ("diffusion_dpo", {"beta": True}, r"config\.objective\.beta = True: must be a finite number"),
    ],
)
def test_get_objective_refuses_in_one_line(name, given, message):
    with pytest.raises(ValueError, match=message) as error:
        get_objective(name, **given)
    assert "\n" not in str(error.value)


def test_an_objective_says_what_it_is():
    objective = get_objective("dspo", gamma=2, score_weight=0.3)
    assert objective.name == "dspo"
    assert set(registry.OBJECTIVES) == set(OBJECTIVES)
    assert objective.hyperparameters == {
        "lam": 0.001,
        "gamma": 2,
        "reward_scale": None,
        "score_weight": 0.3,
        "detach": False,
        "sft_weight": 0.0,
        "anchor_weight": 0.0,
        "reduction": "mean",
        "time_weight": "none",
    }
    json.dumps(objective.hyperparameters)
    needs = {
        name: (get_objective(name).needs_reference, get_objective(name).needs_loser) for name in OBJECTIVES
    }
    assert needs == {name: (name in WITH_REFERENCE, name in PAIRWISE) for name in OBJECTIVES}
    images = {name: get_objective(name).images for name in OBJECTIVES}
    assert images == dict.fromkeys(OBJECTIVES, "all") | {"sft": "winner", "dspo_e": "winner", "kto": "one"}
    detached = {"dspo": True, "dspo_ref": True}
    of_the_batch = {"alpha_dpo", "diffusion_rpo", "kto"}
    assert {name for name in OBJECTIVES if get_objective(name).needs_whole_batch} == of_the_batch
    assert get_objective("dspo_sdxl", released_switch=True).needs_whole_batch
    assert {name for name in OBJECTIVES if get_objective(name).needs_labels} == set(OF_LABELS)
    assert {name for name in OBJECTIVES if get_objective(name).takes_lists} == {*OF_LISTS, "nft", "awm"}
    for name in OBJECTIVES:
        assert not get_objective(name).detaches_loser
        if name in detached:
            assert get_objective(name, detach=True).detaches_loser
            assert not get_objective(name, detach=True, anchor_weight=0.1).detaches_loser
    assert get_objective("diffusion_dpo").hyperparameters["beta"] == 5000


def test_equal_objectives_share_a_compiled_step(pairs):
    traces = []

    def step(objective, predictions, schedule):
        traces.append(objective)
        return objective(predictions, schedule)[0]

    compiled = jax.jit(step, static_argnums=0)
    for beta in (10.0, 10.0, 20.0):
        compiled(get_objective("diffusion_dpo", beta=beta), pairs, Schedule.scaled_linear())
    assert [objective.hyperparameters["beta"] for objective in traces] == [10.0, 20.0]


@each_row("given", [{"beta": 5000.0}, {"beta": 5000 / (4 * 64 * 64), "reduction": "sum"}])
def test_notes_give_beta_in_every_convention(given):
    (note,) = get_objective("diffusion_dpo", **given).notes(4 * 64 * 64)
    assert note.startswith(
        f"diffusion_dpo: beta = {given['beta']:g} ({given.get('reduction', 'mean')}, with 1/2)"
    )
    assert "5000 (mean, with 1/2) = 2500 (mean, without 1/2)" in note
    assert "0.305176 (sum, with 1/2) = 0.152588 (sum, without 1/2)" in note


@each_row("reduction", ["mean", "sum"])
def test_conventions_in_the_notes_are_equivalent(reduction, pairs):
    """The same loss from the other reduction at the beta that the note names."""
    values = int(np.prod(SHAPE[2:]))
    beta, other = (3.0, 3.0 / values) if reduction == "mean" else (0.25, 0.25 * values)
    objective = get_objective("diffusion_dpo", beta=beta, reduction=reduction)
    other_reduction = "sum" if reduction == "mean" else "mean"
    assert f"{other:g} ({other_reduction}, with 1/2)" in objective.notes(values)[0]
    equivalent = get_objective("diffusion_dpo", beta=other, reduction=other_reduction)
    losses = [o(pairs, Schedule.scaled_linear())[0] for o in (objective, equivalent)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@each_row(
    ("given", "warned"),
    [
        ({}, True),
        ({"reduction": "sum"}, True),
        ({"lam": 0.05}, False),
        ({"score_weight": 0.5}, False),
        ({"reward_scale": 5000.0}, False),  # the gradient through G is then no longer small
        ({"reward_scale": 5000.0, "detach": True}, True),
        ({"gamma": 0.0}, True),
        ({"score_weight": 1.99}, False),
    ],
)
def test_dspo_warns_when_it_is_numerically_sft(given, warned):
    notes = get_objective("dspo", **given).notes(4 * 64 * 64)
    assert notes[0].startswith("dspo: reward_scale = ")
    warnings = [note for note in notes if note.startswith("warning: ")]
    assert len(warnings) == warned
    assert all("numerically SFT" in warning for warning in warnings)


@each_row(
    ("name", "given", "warning"),
    [
        ("dspo", {"score_weight": 2.0}, "1 - s * G = 0 times that of SFT, which is zero; .* below 2"),
        ("dspo", {"lam": 3.0}, "1 - s * G = -0.5 times that of SFT, which is reversed"),
        ("dspo_e", {}, "coefficient s is at most score_weight = 0.001, .* numerically SFT"),
        ("dspo_e", {"score_weight": 1.0}, "1 - s = 0 times that of SFT, which is zero; .* below 1"),
        ("dspo_e", {"score_weight": 0.5}, None),
        ("dspo_ref", {"score_weight": 1.0}, "loss and gradient are exactly zero where the policy equals"),
        ("diffusion_dpo_l2", {}, "gradient is exactly zero where the policy equals the reference"),
        ("dmpo", {}, None),
        ("dmpo", {"alpha": 0.5}, "gradient at the start is zero"),
        ("dmpo", {"alpha": 0.9}, "gradient at the start is reversed"),
        ("mapo", {}, None),
        ("mapo", {"margin_weight": 0.0}, "this run is SFT"),
        ("mapo", {"reduction": "sum"}, "the preference term has no gradient"),
        ("kto", {}, None),
        ("awm", {}, None),
        ("awm", {"reduction": "sum"}, "no gradient where that is above 4.2e-05, .* above 0.0012"),
        ("ipo", {}, None),
        ("sdpo", {}, None),
        ("dspo_sdxl", {}, None),
        ("alpha_dpo", {}, None),
        ("hinge", {}, None),
        ("linear_dpo", {}, None),
        ("diffusion_rpo", {}, None),
        ("npo", {}, "what people dislike, so implicit_accuracy falls"),
        ("orpo", {}, None),
        ("orpo", {"beta": 0.0}, "this run is SFT"),
    ],
)
def test_warnings_of_a_term_that_does_nothing(name, given, warning):
    notes = get_objective(name, **given).notes(4 * 64 * 64)
    warnings = [note for note in notes if note.startswith(f"warning: {name}: ")]
    assert len(warnings) == sum("warning" in note for note in notes) == (warning is not None)
    if warning is not None:
        assert re.search(warning.replace("*", r"\*").replace(r".\*", ".*"), warnings[0])
    assert all("\n" not in note for note in notes)


def test_the_warning_of_a_zero_gradient_is_true(pairs):
    """At e = r and s G = 1, where the formula in the warning says that nothing is learned."""
    schedule = Schedule.scaled_linear()
    for name, weight in (("dspo", 2.0), ("dspo_e", 1.0)):
        objective = get_objective(name, score_weight=weight)

        def total(policy, objective=objective):
            return objective(dataclasses.replace(pairs, policy=policy), schedule)[0].sum()

        np.testing.assert_array_equal(jax.grad(total)(pairs.reference), np.zeros(SHAPE))


def test_notes_convert_beta_without_one_half():
    (note,) = get_objective("kto").notes(4 * 64 * 64)
    assert note.startswith("kto: beta = 1000 (mean, without 1/2) over 16384 values an image is ")
    assert "2000 (mean, with 1/2) = 1000 (mean, without 1/2) = 0.12207 (sum, with 1/2)" in note
    (note,) = get_objective("ipo", beta=2500.0).notes(4 * 64 * 64)
    assert "pulled to 1 / (2 beta) = 0.0002; the loss starts at 4e-08" in note


def test_objectives_without_a_reward_have_no_notes():
    assert get_objective("ddpm").notes(64) == get_objective("sft").notes(64) == []


def test_the_objective_in_the_contributing_guide_works(pairs, monkeypatch):
    """As it stands there, with the imports of its family's file, against NumPy in float64."""
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide.partition("## Adding an objective")[2], re.DOTALL)
    names = dict(vars(dpo))
    exec(textwrap.dedent(code), names)
    monkeypatch.setitem(registry.OBJECTIVES, "exponential", names["Exponential"])
    objective = get_objective("exponential", beta=4.0)
    preference = np.array([1.0, 0.9, 0.5, 0.7])
    soft = dataclasses.replace(pairs, preference=jnp.asarray(preference, jnp.float32))
    loss, metrics = objective(soft, Schedule.scaled_linear())
    monkeypatch.setitem(objectives_numpy.MARGIN_LOSSES, "exponential", lambda z, h: np.exp(-z))
    arrays = {key: np.asarray(getattr(pairs, key), float) for key in ("policy", "reference", "target")}
    arrays |= {"timesteps": np.tile(pairs.levels[:, None], 2), "preference": preference}
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    expected, expected_metrics = objectives_numpy.evaluate(
        "exponential", arrays, betas, "epsilon", **objective.hyperparameters
    )
    np.testing.assert_allclose(loss, expected, rtol=2e-4)
    np.testing.assert_allclose(metrics["margin"], expected_metrics["margin"], rtol=2e-4)
    assert objective.notes(64)[0].startswith("exponential: beta = 4 ")
    with pytest.raises(UserError, match=r"config\.objective\.beta = 0\.0: .*above zero"):
        get_objective("exponential", beta=0.0)


def test_a_metric_that_is_not_per_example_is_found_by_the_tests(pairs):
    """Annotated shapes are checked while tests run (conftest.TYPECHECKED), so of a new objective too."""

    class Reduced(type(get_objective("sft"))):
        def loss_and_metrics(self, predictions, schedule):
            loss, metrics = super().loss_and_metrics(predictions, schedule)
            return loss, {name: value.mean() for name, value in metrics.items()}

    with pytest.raises(TypeCheckError, match="return value"):
        Reduced()(pairs, Schedule.scaled_linear())
    with pytest.raises(TypeCheckError, match="Float"):
        Schedule.scaled_linear().target(jnp.zeros(2, int), jnp.zeros(2), 0)


def test_a_limit_holds_however_an_objective_is_made():
    with pytest.raises(
        UserError, match=r"config\.objective\.beta = -1\.0: must be a finite number, above zero"
    ):
        dpo.DiffusionDPO(beta=-1.0)
    with pytest.raises(UserError, match=r"config\.objective\.reduction = 'median': unknown"):
        dataclasses.replace(dpo.DiffusionDPO(), reduction="median")


def test_the_fields_short_names_are_known():
    assert get_objective("dpo", beta=2.0) == get_objective("diffusion_dpo", beta=2.0)
    assert get_objective("diffusion-kto").name == "kto"
    assert OBJECTIVE_ALIASES.keys().isdisjoint(registry.OBJECTIVES)
