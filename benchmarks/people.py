"""Votes over HTTP by simulated people while the server is killed, and how many votes an interval needs.

    python -m benchmarks.people --folder DIR
    python -m benchmarks.people --intervals

The first starts `collect` on random images of four models with known Bradley-Terry strengths; people of known
reliability vote at once, each as fast as the server answers. The server is killed with SIGKILL three times.
Then every acknowledged vote must be in the file, and the strengths are estimated. `--intervals` draws votes
without a server, and prints the half width of the interval of a win rate, how often it holds the true one,
and how often it is above one half. `folder` must not exist.
"""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image
from scipy.special import expit

from dspo_jax import cli
from dspo_jax.errors import UserError
from dspo_jax.evaluation.people import Answer, two_way_interval
from dspo_jax.people.bradley_terry import fit_strengths
from dspo_jax.people.judgements import read_judgements
from dspo_jax.people.pictures import Pictures
from dspo_jax.people.votes import open_votes

STRENGTHS = {"first": 0.6, "second": 0.2, "third": -0.1, "fourth": -0.7}
"""Strength of each of four models; their mean is 0."""

_PROMPTS, _SIZE, _KILLS, _ROUNDS = 60, 64, 3, 100
_WIN_RATE, _OF_PROMPTS, _OF_PEOPLE = 0.6, 1.0, 0.3  # of --intervals; the last two are deviations of logits


def draw_reliabilities(people: int) -> np.ndarray:
    """Draws how often each person says what the strengths say, from 0.7 to 1."""
    return np.random.default_rng(1).uniform(0.7, 1.0, people)


def chance(one: str, other: str, reliability: float) -> float:
    """Returns the probability that a person prefers an image of one model to one of the other."""
    wins = float(expit(STRENGTHS[one] - STRENGTHS[other]))
    return reliability * wins + (1 - reliability) * (1 - wins)


