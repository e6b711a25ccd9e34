"""The study's tables, in the form of the papers', its figure, and what came of the predictions."""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from dspo_jax.errors import UserError
from dspo_jax.evaluation.win_rates import Estimate, Verdict, decide, reject
from dspo_jax.files import whole, write_json, write_text
from dspo_jax.json_files import JsonObject, read_object
from examples.studies import study
from examples.studies.sweep import FAILED
from examples.studies.tables import change, holm, markdown, per_cent, pool, scores_of

REWARDS = ("compressibility", "colourfulness", "sentiment", "likeness")


class Prediction(NamedTuple):
    """A comparison that was written down before the runs: `ours` is ">", "<" or "=" `other`."""

    ours: str
    sign: str
    other: str


PREDICTIONS = (
    Prediction("dspo", "=", "sft"),
    Prediction("dspo_e", "=", "sft"),
    Prediction("dspo_ref", "=", "base"),
    Prediction("dspo_pref", ">", "sft"),
    Prediction("diffusion_dpo", ">", "dspo_pref"),
    Prediction("diffusion_dpo", ">", "sft"),
    Prediction("diffusion_dpo", ">", "kto"),
    Prediction("mapo", ">", "sft"),
    Prediction("hinge", "=", "diffusion_dpo"),
    Prediction("dspo_lora", "<", "dspo"),
    Prediction("dspo_nodup", "<", "dspo"),
    Prediction("online_dpo", ">", "diffusion_dpo"),
    Prediction("iterated_dpo", ">", "online_dpo"),
    Prediction("online_dpo", ">", "raft"),
    Prediction("online_dpo", ">", "ddpo"),
    Prediction("diffusion_dpo", ">", "ddpo"),
    Prediction("draft_k", ">", "online_dpo"),
)
# "=" is about size, which neither a win rate nor a sign test measures: a difference of a thousandth that all
# images have wins always. Both methods' images of the same noise and training seed differ in the reward by so
# much of what two training seeds of the other method make (of SFT where that is the base).
SAME, DIFFERENT = 0.5, 1.0

TABLES = {
    "1": ("sft", "diffusion_dpo", "kto", "mapo", "dspo"),
    "5": ("dspo_e", "dspo"),
    "6": ("dspo_ref", "dspo_nodup", "dspo_lora", "dspo"),
}


class Finals:
    """Results on held-out prompts: training seeds of each method, by signal."""

    def __init__(self, results: Mapping[str, JsonObject], size: study.Size):
        """Takes the finished runs."""
        self._results = results
        self.signals = [signal for signal in size.signals if f"final/{signal}/base" in results]
        self.size, self._seeds = size, range(size.training_seeds)

    def runs(self, signal: str, name: str) -> dict[int, JsonObject]:
        """Returns the finished runs by training seed; the base's is 0."""
        if name == "base":
            return {0: self._results[f"final/{signal}/base"]}
        named = {seed: self._results.get(f"final/{signal}/{name},{seed}") for seed in self._seeds}
        return {seed: result for seed, result in named.items() if result is not None}

    def methods(self, signal: str) -> list[str]:
        """Returns the methods with a finished run, in the order of `METHODS`."""
        return [name for name in study.METHODS if self.runs(signal, name)]

    def scores(self, signal: str, name: str, reward: str) -> list[np.ndarray]:
        """Returns scores [prompts, seeds] of each training seed."""
        return [scores_of(result, reward) for result in self.runs(signal, name).values()]

    def paired(self, signal: str, ours: str, other: str, reward: str) -> tuple[list[np.ndarray], ...]:
        """Returns two methods' scores for the training seeds that both have; the base has one of all."""
        mine, theirs = self.runs(signal, ours), self.runs(signal, other)
        shared = [seed for seed in mine if other == "base" or seed in theirs]
        return (
            [scores_of(mine[seed], reward) for seed in shared],
            [scores_of(theirs[0 if other == "base" else seed], reward) for seed in shared],
        )

    def against(self, signal: str, ours: str, other: str, reward: str) -> tuple[Estimate, float]:
        """Returns the win rate of a method over another, seed by seed, and its p-value."""
        found, share = pool(*self.paired(signal, ours, other, reward))
        return share, found.p_value

    def size_of_difference(self, signal: str, ours: str, other: str) -> float:
        """Returns the mean difference of two methods' images over that of two trainings; NaN with one."""
        reward = study.reward_of(signal)
        usual = self.scores(signal, "sft" if other == "base" else other, reward)
        if len(usual) < 2:
            return float("nan")
        pairs = zip(*self.paired(signal, ours, other, reward), strict=True)
        between = np.mean([np.abs(a - b).mean() for a, b in itertools.pairwise(usual)])
        return float(np.mean([np.abs(a - b).mean() for a, b in pairs]) / between)

    def accuracy(self, signal: str, name: str) -> list[float]:
        """Returns the held-out implicit accuracy of each training seed."""
        steps = [result["steps"] for result in self.runs(signal, name).values()]
        return [each[max(each, key=int)]["pairs"]["implicit_accuracy"] for each in steps]


