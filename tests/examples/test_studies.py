"""The studies: sweeps that are killed, changed or fail; labels of known temperature; statistics, tables."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from signal import SIGKILL

import numpy as np
import pytest
from processes import ROOT
from tiny_run import make_config, saved_steps

from configs import emoji_diffusion_dpo
from dspo_jax.evaluation.win_rates import Estimate
from dspo_jax.sampling.rendering import Rendering
from dspo_jax.training import settings
from examples.studies import report, study, tables
from examples.studies.sweep import Panel, Run, make_runs, parse_values, read_result, sweep, what_is_left
from examples.studies.sweep import report as report_sweep

PANEL = Panel("model", ("a cat",), 1, ("compressibility",), Rendering())


def make(names, beta=2000.0):
    config = emoji_diffusion_dpo.get_config()
    config.objective.beta = beta
    return [Run(name, config, PANEL, kind="dpo") for name in names]


def note(folder, word):
    """Notes that a run was worked on; returns how often so far."""
    path = folder / "worked.txt"
    path.write_text(f"{path.read_text() if path.exists() else ''}{word}\n")
    return len(path.read_text().split())


def work(run, folder):
    return {"steps": {"0": {"scores": {"compressibility": [[float(note(folder, "whole"))]]}}}}


KILLED = """
import os, signal, sys
from pathlib import Path
from dspo_jax.sampling.rendering import Rendering
from examples.studies.sweep import Panel, Run, sweep

def work(run, folder):
    if run.name == "b":
        (folder / "worked.txt").write_text("half\\n")
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "worked.txt").write_text("whole\\n")
    return {"steps": {}}

