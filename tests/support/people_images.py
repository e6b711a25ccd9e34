"""Folders of images for people to judge, and a person who judges them over HTTP."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

ORIGIN = "http://127.0.0.1:8765"


def write_picture(path: Path, seed: int, size: int = 12) -> None:
    """Writes a random PNG, whose metadata name its folder, as those of other programs do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    noted = PngImagePlugin.PngInfo()
    noted.add_text("parameters", f"drawn by {path.parent.name}")
    Image.fromarray(pixels).save(path, pnginfo=noted)


def write_model(folder: Path, prompts: Sequence[str], seeds: int = 1, first: int = 0) -> Path:
    """Writes what `sample` leaves for one model; `first` starts the random pictures' numbers."""
    lines = []
    for index, prompt in enumerate(prompts):
        for seed in range(seeds):
            name = f"0-{folder.name}/{index:05d}_{seed}.png"
            write_picture(folder / name, first + index * seeds + seed)
            row = {"model": folder.name, "prompt": prompt, "prompt_index": index, "seed": seed, "file": name}
            lines.append(json.dumps(row))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def make_edits(folder: Path, pictures: Sequence[int]) -> Path:
    """Has a model's folder say that a prompt's images are edits of a picture; `pictures` numbers them."""
    manifest = folder / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().split("\n")]
    for row in rows:
        number = pictures[row["prompt_index"]]
        row["init_image"] = f"init_images/{number}.png"
        write_picture(folder / row["init_image"], 9000 + number, size=8)
    manifest.write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_pairs(folder: Path, prompts: Sequence[str], first: int = 10_000) -> Path:
    """Writes a folder with pairs.jsonl."""
    lines = []
    for index, prompt in enumerate(prompts):
        names = [f"{index}{part}.png" for part in "ab"]
        for number, name in enumerate(names):
            write_picture(folder / name, first + 2 * index + number)
        lines.append(json.dumps({"caption": prompt, "winner": names[0], "loser": names[1]}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


class Judge:
    """A person at a browser: joins, reads what is shown, votes and undoes through a client of httpx's API."""

    def __init__(self, client, name: str, token: str = "", origin: str = ORIGIN):
        """Enters by the form, with the session's cookie from then on."""
        self.client, self._headers = client, {"origin": origin}
        answer = client.post("/join", data={"name": name, "token": token}, headers=self._headers)
        assert answer.status_code == 200, answer.text
        self.page = answer.text

    def state(self) -> dict:
        return self.client.get("/state").json()

    def send(self, path: str, **content):
        return self.client.post(path, json=content, headers=self._headers)

    def vote(self, choice) -> dict:
        """Votes on what is shown now, and returns what is shown then."""
        state = self.state()
        answer = self.send("/vote", showing=state["showing"], question=state["question"], choice=choice)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def undo(self) -> dict:
        answer = self.send("/undo", vote=self.state()["last"])
        assert answer.status_code == 200, answer.text
        return answer.json()

    def judge_all(self, choose: Callable[[dict], object]) -> int:
        """Votes until nothing is left; returns the number of votes."""
        votes = 0
        while (state := self.state())["showing"] is not None:
            self.vote(choose(state))
            votes += 1
        return votes


def names_of(state: dict) -> list[str]:
    """The opaque names of the images that are shown, from the left."""
    return [re.fullmatch(r"/image/([0-9a-f]{32})", url)[1] for url in state["images"]]