def table_of_methods(finals: Finals, signal: str, known: JsonObject | None) -> str:
    """Win rates of all methods over the base under every reward, with Holm's p by the signal's own."""
    methods, reward = finals.methods(signal), study.reward_of(signal)
    p_values = holm([finals.against(signal, name, "base", reward)[1] for name in methods])
    rows = []
    for name, p_value in zip(methods, p_values, strict=True):
        shares = [finals.against(signal, name, "base", each)[0] for each in REWARDS[:-1]]
        less = change(*(finals.scores(signal, each, "likeness") for each in (name, "base")))
        verdict = decide(shares[REWARDS.index(reward)], p_value)
        accuracy = f"{np.mean(finals.accuracy(signal, name)):.3f}"
        label = study.METHODS[name].label
        rows.append([label, len(finals.runs(signal, name)), *map(per_cent, shares)])
        rows[-1] += [
            f"{less.value:.2f} [{less.low:.2f}, {less.high:.2f}]",
            f"{p_value:.2g}",
            verdict,
            accuracy,
        ]
    header = ["method", "runs", *REWARDS[:-1], "likeness, change", "Holm's p", "verdict", "implicit accuracy"]
    note = ""
    if known is not None:
        note = (
            f"Temperature {known['temperature']:g}: {100 * known['labels_as_reward']:.1f} % of the labels "
            "are in the reward's order, and whoever knows the reward is right on "
            f"{100 * known['best_accuracy']:.1f} %.\n\n"
        )
    return note + markdown(header, rows)


def table_in_form(finals: Finals, names: Sequence[str]) -> str:
    """Win rates over the base as in DSPO's Tables 1, 5 and 6: the best of each signal and reward is bold."""
    rows = []
    for signal in finals.signals:
        there = [name for name in names if name in finals.methods(signal)]
        shares = {n: [100 * finals.against(signal, n, "base", r)[0].value for r in REWARDS] for n in there}
        best = np.max(list(shares.values()), axis=0) if shares else []
        for name, values in shares.items():
            cells = [f"**{v:.1f}**" if v == top else f"{v:.1f}" for v, top in zip(values, best, strict=True)]
            rows.append([signal, study.METHODS[name].label, *cells])
    return markdown(["signal", "method", *REWARDS], rows)


def table_of_costs(finals: Finals) -> str:
    """Seconds of an update and queries of the reward, as in DSPO's Table 3."""
    rows = []
    for name, method in study.METHODS.items():
        found = [result for s in finals.signals for result in finals.runs(s, name).values()]
        if found:
            keys = ("seconds_per_update", "seconds", "reward_queries")
            update, run, queries = (float(np.median([each[key] for each in found])) for key in keys)
            rows.append([method.label, f"{update:.2f}", f"{run / 60:.1f}", f"{queries:.0f}"])
    return markdown(["method", "seconds an update", "minutes a run, judged", "queries in training"], rows)