panel = Panel("model", ("a cat",), 1, ("compressibility",), Rendering())
sweep([Run(name, None, panel) for name in "abc"], Path(sys.argv[1]), work)
"""


def test_a_killed_sweep_goes_on_where_it_was(tmp_path, capsys):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -SIGKILL, killed.stderr
    assert read_result(tmp_path / "a") is not None
    assert read_result(tmp_path / "b") is None
    runs = [Run(name, None, PANEL) for name in "abc"]
    results = sweep(runs, tmp_path, work)
    worked = {name: (tmp_path / name / "worked.txt").read_text().split() for name in "abc"}
    assert worked == {"a": ["whole"], "b": ["half", "whole"], "c": ["whole"]}
    assert list(results) == ["a", "b", "c"]
    assert "2 of 3 runs left" in capsys.readouterr().out
    assert sweep(runs, tmp_path, None) == results  # nothing is done


def test_changed_settings_are_refused_before_anything_runs(tmp_path):
    sweep(make("b"), tmp_path, work)
    with pytest.raises(
        ValueError, match=r"b: was run with config\.objective\.beta = 2000\.0, .* 500\.0; delete"
    ):
        sweep(make("ab", beta=500.0), tmp_path, work)
    assert not (tmp_path / "a").exists()
    other = [dataclasses.replace(run, panel=dataclasses.replace(PANEL, seeds=2)) for run in make("b")]
    with pytest.raises(ValueError, match=r"panel\.seeds = 1"):
        sweep(other, tmp_path, work)


def test_a_failure_is_kept_and_stops_no_other_run(tmp_path, capsys):
    def fails(run, folder):
        if run.name == "b":
            raise RuntimeError("the loss is\nnot finite")
        return work(run, folder)

    assert list(sweep(make("abc"), tmp_path, fails)) == ["a", "c"]
    kept = json.loads((tmp_path / "b" / "failed.json").read_text())
    assert kept == {"reason": "RuntimeError: the loss is not finite"}
    assert list(sweep(make("abc"), tmp_path, work)) == ["a", "c"]  # not tried again
    sweep(make("abc"), tmp_path, work, dry_run=True)
    assert "failed   b: RuntimeError: the loss is not finite" in capsys.readouterr().out
    assert list(sweep(make("abc"), tmp_path, work, retry=True)) == ["a", "b", "c"]
    assert not (tmp_path / "b" / "failed.json").exists()


def test_a_run_that_is_asked_to_stop_ends_the_sweep_and_a_dry_run_does_nothing(tmp_path, capsys):
    assert sweep(make("ab"), tmp_path, lambda run, folder: None) is None
    assert not (tmp_path / "b").exists()
    assert sweep(make("ab"), tmp_path, None, dry_run=True) == {}
    assert capsys.readouterr().out.count("to do") == 2


def test_a_request_to_stop_in_the_last_step_of_a_run_ends_the_sweep(
    shallow_model, tiny_pairs, tmp_path, monkeypatch
):
    @contextmanager
    def asked():
        yield lambda: True

    monkeypatch.setattr("dspo_jax.training.run.stop_requests", asked)
    run = Run("a", make_config(shallow_model, tiny_pairs, {"steps": 1}), PANEL)
    assert sweep([run], tmp_path) is None  # nothing was drawn: PANEL's model is not there
    assert saved_steps(tmp_path / "a" / "run") == [1]


def test_what_is_left_is_estimated_by_runs_of_the_same_kind(tmp_path):
    runs = [Run(name, None, PANEL, kind=name[0]) for name in ("a1", "b1", "a2", "b2", "c1")]
    for name, seconds in (("a1", 3600.0), ("b1", 7200.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"seconds": seconds}))
    # One hour, and the mean of both for what has no like.
    assert what_is_left([runs[2], runs[4]], runs, tmp_path).startswith("2 of 5 runs left, about 2.5 h")
    assert what_is_left(runs[4:], runs[4:], tmp_path) == "1 of 1 runs left"


def test_values_become_runs_and_what_is_none_is_refused():
    config = emoji_diffusion_dpo.get_config()
    values = parse_values(["objective.beta=500,2e3", "objective.name=dspo,sft", "seed=1"], config)
    assert values == {"objective.beta": [500, 2000.0], "objective.name": ["dspo", "sft"], "seed": [1]}
    runs = make_runs(config, values, PANEL)
    assert list(runs)[1] == "beta=500,name=sft,seed=1"
    assert [run.config.objective.beta for run in runs.values()] == [500, 500, 2000, 2000]
    assert config.objective.name == "diffusion_dpo"
    for text, message in (
        ("objective.bata=1", "did you mean 'objective.beta'"),
        ("seed=", "give values"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_values([text], config)
    with pytest.raises(ValueError, match=r"--vary: \{'seed': 'one'\}"):
        make_runs(config, {"seed": ["one"]}, PANEL)


def test_the_table_of_a_sweep_pools_training_seeds(tmp_path):
    scores = {
        "beta=1,seed=0": [[1.0], [3.0]],
        "beta=1,seed=1": [[2.0], [0.0]],
        "beta=2,seed=0": [[0.0], [0.0]],
    }
    results = {name: {"steps": {"9": {"scores": {"r": rows}}}} for name, rows in scores.items()}
    base = {"steps": {"0": {"scores": {"r": [[1.0], [1.0]]}}}}
    report_sweep({"objective.beta": [1, 2], "seed": [0, 1]}, results, base, tmp_path)
    first, second = json.loads((tmp_path / "table.json").read_text())
    # A tie, two wins and a loss; the quartiles of 0, 1, 2, 3.
    assert (first["runs"], first["win_rate"]) == (2, 0.625)
    assert first["quartiles"] == [0.75, 1.5, 2.25]
    assert (second["runs"], second["win_rate"], second["low"], second["high"]) == (1, 0.0, 0.0, 0.0)
    assert "| 2 | r | 1 | 0.0 [0.0, 0.0] | 0.5 | 0 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("temperature", [0.2, 2.0])
def test_labels_are_drawn_at_their_temperature(temperature):
    count = 20_000
    for gap in (-0.5, 0.1, 0.3, 1.0):
        scores = np.tile([[gap, 0.0]], (count, 1))
        rows, known = study.label_pairs(scores, temperature)
        first = np.mean([row["winner"] == 0 for row in rows])
        chance = 1 / (1 + np.exp(-gap / temperature))
        spread = np.sqrt(chance * (1 - chance) / count)
        assert abs(first - chance) < 4 * spread + 1e-9
        assert known["labels_as_reward"] == pytest.approx(first if gap > 0 else 1 - first)
        assert known["best_accuracy"] == pytest.approx(max(chance, 1 - chance))
    rows, _ = study.label_pairs(np.array([[1.0, 1.0], [5.0, 0.0]]), 1e-3)
    assert rows == [{"number": 1, "winner": 0, "loser": 1}]  # a tie is no pair


def test_holm_by_hand():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 alone, which may not be below the one before.
    np.testing.assert_allclose(tables.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert tables.holm([0.9, 0.8]) == [1.0, 1.0]
    assert tables.holm([]) == []


def test_pooled_win_rates_know_of_prompts_and_of_trainings():
    ours = [np.array([[1.0, 1.0], [1.0, 0.0]]), np.array([[0.0, -1.0], [1.0, 1.0]])]
    base = np.array([[0.0, 0.0], [0.0, 0.0]])
    found, share = tables.pool(ours, [base])
    # 4 + 0.5 of ... : wins 1 1 1 ½ and ½ 0 1 1, by hand 6 of 8.
    assert share.value == pytest.approx(6 / 8)
    assert found.share.value == pytest.approx(6 / 8)
    against_itself, _ = tables.pool(ours, ours)
    assert (against_itself.images_tied, against_itself.p_value) == (8, 1.0)
    # One training wins everywhere, the other loses everywhere: prompts alone would be sure of one half.
    many = np.ones((30, 2))
    found, share = tables.pool([many, -many], [np.zeros((30, 2))])
    assert (found.share.low, found.share.high) == (0.5, 0.5)
    assert (share.low, share.high) == (0.0, 1.0)
    assert dataclasses.astuple(tables.change([many, 3 * many], [many])) == (1.0, 0.0, 2.0)


def test_a_markdown_table():
    text = tables.markdown(["a", "b"], [[1, "x|y"], [2.5, ""]])
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| 1 | x\\|y |", "| 2.5 |  |"]
    assert tables.per_cent(Estimate(0.5, 0.251, 1.0)) == "50.0 [25.1, 100.0]"


@pytest.mark.parametrize(
    ("sign", "verdict", "size", "expected"),
    [
        (">", "better", 9.0, "yes"),
        (">", "worse", 0.1, "no"),
        ("<", "worse", 9.0, "yes"),
        ("<", "undecided", 0.1, "undecided"),
        ("=", "better", 0.1, "yes"),  # of every image, and not worth mentioning
        ("=", "undecided", 0.7, "undecided"),
        ("=", "undecided", 1.3, "no"),
        ("=", "undecided", float("nan"), "undecided"),
    ],
)
def test_what_came_of_a_prediction(sign, verdict, size, expected):
    assert report.outcome(sign, verdict, size) == expected


def test_every_method_has_a_config_and_the_same_pairs_or_queries(tmp_path):
    for name, signal in study.combinations(study.FULL):
        config = study.make_config(name, signal, 1e-4, 0, study.FULL, tmp_path)
        parsed = settings.parse(config)  # refuses an argument that an objective does not have
        seen = parsed.steps * parsed.batch_size
        if study.METHODS[name].is_online:
            assert seen * parsed.drawn_per_example == 2 * study.FULL.pairs
            assert parsed.steps % parsed.stream.updates == 0  # whole rounds
            assert not set(parsed.stream.prompts) & set(study.make_prompts(signal, 48))
        else:
            assert seen == 2 * study.FULL.pairs
    assert study.make_config("dspo", "affect", 1e-4, 0, study.FULL, tmp_path).objective.beta is None


def test_the_held_out_prompts_are_no_others():
    for signal in ("colourfulness", study.AFFECT):
        assert len(study.make_prompts(signal, 32, 16)) == 32
    names = study.make_prompts("colourfulness", 32, 16)
    assert not {*names} & {*study.make_prompts("colourfulness", 16)}
    assert not {*names} & {*study.train_prompts()}
    assert len({*names}) == 32


def made_up(size):
    """Results of all runs of a study, with scores of noise; better by the method's number."""
    draw = np.random.default_rng(0)

    def result(run, better=0.0):
        panel, steps = run.panel, run.steps or (1,)
        shape = (len(panel.prompts), panel.seeds)
        scores = {reward: (draw.normal(size=shape) + better).tolist() for reward in report.REWARDS}
        pairs = {"implicit_accuracy": float(draw.uniform(0.5, 0.7))}
        each = {str(step): {"scores": scores, "pairs": pairs} for step in steps}
        return {"steps": each, "seconds": 60.0, "seconds_per_update": 1.0, "reward_queries": 0}

    runs = study.search_runs(size, ROOT)
    found = {run.name: result(run, 2.0 * ("3e-05" in run.name)) for run in runs}
    rate = study.choose_rate("sft", "colourfulness", size, found)
    assert rate == 3e-5
    for number, run in enumerate([*study.final_runs(size, ROOT, found), *study.extra_runs(size, ROOT)]):
        found[run.name] = result(run, 0.01 * number)
    return found


