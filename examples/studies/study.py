"""The papers' tables in small: every method from the shipped emoji model, by as many pairs or reward queries.

    python -m examples.studies.study --out runs/study --report docs/results.md

The same command goes on where it was stopped, over as many sittings as it takes; --dry_run says what is left,
--quick is a study of minutes with the same stages. docs/results.md has the set-up, the predictions and what
came of them.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import emoji_ddpo, emoji_diffusion_dpo, emoji_draft, emoji_online_dpo
from configs.encode import emoji, folder
from dspo_jax import cli
from dspo_jax.data.sources.emoji import EmojiImages
from dspo_jax.feedback.labelling import choose_pairs
from dspo_jax.files import write_json, write_text
from dspo_jax.json_files import JsonObject
from dspo_jax.sampling.rendering import Drawing, Rendering
from examples.studies.sweep import Panel, Run, keep_programs, sweep
from examples.studies.tables import scores_of

EMOJI = Path("examples/emoji")  # as in the recipes: the study is run in the clone
MODEL = str(EMOJI / "model")
RENDERING = Rendering(Drawing(steps=20, guidance_scale=4.0), batch_size=16)
REWARDS = (
    "compressibility",
    "colourfulness",
    *(f"{EMOJI / name}.py:{name}" for name in ("sentiment", "likeness")),
)
# Temperature of the Bradley-Terry labels of the exact signals, in the reward's units: half the median
# difference of two images of a prompt, so that about five labels in six are those of the reward.
TEMPERATURES = {"compressibility": 0.009, "colourfulness": 0.32}
AFFECT = "affect"  # the human-derived signal
SIGNALS = (*TEMPERATURES, AFFECT)


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a study is.

    Attributes:
      pairs, held_out: of each exact signal; an image is scored once, so there are twice as many queries.
      updates, batch_size: of methods on pairs: pairs are seen updates * batch_size / pairs times.
      prompts, seeds: of the held-out comparison.
      search_prompts, search_seeds: of the search on validation prompts.
      training_seeds: of each method.
      draws: of the base, for rejection sampling.
      methods: names; () is all of them.
      signals: names.
      rates: how many of each method's learning rates are tried.
      extras: whether the sweeps of beta and lambda and the long runs are made.
    """

    pairs: int = 640
    held_out: int = 128
    updates: int = 40
    batch_size: int = 32
    prompts: int = 32
    seeds: int = 5
    search_prompts: int = 16
    search_seeds: int = 2
    training_seeds: int = 3
    draws: int = 50
    methods: tuple[str, ...] = ()
    signals: tuple[str, ...] = SIGNALS
    rates: int = 3
    extras: bool = True