def outcome(sign: str, verdict: Verdict, size: float) -> str:
    """Tells whether a prediction came true: yes, no, or undecided.

    Args:
      sign: ">", "<" or "=".
      verdict: of the win rate, for the first two.
      size: of the difference, over that between training seeds, for the last; NaN where there is one seed.
    """
    if sign == "=":
        return "yes" if size < SAME else "no" if size > DIFFERENT else "undecided"
    if verdict == "undecided":
        return "undecided"
    return "yes" if verdict == {">": "better", "<": "worse"}[sign] else "no"


def table_of_predictions(finals: Finals) -> tuple[str, list[JsonObject]]:
    """Head-to-head win rates of the predicted comparisons, Holm-corrected over all of them."""
    found: list[dict[str, Any]] = []
    for signal in finals.signals:
        there = {"base", *finals.methods(signal)}
        for each in PREDICTIONS:
            if {each.ours, each.other} <= there:
                share, p_value = finals.against(signal, each.ours, each.other, study.reward_of(signal))
                size = finals.size_of_difference(signal, each.ours, each.other)
                found.append({"signal": signal, **each._asdict(), "share": share, "p": p_value, "size": size})
    rows = []
    for row, p_value in zip(found, holm([row["p"] for row in found]), strict=True):
        row["holm"], share = p_value, row["share"]
        row["outcome"] = outcome(row["sign"], decide(share, p_value), row["size"])
        label = f"{row['ours']} {row['sign']} {row['other']}"
        numbers = (per_cent(share), f"{p_value:.2g}", f"{row['size']:.2f}")
        rows.append([row["signal"], f"`{label}`", *numbers, row["outcome"]])
        row["share"] = [share.value, share.low, share.high]
    header = ["signal", "predicted", "wins of the first, %", "Holm's p", "size", "came true"]
    return markdown(header, rows), found


def table_of_online(finals: Finals) -> str:
    """Online methods against Diffusion-DPO on pairs, for as many queries, as in S1.1; and their cost."""
    rows, offline = [], "diffusion_dpo"
    for signal in finals.signals:
        methods = finals.methods(signal)
        for name in (each for each in methods if study.METHODS[each].is_online and offline in methods):
            share, p_value = finals.against(signal, name, offline, study.reward_of(signal))
            times = [
                np.median([result["seconds_per_update"] for result in finals.runs(signal, each).values()])
                * study.make_config(each, signal, 1e-4, 0, finals.size, Path()).steps
                for each in (name, offline)
            ]
            less = change(*(finals.scores(signal, each, "likeness") for each in (name, offline)))
            numbers = (
                per_cent(share),
                f"{p_value:.2g}",
                f"{less.value:.2f} [{less.low:.2f}, {less.high:.2f}]",
            )
            rows.append(
                [signal, study.METHODS[name].label, *numbers, f"{times[0] / max(times[1], 1e-9):.1f}"]
            )
    header = ["signal", "online method", "wins over Diffusion-DPO, %", "p", "likeness, difference"]
    return markdown([*header, "training time, of Diffusion-DPO's"], rows)


def table_of_rejection(finals: Finals, draws: JsonObject, panel: Figure) -> str:
    """Draws of the base until one beats a method's image, as in Diffusion-DPO's S9 and Fig. S5."""
    rows, reward = [], "colourfulness"
    base = scores_of(draws, reward)
    for name in finals.methods(reward):
        found = reject(np.concatenate(finals.scores(reward, name, reward), axis=1), base)
        label = study.METHODS[name].label
        rows.append([label, f"{found.mean_draws:.1f}", found.median_draws, f"{100 * found.never:.0f} %"])
        if name in study.LONG:
            panel.gca().plot(np.arange(1, base.shape[1] + 1), found.win_rate, label=label)
    panel.gca().set(xscale="log", xlabel="draws of the base", ylabel="best of them wins")
    return markdown(["method", "mean draws", "median", f"never in {base.shape[1]}"], rows)


