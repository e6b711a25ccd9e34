"""The command: what it draws, scores, keeps and refuses."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_files import image_bytes
from PIL import Image
from processes import finish, log_of, start
from tables import each_row

from dspo_jax.evaluation import options
from dspo_jax.evaluation.image_folders import ImageFolder, find_images
from dspo_jax.evaluation.options import read_options
from dspo_jax.evaluation.prompt_sets import PromptSet
from dspo_jax.evaluation.run import Comparison, differences_of_text, evaluate
from dspo_jax.hub_cache import hide_folders
from dspo_jax.pipelines.loading import Adapted, load_pipeline
from dspo_jax.sampling import drawing
from dspo_jax.sampling.drawing import draw_batches
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Drawing, Rendering
from dspo_jax.train import flags_of_text
from dspo_jax.training.settings import TextSettings

PROMPTS = PromptSet(
    "three",
    (Prompt("a < b & c", category="x"), Prompt("two", category="y"), Prompt("three", category="y")),
)
RENDERING = Rendering(Drawing(steps=1, guidance_scale=1.0), batch_size=8)

OWN = """
import numpy as np

def redness(images, prompts):
    with open({log!r}, "a") as log:
        print(len(images), file=log)
    return np.array([image[..., 0].mean() for image in images])

def two_for_one(images, prompts):
    return np.zeros(2 * len(images))
