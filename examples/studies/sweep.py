"""Runs over settings: each is trained, judged and kept; a table and a figure of all of them.

    python -m examples.studies.sweep --config configs/emoji_diffusion_dpo.py --config.data.path=PAIRS \\
        --vary objective.beta=500,2000,8000 --vary seed=0,1,2 --prompts examples/emoji/prompts.txt \\
        --rewards compressibility --steps 20 --guidance_scale 4 --out runs/beta

Every combination of the values is a run in a folder of its own. The same command, killed anywhere, goes on: a
finished run is not run again, half a run goes on from its checkpoint, and a folder of other settings is
refused. A run that fails is kept with its reason and does not stop the others; --retry tries it again. Runs
that differ in `seed` alone are one row of the table.
"""

import ast
import copy
import dataclasses
import gc
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from dspo_jax import cli, spelling
from dspo_jax.errors import UserError
from dspo_jax.files import write_json, write_text
from dspo_jax.json_files import JsonObject, read_object
from dspo_jax.monitoring.metrics import read_metrics
from dspo_jax.sampling.rendering import Rendering
from examples.studies.tables import draw_medians, markdown, per_cent, pool, scores_of, share_of

SETTINGS, RESULT, FAILED = "settings.json", "result.json", "failed.json"


@dataclasses.dataclass(frozen=True)
class Panel:
    """How runs are judged.

    Attributes:
      base: model that runs are compared with.
      prompts: to draw.
      seeds: images of each prompt.
      rewards: names as `load_reward` takes them.
      rendering: how images are drawn.
      first_seed: of the noise.
      pairs: dataset whose held-out pairs give the implicit accuracy; "" for none.
      reward_dir: weights of the rewards.
    """

    base: str
    prompts: tuple[str, ...]
    seeds: int
    rewards: tuple[str, ...]
    rendering: Rendering
    first_seed: int = 0
    pairs: str = ""
    reward_dir: str = "rewards"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a sweep.

    Attributes:
      name: its folder.
      config: of training; None judges the base itself.
      panel: how it is judged.
      steps: checkpoints that are judged; the last step where none is named.
      kind: runs of one kind are taken to last equally long.
    """

    name: str
    config: ConfigDict | None
    panel: Panel
    steps: tuple[int, ...] = ()
    kind: str = ""

    def settings(self) -> JsonObject:
        """Returns everything that decides the result, as JSON."""
        config = None if self.config is None else json.loads(self.config.to_json_best_effort())
        panel = json.loads(json.dumps(dataclasses.asdict(self.panel)))
        return {"config": config, "panel": panel, "steps": list(self.steps)}


def train_and_judge(run: Run, folder: Path) -> JsonObject | None:
    """Trains a run and judges it; the default work of a sweep.

    Args:
      run: what to do.
      folder: gets the training workdir `run`, and the images.

    Returns:
      By the judged step ("0" for the base): `scores`, reward -> [prompts, seeds], and scalars of the held-out
      pairs; beside them `seconds_per_update` and `reward_queries`. None where the training was asked to stop.
    """
    from dspo_jax.training.run import train
    from dspo_jax.training.validation import judge

    panel, workdir = run.panel, folder / "run"
    if run.config is None:
        return {"steps": {"0": {"scores": _score({"0": panel.base}, panel, folder)["0"]}}}
    config = copy.deepcopy(run.config)
    steps = run.steps or (int(config.steps),)
    if run.steps:
        config.checkpoint.every = steps[0]
        config.checkpoint.max_to_keep = 1 + config.steps // steps[0]
    if train(config, workdir).stop_requested:
        return None
    models = {str(step): f"{workdir}@{step}" for step in steps}
    scores = _score(models, panel, folder)
    found: dict[str, JsonObject] = {step: {"scores": scores[step]} for step in models}
    if panel.pairs:
        how = {"split": "validation", "draws": 3, "batch_size": 32, "compute_dtype": "float32"}
        for step, model in models.items():
            found[step]["pairs"] = judge(model, panel.base, panel.pairs, **how)  # type: ignore[arg-type]
    records = read_metrics(workdir / "metrics.jsonl")
    first, last = records[0], records[-1]  # the first one is written when its step is compiled
    updates, gradient = max(1, last["step"] - first["step"]), config.stream.kind == "prompts"
    return {
        "steps": found,
        "seconds_per_update": (last["wall_seconds"] - first["wall_seconds"]) / updates,
        # With a reward's gradient every image is scored, and the run does not count.
        "reward_queries": last.get("reward_queries", last["examples_seen"] if gradient else 0),
    }


def _score(models: Mapping[str, str], panel: Panel, folder: Path) -> dict[str, dict[str, list]]:
    """Draws the prompts with each model; returns label -> reward -> scores [prompts, seeds]."""
    from dspo_jax.rewards import load_reward
    from dspo_jax.rewards.scores import score_files
    from dspo_jax.sampling.drawing import sample
    from dspo_jax.sampling.folder import place_images
    from dspo_jax.sampling.image_sampler import ImageRequest
    from dspo_jax.sampling.prompts import Prompt

    seeds = range(panel.first_seed, panel.first_seed + panel.seeds)
    prompts = [Prompt(text) for text in panel.prompts]
    requests = [ImageRequest(text, i, seed) for i, text in enumerate(panel.prompts) for seed in seeds]
    found: dict[str, dict[str, list]] = {}
    for label, model in models.items():
        images = folder / f"images_{label}"
        sample({label: model}, prompts, images, panel.rendering, seeds=seeds)
        files = place_images(images, [label], requests, panel.rendering.image_format)[label]
        paths, texts = [files[each] for each in requests], [each.prompt for each in requests]
        found[label] = {}
        for name in panel.rewards:
            reward = load_reward(name, panel.reward_dir)
            scores = score_files(paths, texts, [reward], folder / "scores")[reward.name]
            found[label][reward.name] = scores.reshape(len(prompts), -1).tolist()
    return found


def read_result(folder: Path) -> JsonObject | None:
    """Returns the result of a finished run, or None."""
    path = folder / RESULT
    return read_object(path, "delete it, and the run is judged again") if path.exists() else None


def sweep(
    runs: Sequence[Run],
    out: Path,
    work: Callable[[Run, Path], JsonObject | None] = train_and_judge,
    *,
    dry_run: bool = False,
    retry: bool = False,
    keep_checkpoints: bool = True,
) -> dict[str, JsonObject] | None:
    """Runs what is not there yet, one after the other.

    Args:
      runs: with different names.
      out: holds a folder for each run.
      work: trains and judges one run, see `train_and_judge`.
      dry_run: lists the runs and what is left, and does nothing.
      retry: runs again what failed before.
      keep_checkpoints: whether the training workdir keeps its checkpoints when the run is judged.

    Returns:
      The results of the runs that are finished, by name; None where one was asked to stop.

    Raises:
      UserError: a folder is of a run with other settings; nothing was run.
    """
    for run in runs:
        _refuse_other_settings(run, out / run.name)
    left = []
    for run in runs:
        failed, folder = out / run.name / FAILED, out / run.name
        state = "finished" if (folder / RESULT).exists() else "failed" if failed.exists() else "to do"
        if state == "to do" or (state == "failed" and retry):
            left.append(run)
        if dry_run:
            reason = f": {read_object(failed)['reason']}" if state == "failed" else ""
            print(f"{state:8} {run.name}{reason}")
    print(what_is_left(left, runs, out), flush=True)
    for number, run in enumerate([] if dry_run else left):
        if number:
            print(what_is_left(left[number:], runs, out), flush=True)
        folder, started = out / run.name, time.monotonic()
        (folder / FAILED).unlink(missing_ok=True)
        write_json(folder / SETTINGS, run.settings())
        try:
            result = work(run, folder)
        except Exception as error:  # whatever it is: the other runs do not depend on it
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            write_json(folder / FAILED, {"reason": reason})
            print(f"{run.name}: failed: {reason}", flush=True)
            continue
        finally:
            _release()
        if result is None:
            print(f"{run.name}: stopped; the same command goes on from there")
            return None
        write_json(folder / RESULT, {**result, "seconds": time.monotonic() - started})
        if not keep_checkpoints:
            shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    found = {run.name: read_result(out / run.name) for run in runs}
    return {name: result for name, result in found.items() if result is not None}


def _refuse_other_settings(run: Run, folder: Path) -> None:
    if not (folder / SETTINGS).exists():
        return
    fix = f"delete {folder}, or choose another --out"
    there, here = (
        flatten_dict(each, sep=".", keep_empty_nodes=True)
        for each in (read_object(folder / SETTINGS, fix), run.settings())
    )
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            raise UserError(
                f"{folder}: was run with {key} = {there.get(key)!r}, and is asked for with "
                f"{here.get(key)!r}; {fix}"
            )


def _release() -> None:
    """Forgets compiled programs and arrays of a run; the programs stay in the cache on the disk."""
    import jax

    jax.clear_caches()
    gc.collect()


def what_is_left(left: Sequence[Run], runs: Sequence[Run], out: Path) -> str:
    """Says how many runs are left and how long they take, by the finished ones of the same kind."""
    known: dict[str, list[float]] = {}
    for run in runs:
        if (result := read_result(out / run.name)) is not None:
            known.setdefault(run.kind, []).append(result["seconds"])
    text = f"{len(left)} of {len(runs)} runs left"
    every = [seconds for of_kind in known.values() for seconds in of_kind]
    if not left or not every:
        return text
    seconds = sum(float(np.mean(known.get(run.kind, every))) for run in left)
    return f"{text}, about {seconds / 3600:.1f} h by the {len(every)} that are finished"


# The command


def parse_values(texts: Sequence[str], config: ConfigDict) -> dict[str, list[Any]]:
    """Parses "KEY=V1,V2" to the values of each key.

    Raises:
      UserError: no such key, no value, or one of another type.
    """
    known, found = flatten_dict(config.to_dict(), sep="."), {}
    for text in texts:
        key, _, listed = text.partition("=")
        if key not in known:
            raise UserError(spelling.unknown("--vary", key, known))
        values: list[Any] = []
        for word in filter(None, listed.split(",")):
            try:
                values.append(ast.literal_eval(word))
            except (ValueError, SyntaxError):
                values.append(word)
        if not values:
            raise UserError(f"--vary={text}: give values, KEY=VALUE,VALUE")
        found[key] = values
    return found


def make_runs(config: ConfigDict, values: Mapping[str, Sequence[Any]], panel: Panel) -> dict[str, Run]:
    """Returns a run for every combination of the values of the keys, by its name."""
    runs = {}
    for changes in combinations(values):
        changed = copy.deepcopy(config)
        try:
            changed.update_from_flattened_dict(changes)
        except (TypeError, ValueError) as error:
            raise UserError(f"--vary: {changes}: {error}") from error
        runs[name_of(changes)] = Run(name_of(changes), changed, panel)
    return runs


def combinations(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns every combination of the values, by key."""
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def name_of(changes: Mapping[str, Any]) -> str:
    """Returns the folder's name of a run: the last part of each key, and its value."""
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items()).replace("/", "_")