def table_of_beta(results: Mapping[str, JsonObject], base: JsonObject, panel: Figure) -> str:
    """Medians of the trained reward over beta, as in Diffusion-DPO's Fig. S2."""
    rows, reward, medians = [], "colourfulness", {}
    for beta in study.BETAS:
        if found := _group(results, "beta", beta):
            _, share = pool([scores_of(f, reward) for f in found], [scores_of(base, reward)])
            _, kept = pool([scores_of(f, "likeness") for f in found], [scores_of(base, "likeness")])
            medians[beta] = float(np.median([scores_of(f, reward) for f in found]))
            rows.append([f"{beta:g}", len(found), f"{medians[beta]:.4g}", per_cent(share), per_cent(kept)])
    panel.gca().plot(list(medians), list(medians.values()), marker="o", label="Diffusion-DPO")
    panel.gca().axhline(np.median(scores_of(base, reward)), color="gray", linestyle="--", label="the base")
    panel.gca().set(xscale="log", xlabel="beta", ylabel=f"median {reward}")
    return markdown(["beta", "runs", f"median {reward}", "wins, %", "likeness: wins, %"], rows)


def table_of_lambda(results: Mapping[str, JsonObject], base: JsonObject) -> str:
    """DSPO against SFT of the same training seed as lambda grows."""
    rows, reward, sft = [], "colourfulness", _group(results, "lambda", "sft")
    for value in (*study.LAMBDAS, "pref"):
        found = _group(results, "lambda", value)
        if found and len(found) == len(sft):
            ours, theirs = ([scores_of(f, reward) for f in group] for group in (found, sft))
            _, over_base = pool(ours, [scores_of(base, reward)])
            _, over_sft = pool(ours, theirs)
            gap = np.mean([np.abs(a - b).mean() for a, b in zip(ours, theirs, strict=True)])
            label = "reward_scale 2000, score_weight 0.5" if value == "pref" else f"{value:g}"
            rows.append([label, per_cent(over_base), per_cent(over_sft), f"{gap:.3f}"])
    if len(sft) > 1:
        theirs = [scores_of(f, reward) for f in sft]
        gap = np.mean([np.abs(a - b).mean() for a, b in itertools.pairwise(theirs)])
        rows.append(["SFT, another training seed", "", "", f"{gap:.3f}"])
    return markdown(["lambda", "wins over the base, %", "wins over SFT, %", "mean difference from SFT"], rows)


def table_of_long_runs(results: Mapping[str, JsonObject], base: JsonObject, panel: Figure) -> str:
    """Trained reward and likeness at several lengths of training: over-optimisation."""
    rows, reward = [], "colourfulness"
    for name in study.LONG:
        if (found := results.get(f"extra/long/{name}")) is None:
            continue
        label, course = study.METHODS[name].label, []
        for step in sorted(found["steps"], key=int):
            means, wins = [], []
            for each in (reward, "likeness"):
                ours = scores_of(found, each, step)
                theirs = scores_of(base, each)[:, : ours.shape[1]]
                means.append(float(ours.mean()))
                wins.append(per_cent(pool([ours], [theirs])[1]))
            course.append(means)
            rows.append([label, step, f"{means[0]:.4g}", wins[0], f"{means[1]:.4g}", wins[1]])
        panel.gca().plot(*np.transpose(course), marker="o", label=label)
    panel.gca().set(xlabel=f"mean {reward}, trained", ylabel="mean likeness, not trained")
    return markdown(["method", "updates", reward, "wins, %", "likeness", "wins, %"], rows)


def table_of_accuracy(finals: Finals, panel: Figure) -> str:
    """Rank correlation of the held-out implicit accuracy with the win rate, over all runs."""
    rows = []
    for signal in finals.signals:
        base, reward = finals.scores(signal, "base", study.reward_of(signal)), study.reward_of(signal)
        points = [
            (accuracy, pool([scores], base)[0].share.value)
            for name in finals.methods(signal)
            for accuracy, scores in zip(
                finals.accuracy(signal, name), finals.scores(signal, name, reward), strict=True
            )
        ]
        if len(points) > 2:
            found = stats.spearmanr(*np.transpose(points))
            rows.append([signal, len(points), f"{found.statistic:.2f}", f"{found.pvalue:.2g}"])
        accuracies, wins = np.transpose(points)
        panel.gca().scatter(accuracies, wins, s=12, label=signal)
    panel.gca().set(xlabel="held-out implicit accuracy", ylabel="win rate over the base")
    return markdown(["signal", "runs", "Spearman's rho", "p"], rows)