"""


@pytest.fixture
def own(tmp_path):
    """FILE.py of rewards that note how many images they score in the file `log` beside it."""
    (tmp_path / "own.py").write_text(OWN.format(log=str(tmp_path / "log")))
    return f"{tmp_path / 'own.py'}"


def write_images(folder, reds, suffix=".png"):
    """Images [prompts][seeds] of one colour, as they come from elsewhere."""
    folder.mkdir(parents=True)
    for prompt, row in enumerate(reds):
        for seed, red in enumerate(row):
            name = f"{prompt:05d}_{seed}{suffix}"
            (folder / name).write_bytes(image_bytes((red, 0, 0), file_format="PNG"))
    return ImageFolder(folder)


@pytest.fixture
def folders(tmp_path):
    """The base wins the first prompt, the model the second; of the third one image is won and one ties."""
    base = write_images(tmp_path / "b", [[90, 90], [10, 10], [50, 50]])
    return base, write_images(tmp_path / "m", [[80, 80], [20, 30], [60, 50]])


def call(base, models, out, rewards, seeds=2, base_seeds=None, rendering=RENDERING):
    comparison = Comparison(base, models, PROMPTS, seeds, base_seeds)
    return evaluate(comparison, out, rendering, rewards=rewards)


def test_images_made_elsewhere(folders, own, tmp_path):
    base, model = folders
    out = tmp_path / "out"
    found = call(base, {"mine": model}, out, [f"{own}:redness", "compressibility"])
    win_rate = found.win_rates["mine"]["redness"]
    assert win_rate.share.value == pytest.approx((0 + 1 + 0.75) / 3)
    assert win_rate.per_seed == pytest.approx((2 / 3, 1.5 / 3))
    assert (win_rate.mean_reward.value, win_rate.base_mean_reward.value) == pytest.approx((320 / 6, 50))
    assert (win_rate.won, win_rate.lost, win_rate.tied) == (2, 1, 0)
    assert {c: n.share.value for c, n in found.by_category["mine"]["redness"].items()} == {"x": 0, "y": 0.875}

    scores = pq.read_table(out / "scores.parquet").to_pylist()
    assert len(scores) == 12
    assert scores[3] == {
        **{"model": "base", "prompt_index": 1, "seed": 1, "prompt": "two", "category": "y"},
        **{"file": "../b/00001_1.png", "redness": 10, "compressibility": scores[3]["compressibility"]},
    }
    written = json.loads((out / "win_rates.json").read_text())
    assert written["win_rates"]["mine"]["redness"]["per_seed"] == pytest.approx([2 / 3, 0.5])
    assert written["prompts"] == {"name": "three", "count": 3, "sha256": PROMPTS.sha256}
    lines = (out / "win_rates.md").read_text().splitlines()
    assert [line[:16] for line in lines if line.startswith(("| base | 5", "| mine | 5"))] == [
        *("| mine | 58.3 un", "| base | 50.00 [", "| mine | 53.33 ["),
    ]
    assert "redness: won most clearly, 3 of 3" in (out / "index.html").read_text()
    assert {path.name for path in out.iterdir()} == {
        *(f"win_rates.{kind}" for kind in ("md", "csv", "json", "tex", "png")),
        *("scores", "scores.parquet", "index.html", "rewards.png", "wins_by_prompt.png"),
    }


def test_a_second_run_scores_nothing_again_and_writes_the_same(folders, own, tmp_path):
    base, model = folders
    out, log = tmp_path / "out", tmp_path / "log"
    call(base, {"mine": model}, out, [f"{own}:redness"])
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    call(base, {"mine": model}, out, [f"{own}:redness"])
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert log.read_text().split() == ["12"]
    other = write_images(tmp_path / "o", [[1, 2], [3, 4], [5, 6]], ".PNG")
    found = call(base, {"mine": model, "other": other}, out, [f"{own}:redness", "compressibility"])
    assert log.read_text().split() == ["12", "6"]
    assert found.scores["other"]["redness"].tolist() == [[1, 2], [3, 4], [5, 6]]


def test_more_draws_of_the_base(folders, own, tmp_path):
    _, model = folders
    base = write_images(tmp_path / "more", [[90, 70, 10], [10, 10, 40], [50, 50, 50]])
    found = call(base, {"mine": model}, tmp_path / "out", [f"{own}:redness"], base_seeds=3)
    rejection = found.rejection["mine"]["redness"]
    # One draw: 1/3 and 1/3 win of prompt 0, 1/3 and 1/3 of prompt 1, none and three ties of prompt 2.
    assert rejection.win_rate[0] == pytest.approx((4 / 3 + 1 / 2) / 6)
    # All three: the best, 90, 40 and 50, wins four times and ties once.
    assert rejection.win_rate[2] == pytest.approx(4.5 / 6)
    assert rejection.never == pytest.approx(2 / 6)
    assert found.win_rates["mine"]["redness"].per_seed == pytest.approx((2 / 3, 2.5 / 3))
    lines = (tmp_path / "out" / "rejection.csv").read_text().splitlines()
    assert lines[:2] == ["model,reward,draws,win_rate", f"mine,redness,1,{rejection.win_rate[0]}"]
    assert (tmp_path / "out" / "rejection.png").is_file()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "by the best of 3" in page
    assert "4 won, 1 tied, 1 lost" in page


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "00001_1.png").unlink(), FileNotFoundError, r"m/00001_1\.png: no such image"),
        (lambda f: (f / "00003_0.png").touch(), ValueError, r"m/00003_0\.png: an image too many; there"),
        (lambda f: (f / "00000_2.jpg").touch(), ValueError, r"m/00000_2\.jpg: an image too many"),
        (lambda f: (f / "0_1.webp").touch(), ValueError, r"m/0_1\.webp: an image too many"),
        (lambda f: (f / "cat.png").touch(), ValueError, r"m/cat\.png: images must be named PROMPT_SEED"),
    ],
)
def test_image_folders_that_are_not_what_was_asked_for(folders, tmp_path, spoil, error, message):
    base, model = folders
    (model.path / "notes.txt").touch()
    spoil(model.path)
    with pytest.raises(error, match=message):
        call(base, {"mine": model}, tmp_path / "out", ["compressibility"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": ["picscore"]}, "reward = 'picscore': unknown"),
        ({"rewards": []}, "--rewards: none given"),
        ({"rewards": ["compressibility"] * 2}, "two are called 'compressibility'; rename one"),
        ({"models": {}}, "nothing to compare with the base"),
        ({"models": {"base": "runs/x"}}, "'base' is what the base is called; name it: --model=NAME=DIR"),
        ({"models": {"a/b": "runs/x"}}, "'a/b' cannot be a folder's name"),
        ({"models": {"x": "runs/of/none"}}, "runs/of/none"),
        ({"seeds": 0}, "--num_seeds=0: must be at least 1"),
        ({"base_seeds": 1}, "--num_base_seeds=1: must be at least --num_seeds=2"),
        ({"base": ImageFolder(Path("none"))}, "none: no such folder of images"),
    ],
)
def test_what_is_refused_before_anything_is_drawn(folders, shallow_model, tmp_path, changes, message):
    base, _ = folders
    arguments = {"base": base, "models": {"x": str(shallow_model)}, "rewards": ["compressibility"], **changes}
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        call(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_other_peoples_folders_are_not_written_to(folders, tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "images" / "logo.png").touch()
    (tmp_path / "out" / "index.html").touch()
    with pytest.raises(ValueError, match="out: not empty, and not made by this command"):
        call(folders[0], {"mine": folders[1]}, tmp_path / "out", ["compressibility"])
    assert len(list((tmp_path / "out").rglob("*"))) == 3


def test_a_reward_of_the_wrong_shape_is_refused(folders, own, tmp_path):
    with pytest.raises(ValueError, match=r"reward two_for_one: gave scores of shape \[24\] for 12 images"):
        call(folders[0], {"mine": folders[1]}, tmp_path / "out", [f"{own}:two_for_one"])


@pytest.mark.ci
def test_models_are_drawn_once_and_their_images_given_again(shallow_model, own, tmp_path, monkeypatch):
    out, drawn = tmp_path / "out", []
    plain = draw_batches

    def watched(pipe, requests, *args, **kwargs):
        drawn.append(len(requests))
        return plain(pipe, requests, *args, **kwargs)

    monkeypatch.setattr(drawing, "draw_batches", watched)
    models = {"first": str(shallow_model)}
    found = call(str(shallow_model), models, out, [f"{own}:redness"])
    assert drawn == [6, 6]
    assert found.win_rates["first"]["redness"].share.value == 0.5  # the same model from the same noise
    assert found.images["first"].files[2][1] == out / "images" / "first" / "0-first" / "00002_1.png"
    call(str(shallow_model), {**models, "second model": shallow_model}, out, [f"{own}:redness"], base_seeds=3)
    assert drawn == [6, 6, 3, 6]
    assert (tmp_path / "log").read_text().split() == ["12", "9"]

    with pytest.raises(ValueError, match="base: holds images with steps = 1, here it is 2"):
        call(str(shallow_model), models, out, ["compressibility"], rendering=Rendering(Drawing(steps=2)))
    with pytest.raises(ValueError, match=r"first: holds images with models"):
        call(str(shallow_model), {"first": f"{shallow_model}/"}, out, ["compressibility"])

    given, again = ImageFolder(out / "images" / "first"), tmp_path / "again"
    settings = (given.path / "settings.json").read_text()
    (given.path / "settings.json").write_text(settings.replace('"step": null', '"step": 7'))
    drawn_again = call(ImageFolder(given.path / "0-first"), {"given": given}, again, ["compressibility"])
    assert (again / "win_rates.md").read_text().count("checkpoint 7, ddim, 1 step, guidance 1 ") == 2
    (given.path / "settings.json").write_text(settings)
    mixed = call(str(shallow_model), {"given": given, **models}, out, ["compressibility"])
    assert list(mixed.images) == ["base", "given", "first"]
    assert drawn_again.images["given"].files == found.images["first"].files
    (out / "images" / "first" / "1-other").mkdir()
    with pytest.raises(ValueError, match="must hold the images of one model, holds: 0-first, 1-other"):
        call(given, {"given": given}, again, ["compressibility"])
    others = (PROMPTS.prompts[0], Prompt("too"), PROMPTS.prompts[2])
    with pytest.raises(ValueError, match=r"00001_0\.png: is of 'two', but that prompt is 'too'; give"):
        find_images(ImageFolder(given.path / "0-first"), others, 2)


FLAGS = {
    **{"base": "b", "model": ["m"], "base_images": None, "images": [], "prompts": "a", "out": "none"},
    **{"rewards": ["compressibility"], "reward_dir": "rewards", "num_seeds": 5, "num_base_seeds": None},
    **{"sampler": None, "steps": 50, "guidance_scale": 7.5, "guidance_interval": ["0", "1000"]},
    **{"batch_size": 16, "negative_prompt": None, "init_image": None, "strength": None, "height": None},
    **{"width": None, "format": "png", "compute_dtype": None, "vae_tile": 1024, "overwrite": False},
    **{"allow_outside": False, "eta": 0.0, "guidance_rescale": 0.0, "max_chunks": None, "clip_skip": None},
    "lora": [],
    **dict.fromkeys(("skip_layers", "skip_layer_scale", "skip_layer_start", "skip_layer_stop")),
    "max_sequence_length": None,
    "people": None,
    "min_checks": 0.0,
}


def read(**changes):
    return read_options(SimpleNamespace(**FLAGS | changes))


def test_flags_become_arguments(tmp_path):
    (tmp_path / "x=y").mkdir()
    model = ["runs/a", f"named={tmp_path}", str(tmp_path / "x=y")]
    comparison, rendering = read(model=model, images=["other=somewhere"], height=24, width=40, format="webp")
    assert comparison.models == {
        **{"a": "runs/a", "named": str(tmp_path), "x=y": str(tmp_path / "x=y")},
        "other": ImageFolder(Path("somewhere")),
    }
    assert (comparison.base, comparison.seeds, comparison.base_seeds) == ("b", 5, None)
    assert comparison.prompts == PromptSet("a text", (Prompt("a"),))
    assert rendering == Rendering(Drawing(), size=(24, 40), batch_size=16, image_format="webp")
    assert list(read(model=["."])[0].models) == [Path.cwd().name]
    assert read(base=None, base_images="x")[0].base == ImageFolder(Path("x"))


def test_votes_are_read_with_the_checks_that_their_people_must_pass(monkeypatch):
    monkeypatch.setattr(options, "read_votes", lambda path, min_checks: {"general": (path, min_checks)})
    assert read(people="v.sqlite", min_checks=0.5)[0].votes == {"general": (Path("v.sqlite"), 0.5)}
    assert read()[0].votes == {}


def test_loras_are_added_to_the_models_and_not_to_the_base():
    comparison, _ = read(model=["m", "n=o"], images=["i"], lora=["/a/b.safetensors:0.5", "c.safetensors"])
    loras = ("/a/b.safetensors:0.5", "c.safetensors")
    assert comparison.base == "b"
    adapted = {"m": Adapted("m", loras), "n": Adapted("o", loras)}
    assert comparison.models == adapted | {"i": ImageFolder(Path("i"))}
    assert hide_folders(str(comparison.models["m"])) == "m,b.safetensors:0.5, c.safetensors"


def test_edits_start_from_their_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes())
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "image": "a.png"}')
    comparison, rendering = read(prompts=str(tmp_path / "p.jsonl"))
    assert rendering.drawing.strength == 0.75
    assert comparison.prompts.prompts == (Prompt("a", tmp_path / "a.png"),)


@each_row(
    ("changes", "message"),
    [
        ({"base_images": "x"}, "--base or --base_images: give one of them"),
        ({"base": None}, "--base or --base_images: give one of them"),
        (
            {"model": [], "images": ["i"], "lora": ["c.safetensors"]},
            "--lora=c.safetensors: added to each --model, and there is none; name one",
        ),
        ({"model": ["a/exported", "b/exported"]}, "two are called 'exported'; name it: --model=NAME=DIR"),
        ({"images": ["runs/m"]}, "--images=runs/m: two are called 'm'; name it: --images=NAME=DIR"),
        ({"model": []}, "nothing to compare with the base; give --model or --images"),
        ({"prompts": "parti=none.tsv"}, "--prompts=parti=none.tsv: no such file or folder"),
        ({"strength": 0.5}, "--strength=0.5: is of editing an image"),
        ({"min_checks": 0.5}, "--min_checks=0.5: is of people's votes; name these with --people"),
        ({"num_base_seeds": 2}, "--num_base_seeds=2: must be at least --num_seeds=5"),
    ],
)
def test_flags_that_make_no_sense_are_refused(changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(**changes)


@pytest.mark.slow
def test_two_processes_and_edits(shallow_model, own, tmp_path):
    """The command itself, on prompts with pictures; what two processes write is what one writes."""
    for i in range(2):
        Image.fromarray(np.full((16, 16, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"prompt": f"edit {i}", "image": f"{i}.png"}) for i in range(2)]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    arguments = [f"--base={shallow_model}", f"--model=again={shallow_model}", "--num_seeds=1", "--steps=2"]
    arguments += [f"--prompts={tmp_path / 'edits.jsonl'}", f"--rewards=compressibility,{own}:redness"]
    arguments += [f"--out={out}"]
    started = start("dspo_jax.evaluate", arguments, tmp_path / "log-of", processes=2)
    log = log_of(tmp_path / "log-of", 0)
    assert finish(started) == [0, 0], log.read_text()
    assert log.read_text().splitlines()[-1] == str(out / "index.html")
    assert "win rate over the base, %, 2 prompts, 1 seed" in log.read_text()
    before = (out / "win_rates.json").read_text()
    assert json.loads(before)["images"]["again"]["how"]["strength"] == 0.75
    assert (tmp_path / "log").read_text().split() == ["2", "2"]
    changes = {"base": str(shallow_model), "model": [f"again={shallow_model}"], "num_seeds": 1, "steps": 2}
    changes |= {"out": str(out), "prompts": str(tmp_path / "edits.jsonl")}
    comparison, rendering = read(**changes)
    evaluate(comparison, out, rendering, rewards=["compressibility", f"{own}:redness"])
    assert (out / "win_rates.json").read_text() == before


def test_a_base_that_reads_prompts_otherwise_than_a_run_is_warned_of(shallow_model):
    """A folder records neither the length of T5's text nor the rest; a run's next command has the flags."""
    flow = Path(__file__).parents[2] / "examples" / "emoji" / "flow_model"
    base, run = load_pipeline(flow), load_pipeline(flow, max_sequence_length=0)
    [line] = differences_of_text({"base": base, "run": run, "folder": base})
    assert line.startswith("run reads prompts with max_sequence_length = 0, and the base with 256: ")
    assert "--max_sequence_length=0" in line
    assert differences_of_text({"base": run, "run": run}) == []
    assert differences_of_text({"run": run}) == []
    assert differences_of_text({"base": load_pipeline(shallow_model), "run": run}) == []
    assert flags_of_text(TextSettings(max_chunks=1, clip_skip=1, max_sequence_length=None)) == []
    of_run = TextSettings(max_chunks=2, clip_skip=1, max_sequence_length=0)
    assert flags_of_text(of_run) == ["--max_chunks=2", "--max_sequence_length=0"]