FULL = Size()
QUICK = Size(
    pairs=64, held_out=16, updates=8, batch_size=16, prompts=8, seeds=2, search_prompts=4, search_seeds=1,
    training_seeds=2, draws=4, methods=("sft", "diffusion_dpo", "dspo", "dspo_pref"),
    signals=("colourfulness",), rates=1, extras=False,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Method:
    """A method: what it changes in its recipe, the learning rates that are tried, the signals it has.

    Attributes:
      label: what tables call it.
      changes: by dotted key of the config.
      recipe: that it starts from; trained on pairs unless its stream is another.
      rates: learning rates.
      signals: that it can be trained on.
      nodup: one pair of each prompt.
    """

    label: str
    changes: Mapping[str, Any]
    recipe: Any = emoji_diffusion_dpo
    rates: tuple[float, ...] = (1e-4, 3e-5, 3e-4)
    signals: tuple[str, ...] = SIGNALS
    nodup: bool = False

    @property
    def is_online(self) -> bool:
        """Whether it is trained on own images and a reward."""
        return self.recipe is not emoji_diffusion_dpo


def _on_pairs(label: str, name: str, *, more: Mapping[str, Any] | None = None, **how: Any) -> Method:
    """A method on pairs: an objective with its arguments; the recipe's beta counts for none but it itself."""
    own = ("rates", "signals", "nodup")
    arguments = {f"objective.{key}": value for key, value in how.items() if key not in own}
    changes = {"objective.name": name, "objective.beta": None, **arguments, **(more or {})}
    return Method(label, changes, **{key: value for key, value in how.items() if key in own})


EXACT = tuple(TEMPERATURES)
METHODS = {
    "sft": _on_pairs("SFT", "sft"),
    "diffusion_dpo": _on_pairs("Diffusion-DPO", "diffusion_dpo", beta=2000.0),
    "kto": _on_pairs("Diffusion-KTO", "kto", beta=1000.0),
    "mapo": _on_pairs("MaPO", "mapo"),
    "dspo": _on_pairs("DSPO as published", "dspo", lam=0.001),
    "dspo_pref": _on_pairs("DSPO, preference term on", "dspo", reward_scale=2000.0, score_weight=0.5),
    "dspo_e": _on_pairs("DSPO-E", "dspo_e"),
    "dspo_ref": _on_pairs("DSPO-ref", "dspo_ref"),
    # Its gradient is 1/beta of that of D: AdamW's eps must be far below that (docs/objectives.md).
    "ipo": _on_pairs("IPO", "ipo", beta=1000.0, more={"optimizer.eps": 1e-12}),
    "dmpo": _on_pairs("DMPO", "dmpo", beta=2000.0),
    "sdpo": _on_pairs("SDPO", "sdpo", beta=2000.0),
    "alpha_dpo": _on_pairs("alpha-DPO", "alpha_dpo", beta=2000.0),
    "hinge": _on_pairs("hinge", "hinge", beta=1000.0),
    "dspo_lora": _on_pairs("DSPO-LoRA", "dspo", lam=0.001, more={"lora.rank": 8}, rates=(1e-3, 3e-4, 3e-3)),
    # Pairs of the affect signal have eight prompts, so that it would be left with eight pairs.
    "dspo_nodup": _on_pairs("DSPO-nodup", "dspo", lam=0.001, nodup=True, signals=EXACT),
    "online_dpo": Method("online DPO", {}, emoji_online_dpo, signals=EXACT),
    "iterated_dpo": Method("iterated DPO", {"reference.every": 4}, emoji_online_dpo, signals=EXACT),
    "raft": Method(
        "RAFT", {"objective.name": "sft", "objective.beta": None}, emoji_online_dpo, signals=EXACT
    ),
    "ddpo": Method("DDPO", {}, emoji_ddpo, rates=(3e-4, 1e-4, 1e-3), signals=EXACT),
    # JPEG's size has no gradient.
    "draft_k": Method("DRaFT-1", {}, emoji_draft, rates=(1e-4, 3e-5, 3e-4), signals=("colourfulness",)),
}


def reward_of(signal: str) -> str:
    """Returns the reward by which runs on a signal are chosen and judged."""
    return "sentiment" if signal == AFFECT else signal


def make_prompts(signal: str, count: int, start: int = 0) -> tuple[str, ...]:
    """Names of emoji that nothing here is trained on; of the affect signal its categories."""
    captions = [pair.caption for pair in EmojiImages(min_occurrences=20).pairs("train")]
    if signal == AFFECT:
        categories = sorted(set(captions[2::3]))
        return tuple(categories[i % len(categories)] for i in range(start, start + count))
    trained = set(train_prompts())
    free = sorted(set(captions[::3]) - trained)
    order = np.random.default_rng(0).permutation(len(free))
    return tuple(free[i] for i in order[start : start + count])


def train_prompts() -> list[str]:
    """The prompts of training, of pairs and of own images."""
    return (EMOJI / "train_prompts.txt").read_text(encoding="utf-8").split("\n")[:-1]


def label_pairs(scores: np.ndarray, temperature: float) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Labels pairs of images as the Bradley-Terry model does, P = sigmoid(difference / temperature).

    Args:
      scores: [N, 2] of the reward; pairs of equal scores are left out.
      temperature: in the reward's units.

    Returns:
      (the pairs: `number`, and `winner` and `loser` as 0 or 1; what is known of them: `labels_as_reward`, the
      share of labels in the reward's own order, and `best_accuracy`, what that share is expected to be, which
      nothing that judges these pairs can exceed by more than chance).
    """
    choices = choose_pairs(list(scores), temperature=temperature)
    rows = [{"number": each.prompt, "winner": each.winner, "loser": each.loser} for each in choices]
    gaps = np.array([scores[each.prompt, each.winner] - scores[each.prompt, each.loser] for each in choices])
    best = float((1 / (1 + np.exp(-np.abs(gaps.astype(float)) / temperature))).mean())
    known = {"temperature": temperature, "labels_as_reward": float((gaps > 0).mean()), "best_accuracy": best}
    return rows, known


def make_pairs(signal: str, size: Size, out: Path) -> None:
    """Writes the datasets of a signal to out/SIGNAL and, with one pair of each prompt, out/SIGNAL_nodup.

    Of an exact signal the base draws two images of each prompt, and the reward labels them; labels.json says
    how often a label is the reward's own order, and the held-out accuracy of whoever knows the reward.
    """
    from dspo_jax.data.encoding import encode
    from dspo_jax.rewards import load_reward
    from dspo_jax.rewards.scores import score_files
    from dspo_jax.sampling.drawing import sample
    from dspo_jax.sampling.folder import place_images
    from dspo_jax.sampling.image_sampler import ImageRequest
    from dspo_jax.sampling.prompts import Prompt

    if signal == AFFECT:
        config = emoji.get_config()
        config.model = MODEL
        encode(config, out / signal)
        return
    captions, drawn = train_prompts(), out / "drawn"
    # A fifth of the captions is held out.
    kept, others = captions[: len(captions) * 4 // 5], captions[len(captions) * 4 // 5 :]
    texts = [kept[i % len(kept)] for i in range(size.pairs)]
    texts += [others[i % len(others)] for i in range(size.held_out)]
    seeds = (1000, 1001)
    sample({"base": MODEL}, [Prompt(text) for text in texts], drawn, RENDERING, seeds=seeds)
    requests = [ImageRequest(text, i, seed) for i, text in enumerate(texts) for seed in seeds]
    files = [place_images(drawn, ["base"], requests, "png")["base"][each] for each in requests]
    reward = load_reward(signal)
    found = score_files(files, [each.prompt for each in requests], [reward], out / "scores")[signal]
    rows, facts = label_pairs(found.reshape(-1, 2), TEMPERATURES[signal])
    for row in rows:
        number = row.pop("number")
        winner, loser = (files[2 * number + row.pop(which)] for which in ("winner", "loser"))
        row |= {"caption": texts[number], "split": "train" if number < size.pairs else "validation"}
        row |= {"winner": winner.relative_to(drawn).as_posix(), "loser": loser.relative_to(drawn).as_posix()}
    write_text(drawn / f"{signal}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_json(out / f"{signal}.json", facts)
    for nodup in (False, True):
        config = folder.get_config()
        config.model, config.source.path = MODEL, str(drawn / f"{signal}.jsonl")
        config.source.one_pair_per_prompt = nodup
        config.resolution, config.num_workers = 64, 0
        encode(config, out / (f"{signal}_nodup" if nodup else signal))


def make_config(name: str, signal: str, rate: float, seed: int, size: Size, data: Path) -> ConfigDict:
    """Returns the config of a run: the method's recipe, with the study's number of pairs or of queries."""
    method = METHODS[name]
    config = method.recipe.get_config()
    config.model, config.seed = MODEL, seed
    config.samples.every = config.validation.every = 0
    config.rewards.validation, config.rewards.prompts = (), ()
    config.log_every = 5
    config.optimizer.learning_rate = rate
    queries = 2 * size.pairs
    if method.is_online:
        config.data.path = None
        config.rewards.train = signal
        config.stream.prompts = tuple(train_prompts()[: len(train_prompts()) * 4 // 5])
        config.accumulation = 1
        each = config.batch_size * (config.stream.images if config.stream.kind == "own_pairs" else 1)
        if method.recipe is emoji_draft:
            config.stream.num_inference_steps = 10  # as own pairs are drawn
        config.steps = max(1, queries // each)
    else:
        config.data.path = str(data / (f"{signal}_nodup" if method.nodup else signal))
        config.steps, config.batch_size = size.updates, size.batch_size
    config.optimizer.warmup_steps = max(1, config.steps // 10)
    config.checkpoint.every = 20
    config.update_from_flattened_dict(dict(method.changes))
    return config


def panel(signal: str, size: Size, data: Path, *, search: bool = False) -> Panel:
    """Returns how runs on a signal are judged: on held-out prompts, in the search on validation prompts."""
    if search:
        prompts = make_prompts(signal, size.search_prompts)
        return Panel(MODEL, prompts, size.search_seeds, REWARDS, RENDERING, first_seed=100)
    prompts = make_prompts(signal, size.prompts, size.search_prompts)
    return Panel(MODEL, prompts, size.seeds, REWARDS, RENDERING, pairs=str(data / signal))


def search_runs(size: Size, data: Path) -> list[Run]:
    """Returns the base and every method with each of its learning rates, on validation prompts."""
    judges = {signal: panel(signal, size, data, search=True) for signal in size.signals}
    runs = [Run(f"search/{signal}/base", None, judge, kind="base") for signal, judge in judges.items()]
    for name, signal in combinations(size):
        for rate in METHODS[name].rates[: size.rates]:
            config = make_config(name, signal, rate, 100, size, data)
            runs.append(
                Run(f"search/{signal}/{name},{rate:g}", config, judges[signal], kind=f"search {name}")
            )
    return runs


def combinations(size: Size) -> list[tuple[str, str]]:
    """Returns every method with every signal that it can be trained on."""
    return [
        (name, signal)
        for signal in size.signals
        for name, method in METHODS.items()
        if signal in method.signals and (not size.methods or name in size.methods)
    ]


def choose_rate(name: str, signal: str, size: Size, results: Mapping[str, JsonObject]) -> float | None:
    """Returns the rate with most wins over the base on validation prompts; of equal ones the smallest.

    None where every one failed, or none has been tried.
    """
    wins: dict[float, float] = {}
    for rate in METHODS[name].rates[: size.rates]:
        found = results.get(f"search/{signal}/{name},{rate:g}")
        base = results.get(f"search/{signal}/base")
        if found is not None and base is not None:
            ours, theirs = (scores_of(each, reward_of(signal)) for each in (found, base))
            wins[rate] = float(((ours > theirs) + (ours == theirs) / 2).mean())
    return max(wins, key=lambda rate: (wins[rate], -rate)) if wins else None


def final_runs(size: Size, data: Path, results: Mapping[str, JsonObject]) -> list[Run]:
    """Returns the base and every method at its chosen rate, with each training seed, on held-out prompts.

    A method whose runs of the search all failed has none; before the search, the first rate stands for it.
    """
    runs = [Run(f"final/{s}/base", None, panel(s, size, data), kind="base") for s in size.signals]
    for name, signal in combinations(size):
        rate = choose_rate(name, signal, size, results) if results else METHODS[name].rates[0]
        for seed in range(size.training_seeds if rate is not None else 0):
            config = make_config(name, signal, rate or 0.0, seed, size, data)
            runs.append(Run(f"final/{signal}/{name},{seed}", config, panel(signal, size, data), kind=name))
    return runs


BETAS = (100.0, 500.0, 2000.0, 8000.0, 32000.0)
LAMBDAS = (0.001, 0.01, 0.1, 0.5, 1.0)
LONG = ("sft", "diffusion_dpo", "kto", "dspo_pref", "online_dpo", "ddpo", "draft_k")


def extra_runs(size: Size, data: Path) -> list[Run]:
    """Returns the sweeps of beta and lambda, the long runs, and the base's many draws, on colourfulness."""
    signal = "colourfulness"
    judged = panel(signal, size, data)
    draws = dataclasses.replace(judged, seeds=size.draws)
    runs = [Run("extra/draws", None, draws, kind="draws")]

    def add(group: str, name: str, value: object, key: str = "", **more: Any) -> None:
        for seed in range(size.training_seeds):
            config = make_config(name, signal, 1e-4, seed, size, data)
            config.update_from_flattened_dict({f"objective.{key}": value} if key else {})
            runs.append(Run(f"extra/{group}/{value},{seed}", config, judged, kind=name, **more))

    for beta in BETAS:
        add("beta", "diffusion_dpo", beta, "beta")
    for lam in LAMBDAS:
        add("lambda", "dspo", lam, "lam")
    add("lambda", "sft", "sft")
    add("lambda", "dspo_pref", "pref")
    few = dataclasses.replace(judged, seeds=min(2, size.seeds), pairs="")
    for name in LONG:
        config = make_config(name, signal, 1e-4, 0, size, data)
        part = max(1, config.steps // 2 // config.stream.updates) * config.stream.updates  # whole rounds
        config.steps = 8 * part
        steps = tuple(part * share for share in (1, 2, 4, 8))
        runs.append(Run(f"extra/long/{name}", config, few, steps=steps, kind=f"long {name}"))
    return runs


def run_study(size: Size, out: Path, *, dry_run: bool, retry: bool) -> dict[str, JsonObject] | None:
    """Does what is left of the study; returns all results by name, or None where it was asked to stop."""
    data = out / "data"
    if not dry_run:
        for signal in size.signals:
            make_pairs(signal, size, data)
    how: dict[str, Any] = {"dry_run": dry_run, "retry": retry, "keep_checkpoints": False}
    results: dict[str, JsonObject] = {}
    stages = (
        ("search on validation prompts", lambda: search_runs(size, data)),
        ("methods on held-out prompts", lambda: final_runs(size, data, copy.copy(results))),
        ("beta, lambda, long runs, draws of the base", lambda: extra_runs(size, data) if size.extras else []),
    )
    for title, runs in stages:
        print(f"== {title}", flush=True)
        found = sweep(runs(), out, **how)
        if found is None:
            return None
        results |= found
    return results


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    from dspo_jax import locks
    from dspo_jax.parallel.mesh import use_cpu_cores
    from examples.studies.report import write_report

    del argv
    use_cpu_cores()
    given, out = flags.FLAGS, Path(flags.FLAGS.out)
    size = QUICK if given.quick else FULL
    with locks.claim(out):
        keep_programs(out)
        results = run_study(size, out, dry_run=given.dry_run, retry=given.retry)
        if results is None:
            return cli.EXIT_STOPPED
        if not given.dry_run:
            write_report(results, size, out, Path(given.report) if given.report else None)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/study", "Folder for everything that is made.")
    flags.DEFINE_bool("quick", False, "A study of four methods in minutes; give it an --out of its own.")
    flags.DEFINE_string("report", None, "A page whose marked parts the tables fill.")
    flags.DEFINE_bool("dry_run", False, "List the runs and what is left, and do nothing.")
    flags.DEFINE_bool("retry", False, "Run again what failed before.")
    cli.run(main)