def _group(results: Mapping[str, JsonObject], group: str, value: object) -> list[JsonObject]:
    start = f"extra/{group}/{value},"
    return [results[name] for name in sorted(results) if name.startswith(start)]


def describe_runs(results: Mapping[str, JsonObject], out: Path) -> str:
    """Says how many runs are finished, how long they took, and why others failed."""
    hours = sum(result["seconds"] for result in results.values()) / 3600
    lines = [f"{len(results)} runs are finished; they took {hours:.1f} hours."]
    for path in sorted(out.rglob(FAILED)):
        lines.append(f"* failed: {path.parent.relative_to(out)}: {read_object(path)['reason']}")
    return "\n".join(lines)


def make_tables(
    results: Mapping[str, JsonObject], size: study.Size, out: Path
) -> tuple[dict[str, str], Figure]:
    """Makes every table whose runs are finished, by name, and the figure; writes out/predictions.json."""
    finals, tables = Finals(results, size), {}
    figure = Figure(figsize=(10, 8), layout="constrained")
    panels: Any = figure.subfigures(2, 2)
    for signal in finals.signals:
        known = out / "data" / f"{signal}.json"
        tables[signal] = table_of_methods(finals, signal, read_object(known) if known.exists() else None)
    for name, methods in TABLES.items():
        tables[name] = table_in_form(finals, methods)
    tables["3"] = table_of_costs(finals)
    tables["predictions"], predictions = table_of_predictions(finals)
    write_json(out / "predictions.json", predictions)
    tables["online"] = table_of_online(finals)
    tables["accuracy"] = table_of_accuracy(finals, panels[0, 0])
    if size.extras and "colourfulness" in finals.signals:
        base = finals.runs("colourfulness", "base")[0]
        tables["long"] = table_of_long_runs(results, base, panels[0, 1])
        tables["beta"] = table_of_beta(results, base, panels[1, 0])
        tables["lambda"] = table_of_lambda(results, base)
        if (draws := results.get("extra/draws")) is not None:
            tables["rejection"] = table_of_rejection(finals, draws, panels[1, 1])
    for panel in panels.flat:
        if panel.axes:
            panel.gca().legend(frameon=False, fontsize=8)
            panel.gca().grid(alpha=0.25)
    return tables, figure


def fill(page: str, tables: Mapping[str, str]) -> str:
    """Puts tables between the markers of a page, <!-- table NAME --> and <!-- end of table -->.

    Raises:
      UserError: a table has no markers.
    """
    for name, table in tables.items():
        pattern = rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end of table -->)"
        places = list(re.finditer(pattern, page, re.DOTALL))
        if len(places) == 1:
            [place] = places
            page = f"{page[: place.end(1)]}\n{table}\n\n{page[place.start(2) :]}"
        else:
            raise UserError(f"--report: has {len(places)} places <!-- table {name} -->; there must be one")
    return page


def write_report(results: Mapping[str, JsonObject], size: study.Size, out: Path, page: Path | None) -> None:
    """Writes tables.md, tables.json and results.png; fills a page, whose figure lies beside it.

    Args:
      results: of all finished runs, by name.
      size: of the study.
      out: its folder.
      page: with the markers of all tables; None fills none.

    Raises:
      UserError: a page without markers.
      OSError: no such page.
    """
    tables, figure = make_tables(results, size, out)
    tables = {"status": describe_runs(results, out), **tables}
    text = "".join(f"## {name}\n\n{table}\n\n" for name, table in tables.items())
    write_text(out / "tables.md", text)
    write_json(out / "tables.json", {name: table.split("\n") for name, table in tables.items()})
    if page is not None:
        tables["status"] += (
            "\n\n![implicit accuracy, over-optimisation, beta, rejection sampling](results.png)"
        )
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    for file in [out / "results.png", *([page.with_name("results.png")] if page else [])]:
        with whole(file) as partial:
            partial.write_bytes(drawn.getvalue())
    if page is not None:
        write_text(page, fill(page.read_text(encoding="utf-8"), tables))
    print(text)