def write_images(folder: Path) -> list[Path]:
    """Writes an image of each model for each prompt, with the metadata.jsonl that `collect` reads."""
    draw = np.random.default_rng(0)
    for model in STRENGTHS:
        (folder / model).mkdir(parents=True)
        rows = []
        for number in range(_PROMPTS):
            pixels = draw.integers(0, 256, (_SIZE, _SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / model / f"{number}.png")
            rows.append(json.dumps({"file_name": f"{number}.png", "prompt": f"prompt {number}"}))
        (folder / model / "metadata.jsonl").write_text("\n".join(rows))
    return [folder / model for model in STRENGTHS]


class Server:
    """`collect` as a process, which is killed and started again on its port."""

    def __init__(self, folders: Sequence[Path], votes: Path):
        """Starts it on any port."""
        self._command = [sys.executable, "-m", "dspo_jax.collect", f"--out={votes}", "--repeat_share=0"]
        self._command += [f"--images={folder}" for folder in folders]
        self.port = 0
        self.start()

    def start(self) -> None:
        """Starts it, and returns when it answers."""
        self.process = subprocess.Popen(
            [*self._command, f"--port={self.port}"], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
                self.port = int(found[1])
                return
        raise RuntimeError("the server ended before it answered")

    def kill(self) -> None:
        """Kills it with SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Person(threading.Thread):
    """Votes a number of times over one connection, which is opened again whenever it breaks."""

    def __init__(self, number: int, reliability: float, server: Server, models: dict[str, str], votes: int):
        """Takes the model of each opaque name, which a real person does not know."""
        super().__init__(daemon=True)
        self._server, self._models, self._votes = server, models, votes
        self._name, self._reliability = f"person {number}", reliability
        self._draw = np.random.default_rng([2, number])
        self._cookie = ""
        self._connection: http.client.HTTPConnection | None = None
        self.acknowledged: list[int] = []
        self.seconds: list[float] = []

    def run(self) -> None:
        joined = self._ask("POST", "/join", urllib.parse.urlencode({"name": self._name}))
        self._cookie = joined.headers["set-cookie"].split(";")[0]
        state = self._json("GET", "/state")
        while len(self.acknowledged) < self._votes:
            left, right = (self._models[url] for url in state["images"])
            prefers_left = self._draw.random() < chance(left, right, self._reliability)
            vote = {"showing": state["showing"], "question": state["question"]}
            began = time.perf_counter()
            state = self._json(
                "POST", "/vote", json.dumps({**vote, "choice": "left" if prefers_left else "right"})
            )
            self.seconds.append(time.perf_counter() - began)
            self.acknowledged.append(vote["showing"])

    def _json(self, method: str, path: str, body: str | None = None) -> dict:
        answer = self._ask(method, path, body)
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {self._body!r}")
        return dict(json.loads(self._body))

    def _ask(self, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        while True:
            try:
                if self._connection is None:
                    self._connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)
                kind = "application/x-www-form-urlencoded" if path == "/join" else "application/json"
                headers = {"cookie": self._cookie, "content-type": kind}
                self._connection.request(method, path, body, headers)
                answer = self._connection.getresponse()
                self._body = answer.read()
                return answer
            except (OSError, http.client.HTTPException):
                self._connection = None
                time.sleep(0.05)


def measure_server(folder: Path, people: int, votes: int) -> None:
    """Has people vote while the server is killed, and looks for what was acknowledged."""
    reliabilities = draw_reliabilities(people)
    path = folder / "votes.sqlite"
    server = Server(write_images(folder), path)
    try:
        store = open_votes(path)
        pictures = Pictures(store)
        models = {pictures.address(i): i.model for group in store.groups for i in group.images}
        crowd = [
            Person(number, reliability, server, models, votes // people)
            for number, reliability in enumerate(reliabilities.tolist())
        ]
        began = time.perf_counter()
        for person in crowd:
            person.start()
        away = 0.0
        for kill in range(1, _KILLS + 1):
            while sum(len(person.acknowledged) for person in crowd) < kill * votes / (_KILLS + 1):
                time.sleep(0.02)
            died = time.perf_counter()
            server.kill()
            server.start()
            away += time.perf_counter() - died
        for person in crowd:
            person.join()
        seconds = time.perf_counter() - began
    finally:
        server.kill()
    acknowledged = [number for person in crowd for number in person.acknowledged]
    kept = [vote.showing.number for vote in store.votes()]
    lost = set(acknowledged) - set(kept)
    waits = np.concatenate([person.seconds for person in crowd])
    print(
        f"{len(acknowledged):,} votes by {people} people in {seconds:.1f} s, of which the server was away "
        f"{away:.1f} s ({_KILLS} SIGKILLs): {len(acknowledged) / (seconds - away):.0f} votes/s; a vote took "
        f"{1000 * np.median(waits):.0f} ms (median), {1000 * np.percentile(waits, 95):.0f} ms (95 of 100)"
    )
    print(f"acknowledged, but lost: {len(lost)}; in the file twice: {len(kept) - len(set(kept))}")
    found = fit_strengths(
        [
            (each.person, each.first.model, each.second.model, each.share)
            for each in read_judgements(store, "general")
        ]
    )
    deviations = np.sqrt(np.diag(found.covariance))
    for item, value, deviation in zip(found.items, found.values, deviations, strict=True):
        low, high = value - 1.96 * deviation, value + 1.96 * deviation
        print(f"{item}: {value:.2f} [{low:.2f}, {high:.2f}], in truth {STRENGTHS[item]}")
    held = [estimate_once(np.random.default_rng([3, i]), reliabilities, votes) for i in range(_ROUNDS)]
    share = 100 * np.mean(held)
    print(f"in {_ROUNDS} simulations without a server {share:.1f} % of the intervals held the truth")
    store.close()


def estimate_once(draw: np.random.Generator, reliabilities: np.ndarray, votes: int) -> list[bool]:
    """Draws votes, estimates the strengths, and says of each whether its 95 % interval holds the truth."""
    comparisons = []
    for number in range(votes):
        person = number % len(reliabilities)
        one, other = draw.permutation(list(STRENGTHS))[:2].tolist()
        wins = draw.random() < chance(one, other, reliabilities[person])
        comparisons.append((person, one, other, float(wins)))
    found = fit_strengths(comparisons)
    truth = np.array([STRENGTHS[item] for item in found.items])
    return (np.abs(found.values - truth) <= 1.96 * np.sqrt(np.diag(found.covariance))).tolist()


def measure_intervals() -> None:
    """Prints what intervals of a win rate are worth, by numbers of prompts, people and votes."""
    draw = np.random.default_rng(0)
    # The logit whose mean over prompts and people gives the win rate.
    tastes = np.random.default_rng(1).normal(0, np.hypot(_OF_PROMPTS, _OF_PEOPLE), 200_000)
    shifts = np.linspace(0, 2, 201)
    shift = shifts[np.argmin([abs(expit(tastes + each).mean() - _WIN_RATE) for each in shifts])]
    print(
        "| prompts | people | votes a prompt | votes | half width, % | holds the truth, % | says better, % |"
    )
    print("|---|---|---|---|---|---|---|")
    for prompts in (50, 100, 200, 500):
        for people, per_prompt in ((1, 1), (5, 1), (5, 3), (10, 5)):
            found = [
                two_way_interval(answers, [answer.share for answer in answers])
                for _ in range(_ROUNDS)
                for answers in [draw_votes(draw, shift, prompts, people, per_prompt)]
            ]
            half = np.mean([each.high - each.low for each in found]) / 2
            holds = np.mean([each.low <= _WIN_RATE <= each.high for each in found])
            better = np.mean([each.low > 0.5 for each in found])
            print(
                f"| {prompts} | {people} | {per_prompt} | {prompts * per_prompt:,} | {100 * half:.1f} | "
                f"{100 * holds:.0f} | {100 * better:.0f} |"
            )


def draw_votes(
    draw: np.random.Generator, shift: float, prompts: int, people: int, per_prompt: int
) -> list[Answer]:
    """Draws votes with a taste of each prompt and each person, both normal on the scale of logits."""
    of_prompts, of_people = draw.normal(0, _OF_PROMPTS, prompts), draw.normal(0, _OF_PEOPLE, people)
    answers = []
    for prompt in range(prompts):
        for person in draw.choice(people, per_prompt, replace=False).tolist():
            wins = draw.random() < expit(shift + of_prompts[prompt] + of_people[person])
            answers.append(Answer("model", prompt, (0, 0), person, float(wins)))
    return answers


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    del argv
    values = flags.FLAGS
    if values.intervals:
        measure_intervals()
        return
    if values.folder is None:
        raise UserError("--folder is not set: name a new folder for images and votes, or give --intervals")
    folder = Path(values.folder)
    if folder.exists():
        raise UserError(f"--folder={folder}: exists already; choose another name")
    measure_server(folder, values.people, values.votes)


def run() -> None:
    """Defines the flags and runs the benchmark."""
    flags.DEFINE_string("folder", None, "New folder for images and votes.")
    flags.DEFINE_bool("intervals", False, "How many votes an interval needs, without a server.")
    flags.DEFINE_integer("people", 50, "Simulated people.")
    flags.DEFINE_integer("votes", 5000, "Votes in all.")
    cli.run(main)


if __name__ == "__main__":
    run()