def test_all_tables_are_filled_into_the_page(tmp_path):
    size = dataclasses.replace(study.FULL, prompts=4, seeds=2, search_prompts=4, draws=5, training_seeds=2)
    page = tmp_path / "results.md"
    page.write_text((ROOT / "docs" / "results.md").read_text())
    results = made_up(size)
    (tmp_path / "out/final/affect/dspo_ref,0").mkdir(parents=True)
    (tmp_path / "out/final/affect/dspo_ref,0/failed.json").write_text('{"reason": "RuntimeError: no"}')
    report.write_report(results, size, tmp_path / "out", page)
    text = page.read_text()
    assert "not run yet" not in text.lower()
    assert "final/affect/dspo_ref,0: RuntimeError: no" in text
    for name in study.METHODS:
        assert text.count(study.METHODS[name].label) > 1, name
    assert (tmp_path / "results.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    first = next(row for row in found if row["ours"] == "diffusion_dpo" and row["other"] == "sft")
    ours, theirs = (
        np.concatenate(
            [
                results[f"final/compressibility/{name},{seed}"]["steps"]["1"]["scores"]["compressibility"]
                for seed in range(2)
            ]
        )
        for name in ("diffusion_dpo", "sft")
    )
    assert first["share"][0] == pytest.approx(np.mean(ours > theirs))
    between = np.abs(theirs[:4] - theirs[4:]).mean()  # four prompts of two training seeds
    assert first["size"] == pytest.approx(np.abs(ours - theirs).mean() / between)
    online, offline = (
        [results[f"final/colourfulness/{name},{seed}"] for seed in range(2)]
        for name in ("draft_k", "diffusion_dpo")
    )
    wins = np.mean(
        [
            tables.scores_of(a, "colourfulness") > tables.scores_of(b, "colourfulness")
            for a, b in zip(online, offline, strict=True)
        ]
    )
    # 160 updates of eight images against 40 of pairs, made up to take a second each.
    assert re.search(rf"\| colourfulness \| DRaFT-1 \| {100 * wins:.1f} \[.* \| 4\.0 \|", text)
    again = report.fill(text, {"1": "other"})
    assert report.fill(again, {"1": "other"}) == again != text
    with pytest.raises(ValueError, match="0 places <!-- table 1 -->"):
        report.fill("nothing", {"1": "a"})


def test_a_missing_training_seed_leaves_the_others_with_their_partners():
    """SFT 1, 2 and 4 by seed, DSPO 12 and 14 without the first: each differs from its own by 10."""

    def result(value):
        return {"steps": {"1": {"scores": {"compressibility": [[float(value)]]}}}}

    made = {("sft", seed): value for seed, value in enumerate((1, 2, 4))} | {("dspo", 1): 12, ("dspo", 2): 14}
    results = {f"final/compressibility/{name},{seed}": result(value) for (name, seed), value in made.items()}
    results["final/compressibility/base"] = result(0)
    finals = report.Finals(results, study.Size())
    assert finals.size_of_difference("compressibility", "dspo", "sft") == pytest.approx(10 / 1.5)
    assert finals.size_of_difference("compressibility", "dspo", "base") == pytest.approx(13 / 1.5)


GOLDEN = ROOT / "tests/golden/study_quick.json"
# An update on another CPU rounds otherwise; two training seeds differ by about 0.2, 0.003 and 0.1.
TOLERANCES = {"colourfulness": 0.15, "compressibility": 0.004, "likeness": 0.1, "sentiment": 0.02}


@pytest.mark.slow
def test_the_quick_study_has_its_golden_table(request, tmp_path):
    """The whole study of four methods: labels, search, training, judgement, report; a quarter of an hour."""
    out = tmp_path / "quick"
    command = [sys.executable, "-m", "examples.studies.study", "--quick", f"--out={out}"]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = {
        path.parent.relative_to(out).as_posix(): {
            reward: float(np.mean(tables.scores_of(json.loads(path.read_text()), reward)))
            for reward in report.REWARDS
        }
        for path in sorted(out.rglob("result.json"))
    }
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name, means in golden.items():
        for reward, mean in means.items():
            assert found[name][reward] == pytest.approx(mean, abs=TOLERANCES[reward]), (
                f"{name}, {reward}: the numbers of training or drawing have changed; if that was meant, "
                "rewrite them: pytest -m slow tests/examples/test_studies.py --regenerate-golden; say why "
                "in the commit"
            )
    text = (out / "tables.md").read_text()
    assert "whoever knows the reward is right on" in text
    assert "`dspo = sft`" in text
    [same] = (row for row in json.loads((out / "predictions.json").read_text()) if row["sign"] == "=")
    assert same["outcome"] == "yes"