def report(
    values: Mapping[str, Sequence[Any]], results: Mapping[str, JsonObject], base: JsonObject, out: Path
) -> None:
    """Writes table.md, table.json and, over one numeric key, figure.png with medians as in Fig. S2.

    Args:
      values: of each key; runs that differ in `seed` alone are pooled.
      results: of the finished runs, by name.
      base: the base's.
      out: the folder.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[JsonObject]] = {}
    for changes in combinations(values):
        if (result := results.get(name_of(changes))) is not None:
            key = tuple((key, value) for key, value in changes.items() if key != "seed")
            groups.setdefault(key, []).append(result)
    rewards, table = list(base["steps"]["0"]["scores"]), []
    for group, members in groups.items():
        for reward in rewards:
            scores = [scores_of(each, reward) for each in members]
            win, share = pool(scores, [scores_of(base, reward)])
            row = {**dict(group), "reward": reward, "runs": len(members), "win_rate": share.value}
            row |= {"low": share.low, "high": share.high, "p": win.p_value}
            table.append(row | {"quartiles": np.percentile(scores, (25, 50, 75)).tolist()})
    write_json(out / "table.json", table)
    keys = [key for key in values if key != "seed"]
    rows = []
    for row in table:
        numbers = (per_cent(share_of(row)), f"{row['p']:.3g}", f"{row['quartiles'][1]:.4g}")
        rows.append([*(row[key] for key in keys), row["reward"], row["runs"], *numbers])
    text = markdown([*keys, "reward", "runs", "wins over the base, %", "p", "median"], rows)
    write_text(out / "table.md", text + "\n")
    print(text)
    if table and len(keys) == 1 and all(isinstance(row[keys[0]], int | float) for row in table):
        medians = {reward: float(np.median(scores_of(base, reward))) for reward in rewards}
        draw_medians(table, keys[0], medians, out / "figure.png")
        print(out / "figure.png")


def keep_programs(out: Path) -> None:
    """Keeps compiled programs beside the runs: a step has its learning rate and beta as constants."""
    import jax

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "jax_cache"))
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    from dspo_jax import locks
    from dspo_jax.evaluation.run import check_rewards
    from dspo_jax.parallel.mesh import use_cpu_cores
    from dspo_jax.sampling.options import read_drawing_flags
    from dspo_jax.sampling.prompts import read_prompts

    del argv
    given, out = flags.FLAGS, Path(flags.FLAGS.out)
    use_cpu_cores()
    with locks.claim(out):
        keep_programs(out)
        prompts, rendering = read_drawing_flags(given, read_prompts(given.prompts))
        check_rewards(given.rewards, given.reward_dir)  # not after hours of training
        texts = tuple(prompt.text for prompt in prompts)
        panel = Panel(
            given.config.model,
            texts,
            given.num_seeds,
            tuple(given.rewards),
            rendering,
            reward_dir=given.reward_dir,
        )
        values = parse_values(given.vary, given.config)
        base = Run("base", None, panel, kind="base")
        runs = [base, *make_runs(given.config, values, panel).values()]
        results = sweep(runs, out, dry_run=given.dry_run, retry=given.retry)
        if results is None:
            return cli.EXIT_STOPPED
        if not given.dry_run and "base" in results:
            report(values, results, results.pop("base"), out)
    return 0


def run(*vary: str) -> None:
    """Defines the flags and runs the command; `vary` is what is varied unless the user says otherwise."""
    from dspo_jax.sampling.drawing_flags import define_drawing_flags

    cli.define_config("The recipe of every run.")
    flags.DEFINE_multi_string("vary", list(vary) or None, "KEY=VALUE,VALUE: a run for each; may be repeated.")
    flags.DEFINE_string("prompts", None, "A prompt, or a file of them.")
    flags.DEFINE_list("rewards", None, "Rewards, separated by commas; FILE.py:FUNCTION is your own.")
    flags.DEFINE_string("reward_dir", "rewards", "Folder with the weights of each reward under its name.")
    flags.DEFINE_integer("num_seeds", 1, "Images of each prompt.", lower_bound=1)
    flags.DEFINE_string("out", None, "Folder for the runs, table.md, table.json and figure.png.")
    flags.DEFINE_bool("dry_run", False, "List the runs and what is left, and do nothing.")
    flags.DEFINE_bool("retry", False, "Run again what failed before.")
    define_drawing_flags()
    cli.run(main, required=("config", "prompts", "rewards", "out", *(() if vary else ("vary",))))


if __name__ == "__main__":
    run()
