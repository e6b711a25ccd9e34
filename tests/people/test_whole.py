"""From two images of a prompt to a win rate by people, each stage a command, on the emoji model."""

import csv
import io
import json
import signal

import numpy as np
import pytest
from collect_process import CollectProcess
from people_images import Judge
from PIL import Image
from processes import ROOT, finish, log_of, start

httpx = pytest.importorskip("httpx2")

pytestmark = pytest.mark.slow

MODEL = ROOT / "examples/emoji/model"
PROMPTS, STEPS, JUDGED = 30, 10, 12
DRAWING = ["--steps=4", "--guidance_scale=4", "--batch_size=15"]


def brightness(content: bytes) -> int:
    return int(np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), int).sum())


def vote_for_the_brighter(folders, out, people):
    """People judge all pairs over HTTP, by the images that the page shows them; returns the votes of each."""
    server = CollectProcess(folders, out, "--repeat_share=0")
    try:
        votes = []
        for name in people:
            with httpx.Client(base_url=server.url, follow_redirects=True) as client:

                def choose(state, client=client):
                    left, right = (
                        brightness(client.get(url, params={"side": 512}).content) for url in state["images"]
                    )
                    return "tie" if left == right else ("left", "right")[right > left]

                votes.append(Judge(client, name, origin=server.url).judge_all(choose))
    finally:
        status, said = server.stop(signal.SIGINT)
    assert (status, said) == (0, f"{out}: {sum(votes)} votes by {len(people)} people\n")
    return votes


def test_votes_train_the_emoji_model_and_judge_what_came_of_it(tmp_path):
    def run(module, *flags):
        log = tmp_path / module
        assert finish(start(f"dspo_jax.{module}", flags, log), 900) == [0], log_of(log, 0).read_text()
        return log_of(log, 0).read_text()

    prompts = tmp_path / "prompts.txt"
    lines = (ROOT / "examples/emoji/prompts.txt").read_text().splitlines()
    prompts.write_text("\n".join(lines[:PROMPTS]))
    drawn, judged, pairs, workdir = (tmp_path / name for name in ("drawn", "judged", "pairs", "run"))
    run("sample", f"--model={MODEL}", f"--prompts={prompts}", "--seeds=0,1", f"--out={drawn}", *DRAWING)
    votes = tmp_path / "votes.sqlite"
    assert vote_for_the_brighter([drawn], votes, ["Anna", "Ben"]) == [PROMPTS] * 2
    said = run("collect", "export", str(votes), f"--out={judged}")
    assert f"{judged}: {PROMPTS} pairs, {2 * PROMPTS} labels" in said
    for line in (judged / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        winner, loser = (brightness((judged / pair[part]).read_bytes()) for part in ("winner", "loser"))
        assert (winner > loser, pair["preference"]) == (True, 1.0)

    folder = [f"--config.source.path={judged}", "--config.source.validation_share=0.2"]
    model = [f"--config.model={MODEL}", "--config.resolution=64", "--config.num_workers=0"]
    run("encode", "--config=configs/encode/folder.py", *folder, *model, f"--out={pairs}")
    changes = {
        "data.path": pairs,
        "steps": STEPS,
        "batch_size": 4,
        "optimizer.warmup_steps": 0,
        "samples.every": 0,
        "checkpoint.every": STEPS,
    }
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    run("train", "--config=configs/emoji_diffusion_dpo.py", *flags, f"--workdir={workdir}")
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in metrics) == STEPS

    prompts.write_text("\n".join(lines[:JUDGED]))
    out, votes = tmp_path / "eval", tmp_path / "judged.sqlite"
    compared = [f"--base={MODEL}", f"--model=mine={workdir}", f"--prompts={prompts}", "--num_seeds=1"]
    compared += ["--rewards=compressibility,colourfulness", f"--out={out}", *DRAWING]
    run("evaluate", *compared)
    folders = [out / "images" / name for name in ("base", "mine")]
    [count] = vote_for_the_brighter(folders, votes, ["Anna"])
    run("evaluate", *compared, f"--people={votes}")

    light = [
        [brightness(file.read_bytes()) for file in sorted(folder.glob("0-*/*.png"))] for folder in folders
    ]
    base, mine = np.array(light)
    rows = {row["reward"]: row for row in csv.DictReader(io.StringIO((out / "win_rates.csv").read_text()))}
    assert rows.keys() == {"compressibility", "colourfulness", "people: general"}
    assert count == JUDGED, "a model that was trained draws the same image as before"
    assert float(rows["people: general"]["win_rate"]) == pytest.approx(
        np.mean((mine > base) + 0.5 * (mine == base))
    )
    assert int(rows["people: general"]["images_won"]) == (mine > base).sum()
    assert "people: general" in (out / "index.html").read_text()
